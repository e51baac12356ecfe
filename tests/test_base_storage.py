"""The base's matrices in 8 bits or on the CPU: the same step, as exactly as the storage allows."""

import copy

import pytest
import torch
from torch import nn

import train
from helpers import CALM, RUN, assert_close, assert_same, load_dit, losses, random_inputs, run
from sdv.lora import adapt, lora_parameters
from sdv.run.base_storage import Float8, hold, nbytes

STEP = 2.0**-4  # of e4m3: three bits behind the leading one, so half a unit of the last is 1/16


def test_8_bits_change_an_entry_by_a_sixteenth_at_most():
    sizes = torch.logspace(-6, 3, 64, dtype=torch.float64)[:, None]
    weight = sizes * torch.randn(64, 300, dtype=torch.float64)
    weight[5] = 0
    numbers, scale = Float8().right_inverse(weight.float())
    assert numbers.dtype == torch.float8_e4m3fn and scale.shape == (64, 1)
    back = Float8()(numbers, scale).double()
    tiny = 2.0**-10 * scale.double()  # below its smallest normal number e4m3 has steps of 2^-9
    assert ((back - weight).abs() <= STEP * weight.abs() * (1 + 1e-6) + tiny).all()
    assert (back[5] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_step_is_that_of_the_matrices_that_come_back(stock_dit, dtype):
    torch.manual_seed(0)
    dit = load_dit(stock_dit[1]).to(dtype)
    adapt(dit, 4, 4.0)
    for parameter in lora_parameters(dit).values():
        parameter.data.normal_(std=0.05)
    rounded = copy.deepcopy(dit)
    for layer in rounded.blocks.modules():
        if isinstance(getattr(layer, "weight", None), nn.Parameter) and layer.weight.ndim == 2:
            layer.weight.data = Float8()(*Float8().right_inverse(layer.weight.data))
    video, t, text, ref = random_inputs()

    def step(model: nn.Module, share: float = 1.0) -> list[torch.Tensor]:
        model.recompute = share
        pred = model(video.to(dtype), t, text.to(dtype), ref.to(dtype))
        grads = torch.autograd.grad(pred.float().square().mean(), list(lora_parameters(model).values()))
        return [pred, *grads]

    for storage, model, same in (("cpu", copy.deepcopy(dit), dit), ("fp8", copy.deepcopy(dit), rounded)):
        whole = nbytes(model)
        hold(model, storage, "cpu")
        assert all(map(torch.equal, step(model), step(same))), storage
        matrices = sum(p.nbytes for p in dit.blocks.parameters() if p.ndim == 2) - sum(
            p.nbytes for p in lora_parameters(dit.blocks).values()
        )
        scales = sum(p.nbytes for name, p in model.named_parameters() if name.endswith(".original1"))
        left = {"cpu": 0, "fp8": matrices // torch.finfo(dtype).bits * 8 + scales}[storage]
        assert nbytes(model) == whole - matrices + left


@pytest.mark.parametrize("storage", ["cpu", "fp8"])
def test_training_learns_and_goes_on(monkeypatch, tiny, tmp_path, storage):
    same = {"--backbone": tiny, **RUN, **CALM, "--base-storage": storage}
    run(monkeypatch, train, same | {"--out": tmp_path / "a", "--steps": 4})
    run(monkeypatch, train, same | {"--out": tmp_path / "b", "--steps": 2})
    run(monkeypatch, train, same | {"--out": tmp_path / "b", "--steps": 4, "--resume": ""})
    assert_same(tmp_path / "a", tmp_path / "b", 4)
    run(monkeypatch, train, same | {"--out": tmp_path / "c", "--steps": 4, "--base-storage": "device"})
    if storage == "cpu":  # a matrix mapped from the file lies elsewhere in a cache line: products round apart
        assert_close(tmp_path / "a", tmp_path / "c", 4)
    else:  # rounding the base is a small change of what its LoRA sees
        for (*_, mine, _), (*_, its, _) in zip(losses(tmp_path / "a"), losses(tmp_path / "c"), strict=True):
            assert mine == pytest.approx(its, rel=0.02) and mine != its


def test_it_is_one_place_or_the_other(monkeypatch, tiny, tmp_path):
    options = {"--backbone": tiny, **RUN, "--out": tmp_path, "--base-storage": "fp8", "--shard": ""}
    with pytest.raises(ValueError, match="choose one"):
        run(monkeypatch, train, options)
