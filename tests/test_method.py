"""The method: what a step is given, draws and learns, beside formulas, torch's AdamW and the paper."""

import json

import pytest
import torch
from torch import nn

import train
import weights
from helpers import MEDIA, RUN, build, keep_what_is_filmed, run
from sdv import objectives
from sdv.data.media import inspect_clip
from sdv.lora import acts_on, lora_modules, lora_parameters
from sdv.models.layers import visible_tokens
from sdv.models.wan_dit import WanDiT
from sdv.objectives import TASKS, Losses, Pair, denoising_loss, draws_of
from sdv.run import held_out
from sdv.schedule import FlowMatching, VPrediction
from sdv.surgery import Surgery

SAME = train.Encoders(lambda x: x, lambda prompts: prompts, 4, "clip")  # what goes in comes out


def draws(count=2):
    return draws_of((0, 1), [(0, 2, k) for k in range(count)])


def test_an_identity_step_looks_at_the_reference_and_denoises_the_target():
    views = {"ref": torch.randn(2, 3, 4, 4), "target": torch.randn(2, 3, 4, 4), "prompt": ["a", "b"]}
    pair = train.identity_pair(views, SAME, train.Method(), draws())
    assert pair.ref.equal(views["ref"][:, :, None]) and pair.target.equal(views["target"][:, :, None])
    assert pair.text == ["a", "b"] and pair.keep is None
    assert len(train.identity_pair(views, SAME, train.Method(view_drop=1.0), draws()).keep) == 0
    half, hidden = train.Method(view_drop=0.5, dropout="tokens"), set()  # which is of motion steps alone
    for step in range(20):
        keep = train.identity_pair(views, SAME, half, draws_of((0, step), [(0, 2, 0)])).keep
        hidden.add(None if keep is None else len(keep))
    assert hidden == {None, 0}


def test_every_frame_of_a_clip_is_as_often_its_reference():
    """Within four deviations of the binomial distribution, as all counts here."""
    clips = torch.arange(5.0).view(1, 1, 5, 1, 1).expand(2000, 1, 5, 1, 1)
    batch = {"clip": clips, "prompt": [""] * 2000}
    pair = train.motion_pair(batch, SAME, train.Method(p_drop=0.0), draws(2000))
    counts = pair.ref.flatten().long().bincount(minlength=5)
    assert (counts - 400).abs().max() < 4 * (2000 * 0.2 * 0.8) ** 0.5
    assert pair.target.equal(clips) and pair.keep is None


def test_a_token_of_the_reference_stays_with_probability_1_minus_p():
    kept = len(objectives.keep_tokens(4000, "tokens", 0.2, torch.Generator().manual_seed(0)))
    assert abs(kept / 4000 - 0.8) < 4 * (0.2 * 0.8 / 4000) ** 0.5


def test_dropped_tokens_leave_with_their_rows_and_all_others_keep_theirs():
    x, rope = torch.randn(2, 7, 3), (torch.randn(7, 4), torch.randn(7, 4))
    found, rows = visible_tokens(x, rope, 4, None)
    assert found is x and rows is rope
    for keep in ([], [3], [0, 2], [0, 1, 2, 3]):
        found, (cos, sin) = visible_tokens(x, rope, 4, torch.tensor(keep, dtype=torch.long))
        places = [*keep, 4, 5, 6]
        assert found.equal(x[:, places]) and cos.equal(rope[0][places]) and sin.equal(rope[1][places])


@pytest.mark.parametrize("family", ["tiny", "tiny_wan"])
def test_dropout_counts_the_tokens_that_a_reference_has(family, request):
    folder = request.getfixturevalue(family)
    cfg = train.Config(backbone=str(folder), height=64, width=96, frames=9, device="cpu", dtype="float32")
    enc, *_ = train.open_encoders(cfg, weights.open_backbone(folder), [], [], None, lambda *words: None)
    dit = weights.load_backbone(folder, parts=("dit",), log=lambda line: None).dit
    ref = enc.video(torch.zeros(1, 3, 1, 64, 96))
    with torch.no_grad():
        dit(ref, torch.tensor([5]), enc.text(["a dog"]), ref)
    assert dit.ref_tokens.stop - dit.ref_tokens.start == enc.ref_tokens


def test_what_is_drawn_for_a_sample_does_not_depend_on_its_place_in_a_batch():
    clips = torch.arange(7.0).view(1, 1, 7, 1, 1).expand(6, 1, 7, 1, 1)
    pictures = torch.arange(64.0).view(1, 1, 1, 8, 8).expand(6, 1, 1, 8, 8)

    def drawn(first, count):
        """Of each sample: its frame, what was moved into the middle of its picture, its caption."""
        found = draws_of((0, 1), [(0, 2, k) for k in range(first, first + count)])
        frames = objectives.random_frame(clips[:count], found).flatten().tolist()
        moved = objectives.shift(pictures[:count], 0.4, found)[:, 0, 0, 4, 4].tolist()
        return list(zip(frames, moved, objectives.keep_text(["a"] * count, 0.5, found), strict=True))

    whole = drawn(0, 6)
    assert whole == [one for k in range(6) for one in drawn(k, 1)]
    assert all(len(set(column)) > 1 for column in zip(*whole, strict=True))


class Recorder(nn.Module):
    """A network that keeps what it was called with, and predicts nothing."""

    dtype = torch.bfloat16

    def forward(self, *inputs):
        self.seen = inputs
        return torch.zeros_like(inputs[0])


def test_the_network_sees_what_dropout_left_and_time_text_and_reference_of_each_sample():
    net, keep = Recorder(), torch.tensor([1, 3])
    target, ref, text = torch.randn(3, 4, 2, 2, 2), torch.randn(3, 4, 1, 2, 2), torch.randn(3, 5, 6)
    found = denoising_loss(net, FlowMatching(), Pair(target, ref, text, keep), draws(3))
    _, t, *seen = net.seen
    assert seen[0].equal(text.bfloat16()) and seen[1].equal(ref.bfloat16()) and seen[2] is keep
    assert found.t.equal(t) and len(set(t.tolist())) == 3
    flows = []
    for x, rng in zip(target, draws(3).each, strict=True):
        torch.rand(1, generator=rng)  # its time
        flows.append(torch.randn(x.shape, generator=rng) - x)
    torch.testing.assert_close(found.each, torch.stack(flows).square().mean((1, 2, 3, 4)))


def test_the_loss_of_latents_in_bf16_is_computed_in_fp32():
    shapes = (2, 4, 2, 2, 2), (2, 4, 1, 2, 2), (2, 5, 6)
    target, ref, text = (torch.randn(shape).bfloat16() for shape in shapes)
    one, other = (
        denoising_loss(Recorder(), VPrediction(), Pair(x, ref, text), draws()).each
        for x in (target, target.float())
    )
    assert torch.equal(one, other)


def test_a_step_is_adamw_on_the_clipped_mean_gradient_with_a_warm_up(monkeypatch):
    gradients = torch.randn(6, 2, 8, generator=torch.Generator().manual_seed(0)) * 3  # norms above 1
    cfg = train.Config(accumulate=2, warmup=4, lr=0.1, betas=(0.8, 0.9), eps=1e-3, weight_decay=0.1)
    ours, theirs = (nn.Parameter(torch.ones(8)) for _ in range(2))
    waiting = iter(gradients.flatten(0, 1))

    def linear_loss(*_):
        return Losses((ours * next(waiting)).sum(), torch.ones(1), torch.ones(1))

    monkeypatch.setattr(train, "denoising_loss", linear_loss)
    monkeypatch.setattr(train, "PAIR_OF", dict.fromkeys(TASKS, lambda *_: None))
    one, stock = (
        torch.optim.AdamW([p], cfg.lr, cfg.betas, cfg.eps, cfg.weight_decay) for p in (ours, theirs)
    )
    feeds, seen = dict.fromkeys(TASKS, iter(dict, 1)), dict.fromkeys(TASKS, 0)
    training = train.Training(None, None, None, feeds, one, Surgery([ours], "none", 0.2), {}, seen)
    for step, pair in enumerate(gradients):
        train.train_step(step, training, cfg)
        mean = pair.mean(0)
        theirs.grad = mean / max(1.0, mean.norm().item())
        stock.param_groups[0]["lr"] = cfg.lr * [0.25, 0.5, 0.75, 1, 1, 1][step]
        stock.step()
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_the_coin_is_of_the_seed_and_the_exact_form_tosses_none():
    of_seeds = (train.Config(seed=seed, p_video=0.5) for seed in (0, 1))
    one, other = ([train.draw_task(step, 0, cfg) for step in range(64)] for cfg in of_seeds)
    assert one != other
    exact = train.Config(pcgrad="exact", accumulate=2)
    tasks = [train.draw_task(0, micro, exact) for micro in range(4)]
    assert tasks == ["identity", "identity", "motion", "motion"]


def test_every_draw_is_named_by_what_it_is_for():
    def named(task="motion", step=0, micro=0, seed=0):
        found = train.next_draws(task, step, micro, dict.fromkeys(TASKS, 0), train.Config(seed=seed))
        return found.shared.initial_seed(), found.each[0].initial_seed(), torch.initial_seed()

    shared, each, lora = named()
    assert named(step=1)[0] != shared and named(step=1)[2] != lora
    assert named(micro=1)[0] == shared and named(micro=1)[2] != lora
    for other in (named("identity"), named(seed=1)):
        assert other[0] != shared and other[1] != each
    assert named(seed=1)[2] != lora


@pytest.mark.parametrize("task", TASKS)
def test_two_processes_draw_and_count_the_samples_of_one(monkeypatch, task):
    def drawn(rank, world, size):
        monkeypatch.setattr(train.parallel, "ranks", lambda: (rank, world))
        cfg, seen = train.Config(identity_batch=size, motion_batch=size), dict.fromkeys(TASKS, 6)
        found = train.next_draws(task, 1, 2, seen, cfg)
        return [rng.initial_seed() for rng in found.each], found.shared.initial_seed(), seen

    one, first = drawn(0, 1, 4), drawn(0, 2, 2)
    lora = torch.initial_seed()
    second = drawn(1, 2, 2)
    assert first[0] + second[0] == one[0] and first[1:] == second[1:] == one[1:]
    assert torch.initial_seed() != lora  # each has a dropout of its own


def test_the_defaults_are_the_papers():
    cfg = train.Config()
    assert (cfg.p_video, cfg.p_drop, cfg.ref_frame, cfg.dropout) == (0.2, 0.5, "random", "whole")
    assert (cfg.cls_token, cfg.ref_shift, cfg.view_drop, cfg.text_drop) == ("<cls> ", 0, 0, 0)
    assert (cfg.rank, cfg.alpha, cfg.steps, cfg.lr, cfg.warmup) == (128, 64, 4000, 5e-5, 200)
    assert (cfg.betas, cfg.eps, cfg.weight_decay, cfg.max_grad_norm) == ((0.9, 0.95), 1e-8, 1e-4, 1.0)
    assert (cfg.identity_batch * cfg.accumulate, cfg.motion_batch * cfg.accumulate) == (256, 32)


def test_what_is_learned_with_may_not_change_in_a_run():
    others = {
        "lr": 1.0, "seed": 1, "p_video": 0.5, "p_drop": 0.1, "warmup": 1, "betas": (0.5, 0.5), "eps": 1.0,
        "text_drop": 0.5, "dtype": "float16", "rank": 1, "alpha": 1.0, "ref_frame": "first", "t_shift": 2.0,
        "window": "random", "fps": 3.0, "height": 16, "weight_decay": 1.0, "max_grad_norm": 9.0,
        "pcgrad": "exact", "cls_token": "", "ref_position": "far", "crop_jitter": 0.1,
        "targets": ("q",), "lora_tokens": "ref",
        "view_drop": 0.5, "dropout": "tokens", "base_storage": "fp8",
    }  # fmt: skip
    plain = train.kept_settings(train.Config(), 1)
    kept = {name: train.kept_settings(train.Config(**{name: value}), 1) for name, value in others.items()}
    assert [name for name, settings in kept.items() if settings == plain] == []


def test_what_is_asked_for_is_what_trains(monkeypatch, tiny, tmp_path):
    seen = []
    monkeypatch.setattr(train, "train", lambda first, training, *rest: seen.append(training) or 0)
    asked = {"--lora-dropout": 0.2, "--t-shift": 3, "--pcgrad": "exact", "--p-video": 0.3}
    asked |= {"--eps": 1e-3, "--weight-decay": 0.5, "--recompute": 0.5}
    run(monkeypatch, train, {"--backbone": tiny, **RUN, **asked, "--out": tmp_path})
    (training,) = seen
    assert {module.dropout for module in lora_modules(training.dit).values()} == {0.2}
    assert training.dit.training and training.dit.recompute == 0.5 and training.schedule.train_shift == 3
    assert training.surgery.mode == "exact" and training.surgery.share == {"identity": 0.7, "motion": 0.3}
    found = training.optimizer.defaults
    assert (found["lr"], found["betas"]) == (0.01, (0.9, 0.95))
    assert (found["eps"], found["weight_decay"]) == (1e-3, 0.5)


@pytest.mark.parametrize(("tokens", "place"), [("all", "beside"), ("ref", "leading")])
def test_a_new_lora_is_as_it_was_asked_for(tokens, place):
    dit, asked = build(WanDiT), {"rank": 4, "alpha": 2.0, "targets": ("attn.q",), "lora_tokens": tokens}
    train.attach(dit, "", train.Config(**asked, ref_position=place))
    found = lora_modules(dit)
    assert {(module.rank, module.alpha) for module in found.values()} == {(4, 2.0)}
    assert {path.split(".", 2)[2] for path in found} == {"attn.q"}
    assert acts_on(dit) == tokens and dit.ref_position == place


def test_rows_are_read_as_they_were_asked_for_and_all_held_out_ones_compared(monkeypatch):
    asked = []
    monkeypatch.setattr(held_out, "check_unseen", lambda *sides: asked.extend(map(list, sides)))
    pairs, clips = str(MEDIA / "pairs"), str(MEDIA / "clips")
    cfg = train.Config(
        pairs=pairs, clips=clips, val_pairs=pairs, val_clips=clips, val_batches=1, height=64, width=96,
        frames=9, fps=4.0, cls_token="<s> ", crop_jitter=0.3, window="random", verify=0,
    )  # fmt: skip
    data, unseen = train.open_rows(cfg, lambda *words: None)
    assert asked == [list(unseen.values()), list(data.values())]
    for rows, jitter, window in ((data, 0.3, True), (unseen, 0.0, False)):  # these look the same every time
        found, moving = rows["identity"], rows["motion"]
        assert (found.cls_token, found.jitter, found.size) == ("<s> ", jitter, (64, 96))
        assert (moving.random, moving.fps, moving.frames, moving.size) == (window, 4, 9, (64, 96))


def test_another_seed_is_another_start_and_another_order_of_the_rows(monkeypatch, tiny, tmp_path):
    orders, starts = [], []

    def kept(first, training, *rest):
        starts.append(next(iter(lora_parameters(training.dit).values())))
        return 0

    monkeypatch.setattr(train, "batches", lambda rows, *how: orders.append(how[:5]))
    monkeypatch.setattr(train, "train", kept)
    for name, seed in (("a", 0), ("b", 0), ("c", 5)):
        run(monkeypatch, train, {"--backbone": tiny, **RUN, "--seed": seed, "--out": tmp_path / name})
    assert torch.equal(starts[0], starts[1]) and not torch.equal(starts[0], starts[2])
    assert orders == [(size, seed, 0, 0, 1) for seed in (0, 0, 5) for size in (2, 1)]


def test_a_film_of_a_run_is_its_shot_in_its_settings(monkeypatch, tiny, tmp_path):
    shots = [{"prompt": "a dog", "seed": 5}, {"prompt": "a cat", "seed": 6}]
    shots[1]["reference_file_name"] = str(MEDIA / "pairs" / "lawn.jpg")
    (tmp_path / "shots.jsonl").write_text("\n".join(map(json.dumps, shots)))
    text = weights.load_backbone(tiny, parts=("text",), log=lambda line: None).text
    seen = keep_what_is_filmed(monkeypatch)
    films = {"--sample-every": 9, "--sample-manifest": tmp_path / "shots.jsonl", "--sample-steps": 7}
    films |= {"--sample-guidance": 3, "--sample-ref-guidance": 2, "--fps": 4, "--frames": 5}
    run(monkeypatch, train, {"--backbone": tiny, **RUN, **films, "--steps": 1, "--out": tmp_path / "run"})
    for shot, (_, texts, negative, ref, cfg, seeds, *_) in zip(shots[::-1], seen[:2], strict=True):
        assert torch.equal(texts, text([shot["prompt"]])) and torch.equal(negative, text([""]))
        assert seeds == [shot["seed"]] and (ref is None) == ("reference_file_name" not in shot)
        assert (cfg.guidance, cfg.ref_guidance, cfg.steps, cfg.fps) == (3, 2, 7, 4)
    film = inspect_clip(tmp_path / "run/samples/step-000001-00.mp4")
    assert film.seconds == pytest.approx(9 / 4)


def test_both_halves_of_a_task_hide_as_many_references(monkeypatch):
    clip = {"clip": torch.zeros(1, 3, 1, 4, 4), "prompt": [""]}
    monkeypatch.setattr(held_out, "halves", lambda rows, batches, size: [clip] * 2 * batches)
    cfg = train.Config(val_batches=3, motion_batch=1)
    losses = held_out.held_out_losses({"motion": None}, train.PAIR_OF, SAME, None, None, cfg)["motion"]
    hidden = [loss.__defaults__[0].keep is not None for loss in losses]
    assert hidden[:3] == hidden[3:] and sum(hidden) == 2
