"""How the micro-world's base is made: optimisers beside torch's, whitening, runs that are stopped."""

import shutil
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from helpers import relative_error
from microworld import pretrain
from microworld.learner import Learner, Recipe
from microworld.pretrain import Config
from sdv.models.cogvideox_vae import SpatialNorm
from weights import load_backbone, open_backbone


def test_a_step_is_that_of_torchs_muon_and_adam():
    torch.manual_seed(0)
    parts = {"matrix": nn.Linear(32, 32), "filter": nn.Conv2d(16, 48, 3), "table": nn.Embedding(32, 32)}
    module = nn.ModuleDict(parts)
    start = {name: p.detach().clone() for name, p in module.named_parameters()}
    slopes = {name: (torch.randn_like(p) / 100).bfloat16() for name, p in start.items()}  # of a linear loss
    learner = Learner(module, Recipe(400, 0.02, hold=0.5, average=0.9, by_adamw=("table",)))
    for learner.step in range(3):
        learner.pace()
        learner.learn(sum((p * slopes[name]).sum() for name, p in module.named_parameters()))

    theirs = {name: nn.Parameter(p.flatten(min(1, p.ndim - 1)).clone()) for name, p in start.items()}
    by_muon = [theirs[name] for name in ("matrix.weight", "filter.weight")]
    optimisers = (
        torch.optim.Muon(by_muon, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.Adam(
            [p for p in theirs.values() if p.ndim == 1] + [theirs["table.weight"]], betas=(0.9, 0.98)
        ),
    )
    for step in range(3):
        for name, p in theirs.items():
            p.grad = slopes[name].float().view_as(p)
        nn.utils.clip_grad_norm_(theirs.values(), 1.0)
        for optimiser in optimisers:
            optimiser.param_groups[0]["lr"] = 0.02 * (step + 1) / 200
            optimiser.step()
    for (name, want), got in zip(theirs.items(), learner.state["master"], strict=True):
        before, muons = start[name].view_as(want), name in ("matrix.weight", "filter.weight")
        bound = 5e-2 if muons else 1e-3  # five products of bf16, in another order
        assert relative_error(got.view_as(want) - before, want.detach() - before) <= bound, name


def test_the_rate_holds_and_falls_to_nothing_and_the_mean_follows():
    module = nn.Linear(4, 4)
    learner = Learner(module, Recipe(1000, 1.0, hold=0.5, average=0.99))
    rates = []
    for learner.step in (0, 199, 500, 750, 999):
        learner.pace()
        rates.append(learner.rate.item())
    assert rates == pytest.approx([1 / 200, 1, 1, 0.5, 0.002])
    assert learner.gain.item() == pytest.approx(0.01)


@torch.no_grad()
def test_whitened_latents_have_mean_0_and_deviation_1_and_say_the_same_to_the_decoder():
    old, new = (load_backbone(pretrain.TOY, parts=("vae",), log=lambda line: None).vae for _ in range(2))
    for vae in (old, new):  # the shipped one is white already
        vae.encoder.conv_out.weight[:16] *= 3
        vae.encoder.conv_out.bias[:16] += torch.arange(16.0)
    frames = torch.rand(6, 3, 1, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    pretrain.whiten(new, frames)
    (before, spread), (white, white_spread) = old.posterior(frames), new.posterior(frames)
    every = (0, 2, 3, 4)  # dimensions but the channels
    assert white.mean(every).abs().max() <= 1e-4
    assert (white.std(every) - 1).abs().max() <= 1e-4
    size = before.std(every, keepdim=True)
    assert relative_error(white, (before - before.mean(every, keepdim=True)) / size) <= 1e-4
    assert relative_error(white_spread, spread - 2 * size.log()) <= 1e-4
    norms = [[norm for norm in vae.modules() if isinstance(norm, SpatialNorm)] for vae in (old, new)]
    before, white = (z.permute(2, 0, 3, 4, 1) for z in (before, white))  # (T, B, h, w, C)
    for mine, other in zip(*norms, strict=True):
        assert relative_error(other.scale(white), mine.scale(before)) <= 1e-4
        assert relative_error(other.shift(white), mine.shift(before)) <= 1e-4


SMALL = {"clips": 6, "pictures": 12, "threads": 1, "device": "cpu", "save_every": 2}


def begun(folder: Path, family: str = "cogvideox") -> Path:
    """A base of the full sizes with its VAE trained for a moment."""
    whiten = [("whiten", 2, 4)] * (family == "cogvideox")
    for stage, steps, batch in (("new", 0, 0), ("vae", 2, 4), *whiten, ("latents", 0, 0)):
        cfg = Config(stage, steps, batch, out=str(folder / "out"), family=family, **SMALL)
        (folder / "out").mkdir(exist_ok=True)
        pretrain.STAGES[stage](cfg)
    return folder


@pytest.fixture
def base(tmp_path, monkeypatch):
    """In a folder of its own."""
    monkeypatch.setattr(pretrain, "home", lambda cfg: tmp_path / "toy")
    return begun(tmp_path)


def test_a_base_that_was_there_is_kept(base, monkeypatch, tmp_path):
    """By the stage that begins anew; and the next time that is refused."""
    whole = {file.name: file.read_bytes() for file in (base / "toy/vae").iterdir()}
    again = Config("new", out=str(tmp_path / "again"), **SMALL)
    Path(again.out).mkdir()
    pretrain.begin(again)
    kept = Path(again.out) / "before" / "vae"
    assert {file.name: file.read_bytes() for file in kept.iterdir()} == whole
    assert not list((base / "toy").glob("*/*.safetensors"))
    shutil.copytree(kept, base / "toy/vae", dirs_exist_ok=True)
    with pytest.raises(FileExistsError, match="before: keeps a base already"):
        pretrain.begin(again)


class NothingIsReadBack(TorchDispatchMode):
    """On a GPU, an operator that needs a tensor's numbers waits for them: a graph cannot be captured."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function._overloadpacket not in {
            torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.equal,
            torch.ops.aten.masked_select, torch.ops.aten._unique2,
        }, function  # fmt: skip
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("family", ["cogvideox", "wan"])
def test_a_step_reads_no_number_back_so_that_it_can_be_one_graph(family, tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "home", lambda cfg: tmp_path / "toy")
    kinds = set()

    def run(learner, file, draw, loss_of, *_, **__):
        for step in (2, 3):
            kind, inputs = draw(step)
            learner.pace()
            with NothingIsReadBack():
                learner.learn(loss_of(inputs))
            kinds.add(kind)

    begun(tmp_path, family)
    monkeypatch.setattr(pretrain, "run", run)
    pretrain.train_dit(Config("dit", 6, 2, out=str(tmp_path / "out"), family=family, **SMALL))
    assert kinds == {"clips", "pictures"}


def test_a_run_that_was_stopped_goes_on_bit_for_bit(base, monkeypatch):
    latents = torch.load(base / "out/clips.latents.pt")
    assert latents.shape == (6, 16, 17, 8, 8) and 0.9 < latents.float().std() < 1.1
    cfg = Config("dit", 6, 2, out=str(base / "out"), **SMALL)
    pretrain.train_dit(cfg)
    whole = torch.load(base / "out/dit.pt")
    for file in (*base.glob("out/dit.*"), *base.glob("toy/t*/*.safetensors")):
        file.unlink()

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(pretrain, "save_part", stop)
    with pytest.raises(KeyboardInterrupt):
        pretrain.train_dit(cfg)
    monkeypatch.undo()
    monkeypatch.setattr(pretrain, "home", lambda cfg: base / "toy")
    assert torch.load(base / "out/dit.pt")["step"] == 2
    pretrain.train_dit(cfg)
    again = torch.load(base / "out/dit.pt")
    assert again["step"] == whole["step"] == 6
    for name in ("master", "mean", "moment", "square"):
        assert all(a.equal(b) for a, b in zip(again[name], whole[name], strict=True)), name
    assert load_backbone(base / "toy", log=lambda line: None).dit.cfg.heads == 6
    assert open_backbone(base / "toy").schedule == open_backbone(pretrain.TOY).schedule
