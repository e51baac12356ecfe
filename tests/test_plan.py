"""The plan beside real steps: torch's CPU allocator, its saved-tensor hooks and its FLOP counter."""

import dataclasses
import gc
import json
import math
import shutil
import statistics
import sys
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import profile
from torch.utils import flop_counter
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import train
import weights
from benchmarks import models
from helpers import ROOT
from sdv.lora import LoRA, LoRALinear, add_lora, lora_parameters
from sdv.models.cogvideox_dit import CogVideoXDiT
from sdv.run import plan
from sdv.run.base_storage import hold
from sdv.run.cost import Settings, build, count, rehearse

PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm")
# What torch's counter does not know: a sum in place, and fused attention on a CPU.
ADDED = {torch.ops.aten.addmm_: lambda _, a, b, **more: 2 * math.prod(a) * b[1]}
FUSED = ADDED | {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *rest, **more: (
        flop_counter.sdpa_flop_count(q, k, v)
    ),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda do, q, k, v, *rest, **more: (
        flop_counter.sdpa_backward_flop_count(do, q, k, v)
    ),
}
SMALL = train.Config(
    frames=9, height=64, width=96, rank=4, identity_batch=2, device="cpu", dtype="float32", cache="there"
)
GENERATOR = 5056  # bytes of a CPU generator's state, which torch keeps for every recomputed block
BACKBONES = pytest.mark.parametrize("backbone", ["tiny", "tiny_wan"])


@pytest.fixture
def layout(backbone, request):
    return weights.open_backbone(request.getfixturevalue(backbone))


class Step:
    """A real step of a small model on the CPU: its transformer, and its inputs made anew."""

    def __init__(self, cfg: train.Config, layout: weights.Layout):
        torch.manual_seed(0)
        self.dit, self.cfg, self.layout = layout.parts["dit"].build(), cfg, layout
        self.dtype = getattr(torch, cfg.dtype)
        exact = set(getattr(self.dit, "in_float32", ()))
        for path, parameter in self.dit.named_parameters():
            parameter.data = parameter.to(torch.float32 if exact & set(path.split(".")) else self.dtype)
        add_lora(self.dit, cfg.rank, cfg.alpha, self.dit.lora_targets)
        hold(self.dit, cfg.base_storage, "cpu")
        self.dit.recompute, self.dit.keep_attention = cfg.recompute, cfg.keep_attention
        for parameter in lora_parameters(self.dit).values():
            parameter.grad = torch.zeros_like(parameter)

    def forward(self) -> tuple[torch.Tensor, ...]:
        """The motion step's loss, and all that is alive beside what autograd keeps."""
        video = torch.randn(1, self.layout.channels, 3, *self.sides, dtype=self.dtype)
        ref, target = video[:, :, :1].clone(), video.float()
        text = torch.randn(1, self.layout.text_tokens, self.dit.cfg.text_dim, dtype=self.dtype)
        pred = self.dit(video, torch.zeros(1, dtype=torch.long), text, ref)
        return (pred.float() - target).square().mean(), video, ref, target, text, pred

    @property
    def sides(self) -> tuple[int, int]:
        return self.cfg.height // self.layout.spatial_ratio, self.cfg.width // self.layout.spatial_ratio


def kept_bytes(step: Step) -> int:
    """Storages that autograd saved, inputs of recomputed blocks, tensors of the loop; no parameters."""
    kept = []
    hooks = [
        block.register_forward_pre_hook(lambda _, args: kept.extend(tree_leaves(args)))
        for block in step.dit.blocks[: round(step.cfg.recompute * len(step.dit.blocks))]
    ]
    with saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        kept += step.forward()
    for hook in hooks:
        hook.remove()
    storages = [x.untyped_storage() for x in kept if isinstance(x, torch.Tensor)]
    sizes = {storage._cdata: storage.nbytes() for storage in storages}
    own = {p.untyped_storage()._cdata for p in step.dit.parameters()}
    return sum(size for address, size in sizes.items() if address not in own)


def allocated(work: Callable[[], object]) -> tuple[int, int]:
    """Bytes that torch's allocator gave out for what work returns, and most at once meanwhile.

    What a matrix product of the CPU takes for itself, and gives back before it is done, is left out.
    Python's collector waits meanwhile: tensors of earlier tests, freed by it, would count as given back.
    """
    gc.disable()
    try:
        with profile(profile_memory=True) as profiler:
            _alive = work()
    finally:
        gc.enable()
    events = sorted(profiler.profiler.kineto_results.events(), key=lambda e: e.start_ns())
    products = [(e.start_ns(), e.start_ns() + e.duration_ns()) for e in events if e.name() in PRODUCTS]
    memory = [e for e in events if e.name() == "[memory]"]
    now = peak = 0
    for event, then in zip(memory, [*memory[1:], None], strict=True):
        now += event.nbytes()
        given_back = then is not None and then.nbytes() == -event.nbytes()
        if not given_back or all(event.start_ns() < a or b < then.start_ns() for a, b in products):
            peak = max(peak, now)
    return now, peak


def allocator_peak(step: Step) -> int:
    """Most bytes that torch's allocator gave out at once during a step."""

    def work() -> None:
        loss, *_alive = step.forward()
        loss.backward()

    return allocated(work)[1]


@BACKBONES
@pytest.mark.parametrize(
    ("dtype", "storage"),
    [("float32", "device"), ("bfloat16", "device"), ("float32", "fp8"), ("bfloat16", "cpu")],
)
def test_bytes_are_what_torch_saves_and_allocates(layout, dtype, storage):
    for share in (0.0, 1.0, 0.5):
        cfg = dataclasses.replace(SMALL, recompute=share, dtype=dtype, base_storage=storage)
        found, step = rehearse(cfg, layout, "motion", 2), Step(cfg, layout)
        step.forward()[0].backward()  # what is made once: tables, caches
        states = GENERATOR * (2 * share + 1) if share else 0  # one more while a block runs again
        assert found.kept == kept_bytes(step), share
        assert 0 <= allocator_peak(step) - found.peak <= states, share


@BACKBONES
@pytest.mark.parametrize("share", [1.0, 0.5])
def test_what_attention_returned_may_stay(layout, share):
    """Beside torch's allocator, whose bytes are there after forward, and its FLOP counter."""
    cfg = dataclasses.replace(SMALL, recompute=share, keep_attention=True)
    step = Step(cfg, layout)
    step.forward()[0].backward()
    found, states = rehearse(cfg, layout, "motion", 2), GENERATOR * 2 * share
    assert 0 <= allocated(step.forward)[0] - found.kept <= states
    assert 0 <= allocator_peak(step) - found.peak <= states
    with FlopCounterMode(display=False, custom_mapping=FUSED) as counter:
        step.forward()[0].backward()
    assert found.flops.total() == counter.get_total_flops()

    text = layout.text_tokens if isinstance(step.dit, CogVideoXDiT) else 0  # Wan sees it in another attention
    tokens = 4 * step.sides[0] * step.sides[1] // layout.patch**2 + text
    for device in ("cpu", "cuda"):  # torch's attention, and the kernel here
        there = dataclasses.replace(cfg, device=device)
        few = rehearse(there, layout, "motion", 2).flops
        all_of_it = rehearse(dataclasses.replace(there, keep_attention=False), layout, "motion", 2).flops
        all_of_it["recompute", "attention"] -= 4 * tokens**2 * step.dit.cfg.dim * 2 * share
        assert few == all_of_it  # a Counter: what is not there is 0


@BACKBONES
def test_flops_are_what_torch_counts_where_attention_is_plain_products(layout):
    cfg = dataclasses.replace(SMALL, recompute=0.5)  # of two blocks, one runs again
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False, custom_mapping=ADDED) as counter:
        Step(cfg, layout).forward()[0].backward()
    flops = rehearse(cfg, layout, "motion", 2).flops
    scores_again = flops["backward", "attention"] / 5  # fused attention does not keep them: 5 products for 4
    assert flops.total() - scores_again == counter.get_total_flops()


@pytest.mark.parametrize(("share", "device"), [(0.0, "cuda"), (1.0, "cpu"), (0.5, "cuda"), (0.8, "cuda")])
@pytest.mark.parametrize("backbone", ["tiny_wan"])
def test_many_blocks_follow_from_a_few(layout, share, device):
    part = layout.parts["dit"]
    layout.parts["dit"] = part._replace(build=lambda: deeper(part.build(), 6))
    cfg = dataclasses.replace(SMALL, recompute=share, device=device)
    assert count(cfg, layout, "motion", 6) == rehearse(cfg, layout, "motion", 6)


def deeper(dit: torch.nn.Module, layers: int) -> torch.nn.Module:
    return type(dit)(dataclasses.replace(dit.cfg, layers=layers))


@pytest.mark.parametrize("backbone", ["tiny"])
def test_the_kernels_of_a_gpu_keep_no_copies_in_float32(layout):
    cfg = dataclasses.replace(SMALL, recompute=0.0, dtype="bfloat16")
    cpu, gpu = (
        rehearse(dataclasses.replace(cfg, device=device), layout, "motion", 2) for device in ("cpu", "cuda")
    )
    assert gpu.kept < cpu.kept and gpu.peak < cpu.peak
    assert gpu.flops["backward", "attention"] == cpu.flops["backward", "attention"] * 7 / 5
    assert gpu.flops["backward", "matrices"] == cpu.flops["backward", "matrices"]


def test_an_h100_by_table_is_the_one_that_was_measured(monkeypatch, tmp_path):
    """Two training steps, which its shares are made of, and the two of --keep-attention, which they are not.

    For a step of sampling, which has no LoRA apart, the shares are too small: by as much as plan.py says.
    The commits that were measured added a LoRA's update by an operation of its own.
    """
    monkeypatch.setattr(LoRALinear, "forward", LoRA.forward)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    lines = (ROOT / "benchmarks/nvidia-h100-80gb-hbm3/fullsize.jsonl").read_text().splitlines()
    found = [row for row in map(json.loads, lines) if row["commit"] in ("778f133", "cef556c")]
    layout, _ = models.open_model("cogvideox", tmp_path)
    step = Settings(layout.frames, layout.height, layout.width, "cuda")
    reached, timed = plan.speed(step, layout), Counter()
    for row in found:
        if row["part"] == "steps" and row["who"] in ("sdv", "sdv --keep-attention") and "seconds" in row:
            then = dataclasses.replace(step, keep_attention=row["who"] != "sdv")
            said = plan.predict(then, layout, row["what"].split()[1], 1)
            assert 0.985 < said.peak / 1e9 / row["gigabytes"] < 1
            assert reached.seconds(said.flops) == pytest.approx(statistics.median(row["seconds"]), rel=0.01)
            timed[row["who"]] += 1
    assert timed == {"sdv": 4, "sdv --keep-attention": 2}

    step = dataclasses.replace(step, motion_batch=2)
    flops = plan.predict(step, layout, "motion", 1).flops
    forward = Counter({key: n for key, n in flops.items() if key[0] == "forward"})
    twice = plan.predict(dataclasses.replace(step, rank=2 * step.rank), layout, "motion", 1).flops
    forward["forward", "matrices"] -= twice["forward", "matrices"] - flops["forward", "matrices"]
    case = "cogvideox, with a reference", "sdv"
    (sampling,) = (row["seconds"] for row in found if (row["what"], row["who"]) == case)
    assert 1.13 < reached.seconds(forward) / statistics.median(sampling) < 1.15


def test_both_tasks_in_a_step_take_the_time_of_both():
    cfg = train.Config(p_video=0.25, accumulate=3)
    found = {"identity": plan.Prediction([], 0, Counter({("forward", "matrices"): 8})),
             "motion": plan.Prediction([], 0, Counter({("forward", "matrices"): 16}))}  # fmt: skip
    pace = plan.Speed(1, 1, 1, "")
    assert plan.step_seconds(cfg, found, pace) == 3 * (0.75 * 8 + 0.25 * 16)
    both = dataclasses.replace(cfg, pcgrad="exact")
    assert plan.step_seconds(both, found, pace) == 3 * (8 + 16)


@pytest.mark.parametrize("backbone", ["tiny"])
def test_whose_speed_it_is_is_said(monkeypatch, layout):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cfg = dataclasses.replace(SMALL, device="cuda", dtype="bfloat16")
    now = {"identity": plan.predict(cfg, layout, "identity", 1)}
    said = plan.timing(cfg, now, plan.speed(cfg, layout))
    assert "on an NVIDIA H100 80GB HBM3, measured on 2026-11-26" in said[-1]
    exact = dataclasses.replace(cfg, dtype="float32")
    assert plan.speed(exact, layout) is None and "only bf16" in plan.timing(exact, now, None)[0]


def test_parameters_of_the_5b_model_are_exact(tmp_path):
    layout, _ = models.open_model("cogvideox", tmp_path)
    cfg = dataclasses.replace(SMALL, rank=128, dtype="bfloat16", device="cuda")
    parameters = lora_parameters(build(cfg, layout)).values()
    assert sum(p.numel() for p in parameters) == 502_276_096
    memory = plan.predict(cfg, layout, "identity", 1).memory
    assert memory["LoRA, gradients, AdamW"] == 4 * 4 * 502_276_096
    assert memory["frozen transformer"] == 2 * 5_570_283_072

    spread = plan.predict(dataclasses.replace(cfg, shard=True), layout, "identity", 4).memory
    assert spread["LoRA, gradients, AdamW"] == 4 * 502_276_096
    assert spread["gathered from others"] < 0.1 * memory["frozen transformer"]


def test_plan_reads_no_weights_and_writes_nothing(monkeypatch, capsys, tiny, tmp_path):
    folder = tmp_path / "bare"
    shutil.copytree(tiny, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    options = {"--backbone": folder, "--out": tmp_path / "run", "--device": "cpu", "--frames": 9}
    options |= {"--height": 64, "--width": 96, "--rank": 4, "--identity-batch": 2, "--p-video": 0}
    words = [str(word) for option in options.items() for word in option]
    monkeypatch.setattr(sys, "argv", ["train.py", "--plan", *words])
    train.main()
    said = capsys.readouterr().out
    assert not (tmp_path / "run").exists()
    assert "this CPU as it is now" in said and "--cache FOLDER" in said

    peak = {
        line[:54].strip(): line[54:].split()[0]
        for line in said.splitlines()
        if "peak" not in line and " GB, time" in line
    }
    assert float(peak["--keep-attention"]) >= float(peak["as asked"])  # encoding takes more than either
    assert next(float(line.split()[-1]) for line in said.splitlines() if "--keep-attention" in line) < 1
    assert "for a GPU's numbers: --device cuda --dtype bfloat16" in said
    for lever in ("--shard, 8 processes", "--base-storage cpu"):  # the plan does not time copies
        assert next(line for line in said.splitlines() if lever in line).endswith("GB, time not known")
    for lever in ("--cache FOLDER", "--rank 2", "--shard, 8 processes"):
        assert float(peak[lever]) < float(peak["as asked"]), lever


def test_a_plan_offers_what_train_takes_and_halves_what_is_even():
    def offered(**settings) -> list[str]:
        return [name for name, *_ in plan.levers(Settings(9, 64, 96, "cpu", **settings), 1)]

    assert "--identity-batch 2 --motion-batch 1 --accumulate 2" in offered(identity_batch=4, motion_batch=2)
    assert not any("batch" in name for name in offered(identity_batch=3, motion_batch=1))
    assert any(name.endswith("twice the clips") for name in offered(identity_batch=4, motion_batch=3))
    assert any("--shard" in name for name in offered()) and not any(
        "--shard" in name for name in offered(base_storage="fp8")
    )
