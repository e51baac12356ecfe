"""LoRA beside peft, and adapters that go to stock diffusers and come back."""

import json
from functools import partial

import pytest
import torch
from safetensors import safe_open
from torch import nn

import weights
from benchmarks.models import TARGETS
from helpers import build, load_dit, random_inputs, relative_error, stock_predict
from sdv.lora import (
    LinearSum,
    act_on_reference,
    acts_on,
    adapt,
    add_lora,
    lora_modules,
    lora_parameters,
    merge,
    round_lora,
)
from sdv.models.wan_dit import WanDiT
from sdv.objectives import Pair, denoising_loss, draws_of
from sdv.schedule import VPrediction
from sdv.seeds import generator


def with_random_lora(folder, rank=4, alpha=2.0):
    dit = load_dit(folder)
    add_lora(dit, rank, alpha, dit.lora_targets)
    torch.manual_seed(5)
    for parameter in lora_parameters(dit).values():
        parameter.data = 0.2 * torch.randn_like(parameter)
    return dit


@pytest.mark.parametrize("learns", [True, False])
def test_gradients_of_the_sum_are_those_of_finite_differences(learns):
    torch.manual_seed(0)
    shapes = (5, 6), (4, 6), (4,), (3, 6), (4, 3)
    x, w, bias, a, b = (torch.randn(*shape, dtype=torch.float64) for shape in shapes)
    found = LinearSum.apply(x, w, bias, a, b, 0.5)
    assert torch.allclose(found, x @ w.T + bias + 0.5 * x @ a.T @ b.T, rtol=0, atol=1e-14)
    inputs = [tensor.requires_grad_() for tensor in ((x, a, b) if learns else (a, b))]
    assert torch.autograd.gradcheck(lambda *_: LinearSum.apply(x, w, bias, a, b, 0.5), inputs)


@torch.no_grad()
def test_an_adapter_that_diffusers_wrote_gives_the_same_prediction(stock_dit, tmp_path):
    peft = pytest.importorskip("peft")
    from diffusers import CogVideoXPipeline
    from diffusers.training_utils import _collate_lora_metadata

    stock, folder = stock_dit
    stock.add_adapter(
        peft.LoraConfig(r=4, lora_alpha=2, target_modules=TARGETS["cogvideox"], init_lora_weights=False)
    )
    layers = peft.get_peft_model_state_dict(stock)
    metadata = _collate_lora_metadata({"transformer": stock})
    CogVideoXPipeline.save_lora_weights(tmp_path / "out", transformer_lora_layers=layers, **metadata)
    dit, inputs = load_dit(folder), random_inputs()
    line = weights.load_adapter(dit, tmp_path / "out" / "pytorch_lora_weights.safetensors")
    assert "alpha 2 (from the file), scale 0.5" in line
    assert relative_error(dit(*inputs), stock_predict(stock, *inputs)) <= 1e-5


@pytest.mark.parametrize("frames", [1, 3], ids=["identity", "motion"])
def test_loss_and_lora_gradients_of_a_step_equal_diffusers_and_peft(stock_dit, tmp_path, frames):
    peft = pytest.importorskip("peft")
    diffusers = pytest.importorskip("diffusers")
    stock, folder = stock_dit
    dit = with_random_lora(folder)
    stock.add_adapter(peft.LoraConfig(r=4, lora_alpha=2, target_modules=TARGETS["cogvideox"]))
    weights.save_adapter(dit, tmp_path / "adapter.safetensors")
    with safe_open(tmp_path / "adapter.safetensors", "pt") as file:
        ours_in_their_names = {k.removeprefix("transformer."): file.get_tensor(k) for k in file.keys()}
    peft.set_peft_model_state_dict(stock, ours_in_their_names)

    target, _, text, ref = random_inputs(frames=frames)
    keys = [(3, k) for k in range(len(target))]
    loss = denoising_loss(dit, VPrediction(), Pair(target, ref, text), draws_of((3,), keys))
    loss.value.backward()

    # The same step in the library's words: its scheduler's noise and velocity, the draws repeated.
    rngs = [generator(*key) for key in keys]
    t = torch.stack([torch.randint(1000, (), generator=rng) for rng in rngs])
    noise = torch.stack([torch.randn(target.shape[1:], generator=rng) for rng in rngs])
    scheduler = diffusers.CogVideoXDDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction",
        rescale_betas_zero_snr=True, snr_shift_scale=1.0, timestep_spacing="trailing",
    )  # fmt: skip
    pred = stock_predict(stock, scheduler.add_noise(target, noise, t), t, text, ref)
    stock_loss = torch.nn.functional.mse_loss(pred, scheduler.get_velocity(target, noise, t))
    stock_loss.backward()

    assert abs(loss.value.item() / stock_loss.item() - 1) <= 1e-5
    theirs = {name: p.grad for name, p in stock.named_parameters() if p.grad is not None}
    for path, module in lora_modules(dit).items():
        stem = weights.tensors.rename(f"{path}.weight", weights.tensors.reverse(weights.cogvideox.DIT_NAMES))
        for leaf in ("lora_A", "lora_B"):
            name = f"{stem.removesuffix('.weight')}.{leaf}.default.weight"
            assert relative_error(getattr(module, leaf).grad, theirs[name]) <= 1e-4, name
    assert len(theirs) == 2 * len(lora_modules(dit))


@torch.no_grad()
def test_merge_gives_the_same_prediction(stock_dit):
    _, folder = stock_dit
    dit, inputs = with_random_lora(folder), random_inputs()
    adapted = dit(*inputs)
    merge(dit)
    merge(dit)  # a second time does nothing
    assert relative_error(dit(*inputs), adapted) <= 1e-5
    assert not any("lora" in name for name, _ in dit.named_parameters())  # its memory is free


@torch.no_grad()
def test_a_fresh_lora_changes_nothing_and_freezes_the_base(stock_dit):
    _, folder = stock_dit
    dit, inputs = load_dit(folder), random_inputs()
    before = dit(*inputs)
    add_lora(dit, 4, 4.0, dit.lora_targets)
    assert torch.equal(dit(*inputs), before)
    assert {name for name, p in dit.named_parameters() if p.requires_grad} == set(lora_parameters(dit))


def test_adapters_that_do_not_fit_are_refused_with_the_file_and_the_reason(stock_dit, tmp_path):
    _, folder = stock_dit
    good = tmp_path / "good.safetensors"
    weights.save_adapter(with_random_lora(folder), good)
    with safe_open(good, "pt") as file:
        tensors, metadata = {k: file.get_tensor(k) for k in file.keys()}, file.metadata()

    def refused(name, change, match, text=None):
        changed = change(dict(tensors))
        weights.tensors.save_tensors(tmp_path / name, changed, metadata if text is None else text)
        with pytest.raises(ValueError, match=match) as error:
            weights.load_adapter(load_dit(folder), tmp_path / name)
        assert name in str(error.value)

    key = "transformer.transformer_blocks.0.attn1.to_q.lora_A.weight"
    refused("no-alpha.safetensors", lambda t: t, "--lora-alpha", {"format": "pt"})
    refused(
        "unknown.safetensors", lambda t: t | {"transformer.other.lora_A.weight": torch.ones(4, 4)}, "no layer"
    )
    refused("shape.safetensors", lambda t: t | {key: torch.ones(4, 7)}, "shape")
    refused("half.safetensors", lambda t: {k: v for k, v in t.items() if k != key}, "only one of")
    refused(
        "deep.safetensors", lambda t: {k.replace("blocks.1", "blocks.9"): v for k, v in t.items()}, "deeper"
    )
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(good.read_bytes()[:-100])
    with pytest.raises(ValueError, match="cut short"):
        weights.load_adapter(load_dit(folder), cut)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        weights.load_adapter(load_dit(folder), tmp_path / "nowhere.safetensors")
    assert json.loads(metadata["lora_adapter_metadata"])["transformer.lora_alpha"] == 2.0


def add_update(delta, mask, layer, inputs, output):
    return output + mask * (inputs[0] @ delta.T)


@torch.no_grad()
def test_a_lora_on_the_reference_alone_leaves_all_other_tokens_their_weights(stock_dit, tmp_path):
    stock, folder = stock_dit
    dit, inputs = load_dit(folder), random_inputs()
    add_lora(dit, 4, 2.0, dit.visual_targets)
    act_on_reference(dit)
    for module in lora_modules(dit).values():
        module.lora_B.normal_(std=0.5)
    video, t, text, ref = inputs
    assert torch.equal(dit(video, t, text), load_dit(folder)(video, t, text))
    nothing = torch.empty(0, dtype=torch.long)
    assert relative_error(dit(*inputs, nothing), load_dit(folder)(*inputs, nothing)) == 0

    # The same in stock diffusers: on the reference's rows, which its blocks keep behind the text's, a mask
    # lets the update through. Its feed-forward sees text and pictures in one sequence, as attention does.
    names = weights.tensors.reverse(weights.cogvideox.DIT_NAMES)
    mask = torch.zeros(text.shape[1] + ref[0, 0].numel() // 4 + video[0, 0].numel() // 4, 1)
    mask[text.shape[1] : text.shape[1] + ref[0, 0].numel() // 4] = 1
    for path, module in lora_modules(dit).items():
        layer = stock.get_submodule(weights.tensors.rename(f"{path}.weight", names).removesuffix(".weight"))
        layer.register_forward_hook(partial(add_update, module.delta(), mask))
    truth = stock_predict(stock, *inputs)
    assert relative_error(dit(*inputs), truth) <= 1e-5

    weights.save_adapter(dit, tmp_path / "adapter.safetensors")
    again = load_dit(folder)
    weights.load_adapter(again, tmp_path / "adapter.safetensors")
    assert torch.equal(again(*inputs), dit(*inputs))
    with pytest.raises(ValueError, match="cannot be merged"):
        merge(dit)


def test_a_lora_on_the_reference_alone_refuses_layers_that_see_more(stock_dit):
    dit = load_dit(stock_dit[1])
    add_lora(dit, 4, 2.0, ("mod1", "attn.q"))
    with pytest.raises(ValueError, match="mod1 does not see"):
        act_on_reference(dit)


def test_a_fresh_a_is_drawn_as_in_peft_and_dropout_rests_in_eval_mode():
    peft = pytest.importorskip("peft")
    model, theirs = nn.Sequential(nn.Linear(256, 32)), nn.Sequential(nn.Linear(256, 32))
    stock = peft.get_peft_model(theirs, peft.LoraConfig(r=64, target_modules=["0"]))
    (drawn,) = (p for name, p in stock.named_parameters() if "lora_A" in name)
    (module,) = add_lora(model, 64, 64.0, ("0",)).values()
    assert module.lora_A.abs().max().item() == pytest.approx(
        drawn.abs().max().item(), rel=0.01
    )  # their bound
    module.dropout, x = 0.5, torch.randn(3, 256)
    nn.init.ones_(module.lora_B)
    assert torch.equal(model.eval()(x), model(x)) and not torch.equal(model.train()(x), model(x))


def test_a_convolution_is_that_of_the_merged_weight_and_drops_nothing_in_eval_mode():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, stride=(3, 1), padding=(1, 2)))
    (module,) = add_lora(model, 4, 2.0, ("0",)).values()
    nn.init.normal_(module.lora_B)
    x, whole = torch.randn(2, 3, 9, 8), module.weight + module.delta()
    wanted = nn.functional.conv2d(x, whole, module.bias, (3, 1), (1, 2))
    module.dropout = 0.5
    torch.testing.assert_close(model.eval()(x), wanted)
    assert relative_error(model.train()(x), wanted) > 0.01


def test_a_target_is_whole_words_of_a_path_and_fits_something():
    model = nn.ModuleDict({name: nn.Linear(4, 4) for name in ("q", "to_q")})
    assert list(add_lora(model, 2, 2.0, ("q",))) == ["q"]
    with pytest.raises(ValueError, match="fit no Linear or Conv2d of it: k"):
        add_lora(model, 2, 2.0, ("k", "to_q"))


@pytest.mark.parametrize("tokens", ["all", "ref"])
def test_a_new_lora_is_in_all_targets_of_a_model_or_in_the_visual_ones(tokens):
    dit = build(WanDiT)
    wanted = dit.lora_targets if tokens == "all" else dit.visual_targets
    found = adapt(dit, 2, 2.0, tokens=tokens)
    assert {path.split(".", 2)[2] for path in found} == set(wanted) and acts_on(dit) == tokens


def test_in_a_bf16_model_a_lora_is_fp32_and_its_sum_is_rounded_once():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64)).bfloat16()
    (module,) = add_lora(model, 4, 2.0, ("0",)).values()
    assert module.lora_A.dtype == module.lora_B.dtype == torch.float32
    for half in (module.lora_A, module.lora_B):  # of few bits: fp32 has their products and sums exactly
        half.data = torch.randint(-100, 101, half.shape) / 1024
    exact = module.weight.double() + 0.5 * module.lora_B.double() @ module.lora_A.double()
    merge(model)
    assert torch.equal(module.weight, exact.bfloat16())


@torch.no_grad()
@pytest.mark.parametrize("model", ["tiny", "tiny_wan"])
def test_a_lora_in_the_dtype_of_its_layers_samples_the_same(model, request):
    backbone = weights.load_backbone(request.getfixturevalue(model), "cpu", torch.bfloat16, log=list)
    torch.manual_seed(0)
    modules = adapt(backbone.dit, 4, 4.0).values()
    for half in lora_parameters(backbone.dit).values():
        half.normal_(0, 0.2)
    video = torch.randn(1, *backbone.layout.latent_shape(9, 64, 96)).bfloat16()
    before = backbone.dit(video, torch.tensor([500.0]), text := backbone.text(["a dog"]))
    round_lora(backbone.dit)
    assert all(x.lora_A.dtype == x.lora_B.dtype == x.weight.dtype for x in modules)
    assert torch.equal(backbone.dit(video, torch.tensor([500.0]), text), before)
