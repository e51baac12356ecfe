"""The Hopper attention without a Hopper: played in torch, bugs planted and found, launches, machine code."""

import math
import warnings
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import gluon_model as model
import pytest
import torch

pytest.importorskip("triton", exc_type=ImportError)

from kernels import dispatch, hopper, lint

attention = import_module("kernels.attention")

SOURCE = Path(__file__).parent.parent / "kernels" / "hopper.py"


class Case(NamedTuple):
    B: int
    H: int
    Lq: int
    Lk: int
    K: int
    layout: str
    scale: float
    dtype: torch.dtype = torch.float32


CASES = (
    Case(2, 2, 200, 300, 64, "linear", 0.125),  # ragged; two programs and three blocks a head
    Case(2, 1, 70, 5, 64, "fused", 4.0),  # scores far past what exp alone could take
    Case(1, 1, 1, 1, 64, "linear", 0.125),
    Case(2, 2, 192, 256, 128, "heads", 0.09),  # nothing ragged
    Case(2, 1, 193, 769, 128, "fused", 0.09),
    Case(2, 1, 77, 130, 64, "linear", 0.125, torch.float16),
    Case(2, 1, 77, 130, 128, "linear", 0.09, torch.bfloat16),
)


def tensor(case: Case, L: int) -> torch.Tensor:
    """(B, H, L, K) as callers hold it, with NaN behind the end of every sample."""
    if case.layout == "heads":
        x = torch.full((case.B, case.H, L + 200, case.K), torch.nan)[:, :, :L]
    elif case.layout == "fused":  # one of q, k, v of a single linear
        x = torch.full((case.B, L + 200, 3, case.H, case.K), torch.nan)[:, :L, 1].transpose(1, 2)
    else:
        x = torch.full((case.B, L + 200, case.H, case.K), torch.nan)[:, :L].transpose(1, 2)
    return x.copy_(torch.randn(x.shape)).to(case.dtype)


def played(*bugs: tuple[str, str]):
    """kernels/hopper.py acted on this CPU; bugs are pairs of its text and what to put there instead."""
    text = SOURCE.read_text()
    for right, wrong in bugs:
        assert text.count(right) == 1, f"{right!r} is not once in {SOURCE}"
        text = text.replace(right, wrong)
    return model.acted(SOURCE, text)


def check(module, case: Case, mood: model.Mood):
    """Runs module.forward and holds o and lse against float64; raises Fault."""
    torch.manual_seed(0)
    q, k, v = (tensor(case, L) for L in (case.Lq, case.Lk, case.Lk))
    paper = torch.full((case.B, case.Lq + 200, case.H, case.K), torch.nan, dtype=case.dtype)
    module.token_major = lambda _: paper[:, : case.Lq].transpose(1, 2)  # o, with room behind every sample
    model.mood = mood
    o, lse = module.forward(q, k, v, case.scale)
    s = q.double() @ k.double().mT * case.scale
    truth = torch.softmax(s, -1) @ v.double()
    plain = torch.softmax(q @ k.mT * case.scale, -1) @ v  # its error, in the same precision
    for name, x, true, limit in (
        ("o", o, truth, 1e-6 if case.dtype == torch.float32 else 2 * error(plain, truth)),
        ("lse", lse, torch.logsumexp(s, -1) / math.log(2), 1e-6),
    ):
        model.require(error(x, true) <= limit, f"wrong {name}: {error(x, true):.1e}")
    model.require(bool(paper[:, case.Lq :].isnan().all()), "wrote behind the end of a sample")


def error(x: torch.Tensor, true: torch.Tensor) -> float:
    return ((x - true).norm() / true.norm()).item()


@pytest.mark.parametrize("mood", (model.EAGER, model.LAZY), ids=("eager", "lazy"))
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_numbers(case, mood):
    check(played(), case, mood)


WAIT_FULL = "    mbarrier.wait(full.index(place), lap & 1)\n"
WAIT_FREE = "    mbarrier.wait(free.index(place), (lap + 1) & 1)"
FREE_K, FREE_V = ("        _release(kv_ring, 2 * j)\n", "        _release(kv_ring, 2 * j + 1)\n")
SCORES = "        s = finish(0, deps=(s,))\n"
SUMS = "        acc = finish(0, deps=(acc,))\n"
BUGS = {
    "loader waits for the wrong phase": ("deadlock", (WAIT_FREE, WAIT_FREE.replace("(lap + 1)", "lap"))),
    "consumer waits for the wrong phase": ("deadlock", (WAIT_FULL, WAIT_FULL.replace("lap", "(lap + 1)"))),
    "loader does not wait": ("deadlock", (WAIT_FREE, "")),
    "consumer does not wait": ("wrong o", (WAIT_FULL, "")),
    "k free before s is there": ("wrong o", (SCORES + FREE_K, FREE_K + SCORES)),
    "v free before acc is there": ("wrong o", (SUMS + FREE_V, FREE_V + SUMS)),
    "v never free": ("deadlock", (FREE_V, "")),
    "first group frees for all": ("deadlock", ("_ring(k, 2 * STAGES, GROUPS)", "_ring(k, 2 * STAGES, 1)")),
    "frees for a group too many": ("deadlock", ("_ring(k, 2 * STAGES, GROUPS)", "_ring(k, 2 * STAGES, 4)")),
    "expects half of the bytes": ("deadlock", ("x.block_type.nbytes)", "x.block_type.nbytes // 2)")),
    "s used in flight": ("Product", (SCORES, "")),
    "acc used in flight": ("Product", (SUMS, "")),
    "acc waited for too briefly": ("used in flight", (SUMS, SUMS.replace("0", "1"))),
    "barriers not fenced": ("not fenced", ("    fence_async_shared()  # TMA has to see the barriers\n", "")),
    "o not fenced": ("not fenced", ("    fence_async_shared()  # TMA has to see what took its place\n", "")),
    "o not waited for": ("not waited for", ("    tma.store_wait(pendings=0)\n", "")),
    "wrong group's queries": ("wrong o", ("row + group * QUERIES)", "row + (2 - group) * QUERIES)")),
    "v of the next block": ("wrong o", ("v, b, h, j * KEYS)", "v, b, h, j * KEYS + KEYS)")),
    "heads as batches": ("wrong", ("head // H, head % H", "head % H, head // H")),
    "a key too many": ("wrong o", ("key < Lk", "key <= Lk")),
    "no mask": ("wrong o", ("if j * KEYS + KEYS > Lk:", "if False:")),
    "old sums do not shrink": ("wrong o", ("acc = acc * gl", "acc = acc + 0 * gl")),
    "z does not shrink": ("wrong o", ("z * shrink", "z")),
    "scale without log2(e)": ("wrong o", ("scale * math.log2(math.e)", "scale")),
    "lse without z": ("wrong lse", ("m + gl.log2(z)", "m")),
    "lse behind the end": ("wrong lse|outside", ("mask=i < Lq", "mask=i < Lq + 1")),
    "a descriptor too long": ("wrong o|behind", ("list(shape),", "[*shape[:2], shape[2] + 100, K],")),
    "more registers than there are": ("registers", ("gl.constexpr(160)", "gl.constexpr(168)")),
}  # fmt: skip


@pytest.mark.parametrize("bug", BUGS)
def test_bugs_are_found(bug):
    message, *edits = BUGS[bug]
    case = Case(2, 2, 200, 700, 64, "linear", 0.5)
    with pytest.raises((model.Fault, TypeError), match=message):
        for mood in (model.EAGER, model.LAZY):
            check(played(*edits), case, mood)


# ---- from torch to the launch ----------------------------------------------------------------------------


@pytest.fixture
def launched(monkeypatch):
    """(kernel, grid, arguments, constants) of every launch, instead of the launches; fresh messages."""
    launches = []

    def launch(kernel, grid, *args, **meta):
        launches.append((kernel, grid, args, meta))

    monkeypatch.setattr(dispatch, "launch", launch)
    hopper._proved.cache_clear()
    with dispatch.pretend(90):
        yield launches
    hopper._proved.cache_clear()


@pytest.mark.parametrize("case", CASES[-2:] + (Case(1, 1, 1, 1, 64, "fused", 1.0, torch.bfloat16),))
def test_launch(case, launched):
    q, k, v = (tensor(case, L) for L in (case.Lq, case.Lk, case.Lk))
    o, lse = attention._forward(q, k, v, case.scale)
    [(kernel, grid, (*described, lse_given, scale, H, Lq, Lk), meta)] = launched
    assert kernel is hopper._forward_kernel and meta == {"num_warps": 4}
    assert grid == (case.B * case.H * -(-case.Lq // 192),) and (H, Lq, Lk) == (case.H, case.Lq, case.Lk)
    assert lse_given is lse and scale == pytest.approx(case.scale / math.log(2))
    for given, x, rows in zip(described, (q, o, k, v), (64, 64, 128, 128), strict=True):
        assert given.base is x and given.shape == list(x.shape) and given.block_shape == [1, 1, rows, case.K]
        assert x.as_strided(given.shape, given.strides, x.storage_offset()).equal(x) or x is o
        assert (given.layout.swizzle_byte_width, given.layout.element_bitwidth, given.layout.rank) == (
            128,
            16,
            4,
        )
    assert o.shape == q.shape and o.transpose(1, 2).is_contiguous() and lse.dtype == torch.float32


def test_strides_that_tma_cannot_walk_are_copied(launched):
    odd = torch.randn(2, 3, 9, 65).bfloat16()[..., 1:]
    one_for_all = torch.randn(2, 1, 9, 64).bfloat16().expand(2, 3, 9, 64)
    attention._forward(odd, one_for_all, one_for_all, 0.125)
    q, o, k, v, *_ = launched[0][2]
    for given, x in zip((q, k, v), (odd, one_for_all, one_for_all), strict=True):
        assert given.base.equal(x) and given.base.data_ptr() % 16 == 0 and min(given.strides[:3]) >= 64


@pytest.mark.parametrize(
    ("arch", "dtype", "K", "ours"),
    ((90, torch.bfloat16, 64, True), (90, torch.float16, 128, True), (90, torch.float32, 64, False),
     (90, torch.bfloat16, 32, False), (89, torch.bfloat16, 64, False), (100, torch.bfloat16, 128, False)),
)  # fmt: skip
def test_who_runs_what(arch, dtype, K, ours, launched):
    q = torch.randn(1, 1, 4, K).to(dtype)
    with dispatch.pretend(arch):
        attention._forward(q, q, q, 0.125)
        attention._backward(q, q, q, q, q, torch.zeros(1, 1, 4), 0.125)
    kernels = [kernel for kernel, *_ in launched]
    forward = hopper._forward_kernel if ours else attention._forward_kernel
    assert kernels == [forward, attention._dq_kernel, attention._dkdv_kernel]


def test_without_the_right_gluon(launched, monkeypatch):
    q = torch.randn(1, 1, 4, 64).bfloat16()
    for name, value in (("VERSIONS", ("3.5",)), ("COMPLETE", False)):
        with monkeypatch.context() as patch, warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            patch.setattr(hopper, name, value)
            hopper._proved.cache_clear()
            for _ in range(3):
                attention._forward(q, q, q, 0.125)
        assert len(said) == 1 and "the portable kernel runs" in str(said[0].message)  # and says so once
    assert {kernel for kernel, *_ in launched} == {attention._forward_kernel}
    monkeypatch.setattr(hopper, "INTERPRET", True)  # which cannot run Gluon, as everybody knows
    assert not hopper.fits(q)


def test_lint_knows_what_would_be_slow():
    """tests/test_kernel_package.py lints the kernel itself; this row is what it finds, and then is not."""
    row = lint.Row("hopper.forward", "K=128 bf16", 90, "", 16, 128, 0, 180500, 1, 48, 48, 10, False, 5, 0, "")
    assert not list(lint.faults(row))
    for spoilt in (
        {"hgmma": 0}, {"setmaxnreg": 0}, {"serialized": True}, {"stack": 88}, {"shared": 240000},
    ):  # fmt: skip
        assert len(list(lint.faults(row._replace(**spoilt)))) == 1
