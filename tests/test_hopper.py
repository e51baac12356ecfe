"""The Hopper attention without a Hopper: played in torch, its bugs planted and found, its launches, its machine code."""

from pathlib import Path
from typing import NamedTuple

import gluon_model as model
import pytest
import torch

SOURCE = Path(__file__).parent.parent / "kernels" / "hopper.py"


class Case(NamedTuple):
    B: int
    H: int
    Lq: int
    Lk: int
    K: int
    layout: str
    scale: float


CASES = (
    Case(2, 2, 200, 300, 64, "linear", 0.125),  # ragged; two programs and three blocks a head
    Case(2, 1, 70, 5, 64, "fused", 4.0),  # scores far past what exp alone could take
    Case(1, 1, 1, 1, 64, "linear", 0.125),
    Case(2, 2, 192, 256, 128, "heads", 0.09),  # nothing ragged
    Case(2, 1, 193, 769, 128, "fused", 0.09),
)


def tensor(case: Case, L: int) -> torch.Tensor:
    """(B, H, L, K) as callers hold it, with NaN behind the end of every sample."""
    if case.layout == "heads":
        x = torch.full((case.B, case.H, L + 200, case.K), torch.nan)[:, :, :L]
    elif case.layout == "fused":  # one of q, k, v of a single linear
        x = torch.full((case.B, L + 200, 3, case.H, case.K), torch.nan)[:, :L, 1].transpose(1, 2)
    else:
        x = torch.full((case.B, L + 200, case.H, case.K), torch.nan)[:, :L].transpose(1, 2)
    return x.copy_(torch.randn(x.shape))


def check(module, case: Case, mood: model.Mood):
    """Runs module.forward and holds o and lse against float64; raises Fault."""
    torch.manual_seed(0)
    q, k, v = (tensor(case, L) for L in (case.Lq, case.Lk, case.Lk))
    paper = torch.full((case.B, case.Lq + 200, case.H, case.K), torch.nan)  # o is a part of it
    module.token_major = lambda _: paper[:, : case.Lq].transpose(1, 2)
    model.mood = mood
    o, lse = module.forward(q, k, v, case.scale)
    s = q.double() @ k.double().mT * case.scale
    truth = {"o": torch.softmax(s, -1) @ v.double(), "lse": torch.logsumexp(s, -1) / torch.log(torch.tensor(2.0))}
    for name, x in (("o", o), ("lse", lse)):
        error = ((x - truth[name]).norm() / truth[name].norm()).item()
        model.require(error < 1e-6, f"wrong {name}: {error:.1e}")
    model.require(bool(paper[:, case.Lq :].isnan().all()), "wrote behind the end of a sample")


@pytest.mark.parametrize("mood", (model.EAGER, model.LAZY), ids=("eager", "lazy"))
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_numbers(case, mood):
    check(model.acted(SOURCE), case, mood)


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
    "barriers not fenced": ("was not fenced", ("    fence_async_shared()  # TMA has to see the barriers\n", "")),
    "o not fenced": ("was not fenced", ("    fence_async_shared()  # TMA has to see what took its place\n", "")),
    "o not waited for": ("not waited for", ("    tma.store_wait(pendings=0)\n", "")),
    "wrong group's queries": ("wrong o", ("row + group * QUERIES)", "row + GROUPS * QUERIES - group * QUERIES)")),
    "v of the block before": ("wrong o", ("v, b, h, j * KEYS)", "v, b, h, j * KEYS - KEYS)")),
    "heads as batches": ("wrong", ("head // H, head % H", "head % H, head // H")),
    "a key too many": ("wrong o", ("key < Lk", "key <= Lk")),
    "no mask": ("wrong o", ("if j * KEYS + KEYS > Lk:", "if False:")),
    "old sums do not shrink": ("wrong o", ("acc = acc * gl", "acc = acc + 0 * gl")),
    "z does not shrink": ("wrong o", ("z * shrink", "z")),
    "scale without log2(e)": ("wrong o", ("scale * math.log2(math.e)", "scale")),
    "lse without z": ("wrong lse", ("m + gl.log2(z)", "m")),
    "lse behind the end": ("wrong lse|outside", ("mask=i < Lq", "mask=i < Lq + 1")),
    "descriptors without an end": ("wrong o|behind", ("list(x.shape),", "[*x.shape[:2], x.shape[2] + 100, K],")),
    "more registers than there are": ("registers", ("gl.constexpr(160)", "gl.constexpr(168)")),
}  # fmt: skip


@pytest.mark.parametrize("bug", BUGS)
def test_bugs_are_found(bug):
    message, *edits = BUGS[bug]
    case = Case(2, 2, 200, 700, 64, "linear", 0.5)
    with pytest.raises((model.Fault, TypeError), match=message):
        for mood in (model.EAGER, model.LAZY):
            check(model.acted(SOURCE, *edits), case, mood)
