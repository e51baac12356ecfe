"""Gradient measures and PCGrad against closed forms and dense float64."""

import json
import math
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import train
from helpers import probe_of, toy
from sdv import diagnostics, objectives
from sdv.data.rows import Pairs
from sdv.diagnostics import SUBSPACE, compare, directions, probe
from sdv.lora import lora_modules, lora_parameters
from sdv.models.cogvideox_dit import CogVideoXDiT
from sdv.models.wan_dit import WanDiT
from sdv.run import held_out
from sdv.run import report as diagnostics_report
from sdv.seeds import PROBE, PROBE_PAIR
from sdv.surgery import Surgery, dot, project

MEDIA = Path(__file__).parent / "media"


# Cosines, norms, noise


def test_two_quadratics_at_a_chosen_angle():
    """|x - c|^2 / 2 has gradient x - c: 60 degrees between the tasks in q, 0 elsewhere, norms 2 and 3."""
    model = toy()
    params = lora_parameters(model)
    start = {name: p.detach().clone() for name, p in params.items()}

    def quadratic(centre):
        return sum((p - centre[name]).square().sum() / 2 for name, p in params.items())

    unit = {name: torch.zeros_like(p) for name, p in params.items()}
    turned = {name: torch.zeros_like(p) for name, p in params.items()}
    unit["blocks.0.q.lora_A"][0, 0] = unit["patch_in.lora_B"][0, 0] = 1
    turned["blocks.0.q.lora_A"][0, 0], turned["blocks.0.q.lora_A"][1, 3] = 0.5, math.sqrt(0.75)
    turned["patch_in.lora_B"][0, 0] = 1
    centres = [{name: start[name] - size * g[name] for name in g} for size, g in ((2, unit), (3, turned))]
    row = probe(model, [partial(quadratic, centre) for centre in centres for _ in range(6)])

    found = row["whole"]["all"]
    for name, truth in {
        "cross": 0.75, "identity": 1, "motion": 1, "corrected": 0.75, "norm_identity": 2 * math.sqrt(2),
        "norm_motion": 3 * math.sqrt(2), "signal_identity": 8, "noise_identity": 0, "noise_motion": 0,
    }.items():  # fmt: skip
        assert found[name] == pytest.approx([truth] * 3, rel=5e-5, abs=1e-5), name  # five digits are written
    assert row["group"]["attention q"]["cross"][0] == pytest.approx(0.5, abs=1e-5)
    assert row["layer"]["blocks.0"]["corrected"][0] == pytest.approx(0.5, abs=1e-5)
    assert row["layer"]["patch_in"]["cross"][0] == row["group"]["embeddings"]["cross"][0] == 1
    assert row["factor"]["A"]["cross"][0] == pytest.approx(0.5, abs=1e-5)
    assert row["factor"]["B"]["cross"][0] == 1
    assert row["group"]["feed-forward"]["cross"] == [None] * 3  # no gradient, no cosine


def test_every_adapted_layer_belongs_to_a_group():
    def group(path: str) -> str:
        return dict(diagnostics.parts_of(path, "lora_A"))["group"]

    known = {"attention q", "attention k", "attention v", "attention out"}
    of = {kind: {group(f"blocks.3.{name}") for name in kind.lora_targets} for kind in (CogVideoXDiT, WanDiT)}
    assert of[CogVideoXDiT] == known | {"feed-forward", "modulation", "embeddings"}
    assert of[WanDiT] == known | {f"cross-{name}" for name in known} | {"feed-forward"}


def noisy_grams(count: int, m: int, cosine: float, noise: float) -> torch.Tensor:
    """Gram matrices of unit gradients at a known cosine under isotropic noise of this norm."""
    rng = torch.Generator().manual_seed(1)
    mean = torch.zeros(4 * m, 200, dtype=torch.float64)
    mean[: 2 * m, 0], mean[2 * m :, 0], mean[2 * m :, 1] = 1, cosine, math.sqrt(1 - cosine**2)
    g = mean + noise / math.sqrt(200) * torch.randn(count, 4 * m, 200, generator=rng, dtype=torch.float64)
    return g @ g.mT


def test_the_correction_finds_the_cosine_that_noise_hides():
    """Noise of twice the signal's norm: the plain cosine halves as theory says, the corrected one stays."""
    rows = diagnostics.with_intervals(noisy_grams(150, 4, cosine=0.6, noise=2.0))
    mean = {name: sum(row[name][0] for row in rows) / len(rows) for name in rows[0]}
    shrink = 1 + 2.0**2 / 4
    assert mean["corrected"] == pytest.approx(0.6, abs=0.03)
    assert mean["cross"] == pytest.approx(0.6 / shrink, abs=0.02)
    assert mean["identity"] == pytest.approx(1 / shrink, abs=0.02)
    assert mean["signal_motion"] == pytest.approx(1, abs=0.03)
    assert mean["noise_motion"] == pytest.approx(4, abs=0.3)
    assert mean["norm_identity"] == pytest.approx(math.sqrt(shrink), abs=0.02)
    truth = {"cross": 0.6 / shrink, "identity": 1 / shrink, "corrected": 0.6, "noise_identity": 4}
    for name, value in truth.items():
        covered = sum(row[name][1] <= value <= row[name][2] for row in rows) / len(rows)
        assert covered > 0.75, (name, covered)  # nominally 0.9; four micro-batches say little of their spread


def test_cosines_are_means_over_all_pairs_of_halves():
    g = torch.randn(4, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 1
    (found,) = diagnostics.with_intervals((g @ g.T)[None])
    unit, products, norms = g / g.norm(dim=1, keepdim=True), g @ g.T, g.norm(dim=1)
    truth = {
        "cross": (unit[:2] @ unit[2:].T).mean(), "identity": unit[0] @ unit[1], "motion": unit[2] @ unit[3],
        "corrected": products[:2, 2:].mean() / (products[0, 1] * products[2, 3]).sqrt(),
        "norm_identity": norms[:2].mean(), "norm_motion": norms[2:].mean(),
        "noise_identity": norms[:2].square().mean() / products[0, 1] - 1,
        "noise_motion": norms[2:].square().mean() / products[2, 3] - 1,
    }  # fmt: skip
    for name, value in truth.items():
        assert found[name][0] == pytest.approx(value.item(), rel=5e-5), name  # five digits are written


def test_two_negative_yardsticks_make_no_positive_one():
    g = torch.tensor([[1.0, 0.0], [-1.0, 0.1], [0.1, 1.0], [0.0, -1.0]], dtype=torch.float64)
    (found,) = diagnostics.with_intervals((g @ g.T)[None])
    assert found["identity"][0] < 0 and found["motion"][0] < 0 and found["corrected"][0] is None


def test_bootstrap_halves_are_all_but_one_of_all_micro_batches(monkeypatch):
    picks, halves_of = [], diagnostics.halves_of
    monkeypatch.setattr(diagnostics, "halves_of", lambda pick, m: picks.append(pick) or halves_of(pick, m))
    diagnostics.with_intervals(torch.eye(16, dtype=torch.float64)[None] + 1)
    _, drawn = picks
    assert drawn.shape[1:] == (4, 3) and drawn.unique().tolist() == [0, 1, 2, 3]


def test_an_interval_of_which_a_part_is_undefined_has_no_end():
    """Of three drawn gradients two or more are the one of -1.5 with probability 0.16: no signal is left."""
    g = torch.ones(16, 1, dtype=torch.float64)
    g[3] = -1.5
    (found,) = diagnostics.with_intervals((g @ g.T)[None])
    assert found["corrected"][0] > 0 and found["corrected"][1:] == [None, None]
    assert None not in found["signal_identity"] and found["cross"][1] is not None


def test_without_signal_nothing_is_claimed():
    gram = torch.eye(16, dtype=torch.float64)[None].clone()
    gram[0, 0, 4] = gram[0, 4, 0] = -0.5  # identity a and b disagree,
    gram[0, 8, 12] = gram[0, 12, 8] = gram[0, 0, 8] = gram[0, 8, 0] = 0.5  # all else is well
    (row,) = diagnostics.with_intervals(gram)
    assert row["identity"][0] < 0 < row["cross"][0] and row["motion"][0] > 0
    assert row["corrected"] == row["noise_identity"] == [None] * 3
    assert diagnostics_report.verdict({"whole": {"all": row}}) == "too noisy to compare"


# Subspaces


def test_a_linear_model_against_dense_float64():
    """Gradients of a regression: the factored decomposition is that of the dense update, for every module."""
    model = toy()
    rng = torch.Generator().manual_seed(2)
    for module in lora_modules(model).values():
        weight = module.weight.detach().flatten(1)
        x = torch.randn(40, weight.shape[1], generator=rng)
        a, b = module.lora_A.flatten(1), module.lora_B.flatten(1)
        y = torch.randn(40, weight.shape[0], generator=rng)
        residual = x @ (weight + module.scale * b @ a).T - y
        grad_a, grad_b = torch.autograd.grad(residual.square().sum() / 2, (a, b))
        dense = module.scale * (residual.T @ x).double().detach()  # d loss / d (B A)
        a, b = a.detach(), b.detach()
        torch.testing.assert_close(grad_b.double(), dense @ a.T.double(), rtol=1e-4, atol=1e-3)
        update = grad_b.double() @ a.double() + b.double() @ grad_a.double()
        found = directions(grad_a, grad_b, a, b)
        u, size, vh = torch.linalg.svd(update)
        count = len(found.size)
        torch.testing.assert_close(found.size.double(), size[:count], rtol=1e-4, atol=1e-4 * size[0].item())
        rebuilt = found.left * found.size @ found.right.T
        torch.testing.assert_close(rebuilt.double(), update, rtol=1e-4, atol=1e-5 * size[0].item())
        for ours, theirs in ((found.left, u), (found.right, vh.T)):
            ours, theirs = ours[:, :2].double(), theirs[:, :2]
            torch.testing.assert_close(ours @ ours.T, theirs @ theirs.T, rtol=0, atol=1e-4)


def test_principal_angles_and_energy_of_constructed_updates():
    """B = 0, orthonormal A: left directions are gB's. Two planes at 30 degrees about a common line."""
    a, b = torch.eye(4, 10), torch.zeros(12, 4)
    c, s = math.cos(math.radians(30)), math.sin(math.radians(30))
    one, two = torch.zeros(12, 4), torch.zeros(12, 4)
    one[0, 0], one[1, 1], one[2, 2] = 4, 2, 1
    two[0, 0], two[1, 1], two[5, 1], two[6, 3] = 4, 2 * c, 2 * s, 1
    of = [directions(torch.zeros(4, 10), g, a, b) for g in (one, two)]
    found = dict(zip(SUBSPACE, compare(*of, 2).tolist(), strict=True))
    expected = {
        "left overlap": (1 + c * c) / 2, "left nearest": 0, "left farthest": 30,
        "left second in first": (16 + 4 * c * c) / 21, "left first in second": (16 + 4 * c * c) / 21,
        "right overlap": 1, "right nearest": 0, "right farthest": 0,
        "right second in first": 20 / 21, "right first in second": 20 / 21,
    }  # fmt: skip
    for name, truth in expected.items():
        assert found[name] == pytest.approx(truth, abs=0.05 if "est" in name else 1e-5), name
    assert compare(*of, 4).isnan().all()  # there are three directions, not four


def test_the_null_is_what_a_shared_adapter_gives_for_nothing():
    """At B = 0 with orthonormal A: k / out on the left, and k / r on the right, not k / in."""
    out, width, rank, k = 60, 80, 8, 2
    module = SimpleNamespace(
        lora_A=nn.Parameter(torch.linalg.qr(torch.randn(width, rank)).Q.T), lora_B=torch.zeros(out, rank)
    )
    rng = torch.Generator().manual_seed(3)
    found = []
    for seed in range(150):
        grad_b = torch.randn(4, out, rank, generator=rng)
        null = diagnostics.subspaces(torch.zeros(4, rank, width), grad_b, module, k, seed)["null"]
        found.append([null[SUBSPACE.index(f"{side} overlap")] for side in ("left", "right")])
    left, right = torch.tensor(found).mean(0).tolist()
    assert left == pytest.approx(k / out, rel=0.1)
    assert right == pytest.approx(k / rank, rel=0.1)


def test_both_factors_of_a_random_update_are_drawn_apart(monkeypatch):
    drawn, real = [], diagnostics.with_random
    monkeypatch.setattr(
        diagnostics, "with_random", lambda grads, rng: drawn.append(rng.initial_seed()) or real(grads, rng)
    )
    module = SimpleNamespace(lora_A=torch.randn(4, 9), lora_B=torch.randn(8, 4))
    for seed in (0, 1):
        diagnostics.subspaces(torch.randn(4, 4, 9), torch.randn(4, 8, 4), module, 2, seed)
    assert len(set(drawn)) == 4


def test_a_comparison_is_the_mean_over_its_pairs_of_halves():
    rng = torch.Generator().manual_seed(0)
    shapes = (4, 9), (8, 4), (4, 4, 9), (4, 8, 4)
    a, b, grad_a, grad_b = (torch.randn(*shape, generator=rng) for shape in shapes)
    found = diagnostics.subspaces(grad_a, grad_b, SimpleNamespace(lora_A=a, lora_B=b), 2, 0)
    of = [directions(*grads, a, b) for grads in zip(grad_a, grad_b, strict=True)]
    pairs = torch.stack([compare(of[i], of[j], 2) for i in (0, 1) for j in (2, 3)])
    assert found["cross"] == pytest.approx(pairs.mean(0).tolist(), rel=1e-3)


def test_subspaces_are_of_the_four_halves_in_their_order():
    model = toy(zero_b=True)
    zero = {name: torch.zeros_like(p) for name, p in lora_parameters(model).items()}

    def writes_from(first):
        """Gradients of B in four outputs from this one on."""
        grads = {name: g.clone() for name, g in zero.items()}
        for name in grads:
            if name.endswith("B"):
                grads[name].flatten(1)[first : first + 4] = torch.diag(torch.tensor([4.0, 3, 2, 1]))
        return grads

    row = probe_of(model, [writes_from(first) for first in (0, 4) for _ in range(4)])
    at = SUBSPACE.index("left overlap")
    for found in row["modules"].values():
        overlaps = [found[kind][at] for kind in ("identity", "motion", "cross")]
        assert overlaps == pytest.approx([1, 1, 0], abs=1e-5)


def test_subspaces_have_eight_directions_or_half_of_the_rank(monkeypatch):
    asked = []
    monkeypatch.setattr(diagnostics, "subspaces", lambda a, b, module, k, seed: asked.append(k))
    for rank, k in ((1, 1), (4, 2), (20, 8)):
        model = toy(rank)
        probe_of(model, [{name: torch.ones_like(p) for name, p in lora_parameters(model).items()}] * 4)
        assert asked == [k] * len(lora_modules(model))
        asked.clear()


def test_a_convolution_is_its_flat_matrix():
    model = toy(zero_b=True)
    same = {name: torch.randn_like(p) for name, p in lora_parameters(model).items()}
    row = probe_of(model, [same] * 4)
    at = SUBSPACE.index("left overlap")
    assert row["modules"].keys() == lora_modules(model).keys()
    for found in row["modules"].values():
        overlaps = [found[kind][at] for kind in ("cross", "identity", "motion")]
        assert overlaps == pytest.approx([1] * 3, abs=1e-4)
        assert found["null"][at] < 0.6
    json.loads(json.dumps(row, allow_nan=False))


# Gradient surgery


def test_pcgrad_by_hand():
    params = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))]
    surgery = Surgery(params, "exact", p_video=0.25)
    for task, grad in (("identity", (1.0, 0.0)), ("identity", (1.0, 0.0)), ("motion", (-1.0, 1.0))):
        params[0].grad, params[1].grad = torch.tensor(grad), torch.zeros(1)
        surgery.take(task)
        assert params[0].grad is None
    surgery.put()  # (2, 0) becomes (1, 1), and (-1, 1) becomes (0, 1)
    torch.testing.assert_close(params[0].grad, torch.tensor([0.75, 1.0]))
    torch.testing.assert_close(params[1].grad, torch.zeros(1))


def test_projection_ends_a_conflict_and_touches_nothing_else():
    rng = torch.Generator().manual_seed(4)
    for _ in range(20):
        g, other = ([torch.randn(7, 3, generator=rng), torch.randn(5, generator=rng)] for _ in range(2))
        if dot(g, other) > 0:
            other = [-o for o in other]
        out = project(g, other)
        assert abs(dot(out, other)) < 1e-5
        torch.testing.assert_close(out, project(g, [3 * o for o in other]))
        assert dot(out, g) == pytest.approx(dot(out, out), rel=1e-4)  # orthogonal
        torch.testing.assert_close(project(g, [-o for o in other]), g, rtol=0, atol=0)
    assert project(g, [0 * o for o in other])[0].isfinite().all()


def test_buffers_are_fifo_hold_what_was_drawn_and_resume():
    p = nn.Parameter(torch.zeros(2))

    def step(surgery: Surgery, task: str, *grad: float) -> list[float]:
        p.grad = torch.tensor(grad)
        surgery.take(task)
        surgery.put()
        out = p.grad.tolist()
        p.grad.mul_(100)  # as clipping does, in place
        return out

    surgery = Surgery([p], "buffer-4", p_video=0.2)
    assert step(surgery, "motion", 0.0, 9.0) == [0, 9]  # nothing to project off yet
    for _ in range(4):
        step(surgery, "motion", -1.0, 0.0)  # the fifth pushes the first out
    assert [g[0].tolist() for g in surgery.past["motion"]] == [[-1, 0]] * 4
    assert step(surgery, "identity", 2.0, 3.0) == [0, 3]
    assert step(surgery, "identity", -2.0, 3.0) == [-2, 3]
    assert [g[0].tolist() for g in surgery.past["identity"]] == [[2, 3], [-2, 3]]  # as drawn, not projected
    other = Surgery([p], "buffer-4", p_video=0.2)
    other.restore({task: list(past) for task, past in surgery.past.items()})
    assert step(other, "motion", 1.0, -1.0) == step(surgery, "motion", 1.0, -1.0) == [1, 0]


def test_none_leaves_the_gradient_alone():
    p = nn.Parameter(torch.zeros(2))
    p.grad = grad = torch.ones(2)
    surgery = Surgery([p], "none", 0.2)
    surgery.take("motion")
    surgery.put()
    assert p.grad is grad


# Held-out rows


def rows_of(*names: str) -> SimpleNamespace:
    """Rows that name their files by letters; an item is its number."""

    class Fake(list):
        rows = [
            SimpleNamespace(files=tuple(Path(f"x/{c}") for c in name), origin=f"m:{i} {name}")
            for i, name in enumerate(names)
        ]

    return Fake(range(len(names)))


def test_halves_share_no_file_and_repeat_when_short():
    both_ways = rows_of("ab", "ba", "cd", "dc", "ef", "ac", "gh")  # ac would tie two subjects together
    micro = [batch.tolist() for batch in held_out.halves(both_ways, 3, 2)]
    assert micro == [[0, 1], [4, 0], [1, 4], [2, 3], [6, 2], [3, 6]]
    with pytest.raises(ValueError, match="x: too few rows"):
        list(held_out.halves(rows_of("ab", "ba"), 1, 1))


def test_a_probe_must_not_see_what_is_trained_on(tmp_path, monkeypatch):
    """Nor under another name: by a hard link, as imports make them, or as a copy."""
    monkeypatch.chdir(tmp_path)
    Path("x").mkdir()
    for name in "abcdef":
        Path("x", name).write_text(name)
    held_out.check_unseen([rows_of("ab")], [rows_of("cd"), rows_of("e")])
    Path("x/h").hardlink_to("x/a")
    Path("x/k").write_text("a")
    for twin, trained in zip("ahkb", "aaab", strict=True):
        with pytest.raises(ValueError, match=f"x/{twin}: is held out .* and trained on .x/{trained}."):
            held_out.check_unseen([rows_of("c" + twin)], [rows_of("ab")])


def test_references_are_hidden_equally_often_in_both_halves():
    enc = train.Encoders(lambda clip: clip, lambda prompts: torch.zeros(len(prompts), 1, 1), 6)
    unseen = {"identity": Pairs(MEDIA / "pairs", 32, 32), "motion": Pairs(MEDIA / "pairs", 32, 32)}

    def pairs(**settings):
        def motion(batch, *rest):
            return train.motion_pair(batch | {"clip": batch["ref"][:, :, None]}, *rest)

        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(train.PAIR_OF, "motion", motion)
            cfg = train.Config(view_drop=1.0, identity_batch=1, **settings)
            found = held_out.held_out_losses(unseen, train.PAIR_OF, enc, None, None, cfg)
            return [loss.__defaults__[0] for task in found for loss in found[task]]

    for p_drop, hidden in ((0.5, 2), (0.0, 0), (1.0, 4), (0.25, 1)):
        gone = [pair.keep is not None and not len(pair.keep) for pair in pairs(p_drop=p_drop)]
        assert [sum(gone[first : first + 4]) for first in (0, 4, 8, 12)] == [0, 0, hidden, hidden]
    assert len({len(pair.keep) for pair in pairs(dropout="tokens")[8:]}) > 2  # neither all nor none


def test_every_held_out_sample_has_draws_of_its_own():
    drawn = [
        held_out.fixed_draws(stream, task, micro, 3)
        for stream in (PROBE, PROBE_PAIR)
        for task in (0, 1)
        for micro in (0, 1)
    ]
    names = [rng.initial_seed() for draws in drawn for rng in (draws.shared, *draws.each)]
    assert len(set(names)) == len(names) == 8 * 4


def test_held_out_pairs_are_whole_and_the_same_whenever_they_are_asked(monkeypatch):
    """With all that a run drops and moves; what a pair looks at, and its noise, have streams of their own."""
    clip = {"clip": torch.randn(1, 3, 1, 8, 8), "prompt": ["a"]}
    asked, fixed_draws = [], held_out.fixed_draws
    monkeypatch.setattr(held_out, "halves", lambda rows, batches, size: [clip] * 2)
    monkeypatch.setattr(held_out, "fixed_draws", lambda *key: asked.append(key) or fixed_draws(*key))
    monkeypatch.setattr(held_out, "denoising_loss", lambda dit, schedule, pair, draws: pair)
    enc = train.Encoders(lambda x: x, lambda prompts: prompts, 4)
    cfg = train.Config(text_drop=1.0, ref_shift=0.5, p_drop=0.0, val_batches=1, motion_batch=1)
    losses = held_out.held_out_losses({"motion": None}, train.PAIR_OF, enc, None, None, cfg)["motion"]
    for pair in [loss() for loss in losses * 2]:
        assert pair.text == ["a"] and pair.ref.equal(clip["clip"]) and pair.keep is None
    assert asked == [(stream, 1, i, 1) for stream in (PROBE_PAIR, PROBE, PROBE) for i in (0, 1)]


def test_held_out_micro_batches_are_as_large_as_those_that_train(monkeypatch):
    asked = []
    monkeypatch.setattr(held_out, "halves", lambda rows, *how: asked.append((rows, *how)) or [])
    cfg = train.Config(val_batches=5, identity_batch=3, motion_batch=2)
    held_out.held_out_losses({"identity": "pairs", "motion": "clips"}, train.PAIR_OF, None, None, None, cfg)
    assert asked == [("pairs", 5, 3), ("clips", 5, 2)]


@pytest.mark.parametrize("rank", [0, 1])
def test_processes_share_held_out_batches_and_spare_ones_count_for_nothing(monkeypatch, rank):
    """Three batches and two processes: in the second round the second one repeats the last batch."""
    rounds, asked, waiting = [(0, 1), (2, 2)], [], []

    def found(i):
        return objectives.Losses(None, torch.tensor([float(i)]), torch.tensor([i + 0.5]))

    def loss(i):
        asked.append(i)
        waiting.extend(found(rounds[len(asked) - 1][1 - rank])[1:])  # of the other process
        return found(i)

    def gather(x):
        both = x, waiting.pop(0)[None]
        return torch.cat(both if rank == 0 else both[::-1])

    monkeypatch.setattr(held_out, "ranks", lambda: (rank, 2))
    monkeypatch.setattr(held_out, "gather", gather)
    monkeypatch.setattr(held_out, "summary", lambda each, t, steps: (each.tolist(), t.tolist()))
    assert held_out.validate([partial(loss, i) for i in range(3)], 1000) == ([0, 1, 2], [0.5, 1.5, 2.5])
    assert asked == [both[rank] for both in rounds]


# Words


@pytest.mark.parametrize(
    ("corrected", "said"),
    [
        ((0.1, -0.2, 0.4), "not told apart from orthogonal"),
        ((0.5, 0.2, 0.8), "the tasks pull together"),
        ((-0.5, -0.8, -0.2), "the tasks pull apart"),
        ((0.5, None, None), "too noisy for an interval"),
    ],
)
def test_the_verdict_claims_what_the_interval_allows(corrected, said):
    assert diagnostics_report.verdict({"whole": {"all": {"corrected": corrected}}}) == said


def test_two_micro_batches_a_task_give_no_interval():
    rng = torch.Generator().manual_seed(0)
    rows = torch.randn(1, 8, 50, generator=rng, dtype=torch.float64) + 1
    (found,) = diagnostics.with_intervals(rows @ rows.mT)
    assert all(row[1:] == [None, None] for row in found.values())


def test_the_random_update_is_as_large_as_the_others():
    grads = torch.full((4, 300, 5), 0.01)
    found = diagnostics.with_random(grads, torch.Generator().manual_seed(0))
    assert found[4].std().item() == pytest.approx(0.01, rel=0.1)


def test_shares_of_energy_of_unequal_updates():
    """Sizes 4, 2, 1 and 3, 2, 1, with the same two leading directions: (9 + 4) / 14 and (16 + 4) / 21."""
    a, b, first, second = torch.eye(4, 10), torch.zeros(12, 4), torch.zeros(12, 4), torch.zeros(12, 4)
    first[0, 0], first[1, 1], first[2, 2] = 4, 2, 1
    second[0, 0], second[1, 1], second[5, 2] = 3, 2, 1
    of = [directions(torch.zeros(4, 10), grad, a, b) for grad in (first, second)]
    found = dict(zip(SUBSPACE, compare(*of, 2).tolist(), strict=True))
    assert found["left second in first"] == pytest.approx(13 / 14)
    assert found["left first in second"] == pytest.approx(20 / 21)


def test_a_small_direction_is_one_too():
    a, b, grad = torch.eye(4, 10), torch.zeros(12, 4), torch.zeros(12, 4)
    grad[0, 0], grad[1, 1] = 4, 0.004
    of = directions(torch.zeros(4, 10), grad, a, b)
    assert compare(of, of, 2)[0].item() == pytest.approx(1) and compare(of, of, 3).isnan().all()


def test_updates_of_fewer_directions_than_asked_for_are_not_compared():
    a, b, three, four = torch.eye(4, 10), torch.zeros(12, 4), torch.zeros(12, 4), torch.eye(12, 4)
    three[:3, :3] = torch.eye(3)
    of = [directions(torch.zeros(4, 10), grad, a, b) for grad in (three, four)]
    assert compare(*of, 4).isnan().all() and compare(*of[::-1], 4).isnan().all()
