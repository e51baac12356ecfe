"""The kernels as a package: what is refused, their machine code, and what is left without Triton."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

pytest.importorskip("triton", exc_type=ImportError)  # operators are only registered where there is one

import kernels
from benchmarks import host
from kernels import dispatch

ROOT = Path(__file__).parent.parent


def python(*command: str) -> str:
    """What another Python prints, in which Triton compiles instead of interpreting; it has to succeed."""
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return done.stdout


def test_mistakes_are_named():
    q, x, m = torch.randn(1, 2, 8, 32), torch.randn(1, 8, 64), torch.randn(1, 2, 64)
    cos, sin = torch.randn(2, 9, 16)
    for message, call in {
        "k and v differ": lambda: kernels.attention(q, q, q[:, :, :4]),
        "dtypes differ": lambda: kernels.attention(q, q.half(), q.half()),
        "want the same B, H, K": lambda: kernels.attention(q, q[:, :1], q[:, :1]),
        "not positive: negate q": lambda: kernels.attention(q, q, q, -1.0),
        "turn more tokens": lambda: kernels.rope(q, cos, sin),
        r"weight \(64,\): want \(32,\)": lambda: kernels.layernorm_rope(q, x[0, 0], x[0, 0], cos, sin),
        "both cos and sin": lambda: kernels.rmsnorm_rope(q, x[0, 0], cos[:8]),
        "2 modulations for 8 tokens": lambda: kernels.adaln(x, m, m),
        "do not sum to the 8": lambda: kernels.adaln(x, m, m, segments=(3, 4)),
        r"scale \(1, 2, 64\): want": lambda: kernels.adaln(x, m, m, segments=(3, 3, 2)),
        "and y .* differ": lambda: kernels.gated_residual(x, x.half(), m, segments=(4, 4)),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()


def test_machine_code():
    """A sample of the lint: bf16, all kernels for sm_90, attention for the other chips. Needs no GPU."""
    rows = python("-m", "kernels.bench", "--lint", "--sample")
    assert rows.count("kernel=hopper.forward") == 2


def test_tiles_can_be_tuned():
    python("-m", "kernels.tune", "--dry")


def test_the_bench_tells_all_of_everybody(monkeypatch, capsys, tmp_path):
    """Dry. Torch plays FlashAttention: 3 without a backward, 4 with more than one output."""
    from kernels import bench

    def flash(q, k, v):  # (B, L, H, K)
        return torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))

    def three(q, k, v):
        return flash(q, k, v).transpose(1, 2).detach()

    def four(q, k, v):
        return flash(q, k, v).transpose(1, 2), None

    monkeypatch.setitem(sys.modules, "fa3_fwd_interface", SimpleNamespace(flash_attn_func=three))
    monkeypatch.setitem(sys.modules, "flash_attn.cute", SimpleNamespace(flash_attn_func=four))
    torch.manual_seed(0)
    bench.bench(0, tmp_path)
    lines = capsys.readouterr().out.splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")][1:]
    assert all(float(row[-1]) < 1e-2 for row in rows)  # bf16, beside float64
    of = {name: {(who, mode) for n, mode, who, *_ in rows if n == name} for name, *_ in rows}
    both = {"forward", "backward"}
    flashes = {("FlashAttention 4", mode) for mode in both} | {("FlashAttention 3", "forward")}
    for name, found in of.items():
        peers = ("sdpa",) if name.startswith("attention") else ("torch", "torch.compile")
        expected = {(who, mode) for who in ("sdv", *peers) for mode in both}
        assert found == expected | (flashes if name.startswith("attention") else set())
    assert {"attention, CogVideoX identity", "attention, Wan cross", "AdaLN, CogVideoX"} <= set(of) and len(
        of
    ) == 10
    assert sum("FlashAttention 3: not run: " in line for line in lines) == 4


# ---- a call as the host makes it, with a recorder in the launcher's place ----------------------------------


def launches(call, inputs) -> tuple[list, list]:
    """What forward and backward would launch on sm_90, and the gradients' shapes."""
    seen = []
    with dispatch.pretend(90, lambda kernel, args, meta: seen.append((kernel, form(args), meta))):
        out = call(*inputs)
        out = out if isinstance(out, tuple) else (out,)
        leaves = [x for x in inputs if x.requires_grad]
        grads = torch.autograd.grad(out, leaves, [torch.ones_like(o) for o in out])
    return seen, [(g.shape, g.dtype) for g in grads]


def form(x):
    """An argument of a kernel without its numbers and its address."""
    if isinstance(x, tuple):
        return tuple(map(form, x))
    if isinstance(x, torch.Tensor):
        return x.shape, x.stride(), x.dtype
    return (form(x.base), x.shape, x.strides, x.block_shape) if hasattr(x, "block_shape") else x


@pytest.mark.parametrize("name", kernels.__all__)
def test_who_watches_sees_operators_and_nothing_else_changes(name):
    call, inputs, _ = host.operators()[name]
    inputs = [x.detach().requires_grad_(x.dtype == torch.bfloat16) for x in inputs]
    plain, twice = launches(call, inputs), launches(call, inputs)
    assert plain == twice and len(plain[0]) == (3 if name == "attention" else 2)

    class Watch(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.seen = []

        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            self.seen.append(op.namespace)
            return op(*args, **(kwargs or {}))

    with Watch() as watch:
        assert launches(call, inputs) == plain
    assert watch.seen.count("sdv") == 2
    with torch.profiler.profile() as profile:
        launches(call, inputs)
    assert not any(event.name.startswith("sdv::") for event in profile.events())


@pytest.mark.parametrize("name", kernels.__all__)
def test_fake_tensors_and_export(name):
    call, inputs, _ = host.operators()[name]
    with dispatch.pretend(90, lambda *launch: pytest.fail("launched")):
        with FakeTensorMode() as mode:
            out = call(*map(mode.from_tensor, inputs))
        program = torch.export.export(Calls(call), tuple(inputs))
    assert (out[0] if isinstance(out, tuple) else out).shape == inputs[0].shape
    assert any("sdv" in str(node.target) for node in program.graph.nodes)


class Calls(torch.nn.Module):
    def __init__(self, f):
        super().__init__()
        self.f = f

    def forward(self, *inputs):
        return self.f(*inputs)


@pytest.mark.parametrize(("keep", "forwards"), ((False, 2), (True, 1)))
def test_checkpoints_recompute_what_is_not_kept(keep, forwards):
    """Selective checkpointing of torch is one of those who watch: it can keep what attention returned."""
    kept = partial(create_selective_checkpoint_contexts, [torch.ops.sdv.attention.default])
    q = torch.randn(1, 1, 4, 16, requires_grad=True)
    seen = []
    with dispatch.pretend(90, lambda kernel, args, meta: seen.append(kernel.__name__)):
        options = {"context_fn": kept} if keep else {}
        out = checkpoint(lambda q: kernels.attention(q, q, q).sin(), q, use_reentrant=False, **options)
        out.sum().backward()
    assert seen.count("_forward_kernel") == forwards and seen.count("_dq_kernel") == 1


def test_nobody_differentiates_twice():
    q = torch.randn(1, 1, 4, 16, requires_grad=True)
    with dispatch.pretend(90, lambda *launch: None):
        (grad,) = torch.autograd.grad(kernels.attention(q, q, q).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        grad.sum().backward()


def test_the_host_benchmark_times_both_ways_of_every_operator():
    """How much they differ is in benchmarks/host.csv: a test on a busy machine cannot say."""
    rows = list(host.results(rounds=2))
    assert len(rows) == 24 and all(float(row[i]) > 0 for row in rows for i in (3, 4))


def test_without_triton():
    python(
        "-c",
        """import sys; sys.modules["triton"] = None
import kernels, torch
q = torch.randn(1, 1, 4, 16); assert kernels.attention(q, q, q).shape == q.shape""",
    )
