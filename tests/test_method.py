"""The method: what a step is given, draws and learns, beside formulas, torch's AdamW and the paper."""

import json

import torch
from torch import nn

import train
import weights
from helpers import MEDIA, RUN, keep_what_is_filmed, run
from sdv import objectives
from sdv.lora import lora_modules
from sdv.objectives import TASKS, Losses, draws_of
from sdv.run import held_out
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


def test_every_draw_is_named_by_what_it_is_for():
    def named(task="motion", step=0, micro=0, seed=0):
        found = train.next_draws(task, step, micro, dict.fromkeys(TASKS, 0), train.Config(seed=seed))
        return found.shared.initial_seed(), found.each[0].initial_seed(), torch.initial_seed()

    shared, each, lora = named()
    assert named(step=1)[0] != shared and named(step=1)[2] != lora
    assert named(micro=1)[0] == shared and named(micro=1)[2] != lora
    for other in (named("identity"), named(seed=1)):
        assert other[0] != shared and other[1] != each


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
        "pcgrad": "exact", "cls_token": "", "ref_position": "far", "crop_jitter": 0.1, "backbone": "b",
        "pairs": "p", "clips": "c", "adapter": "a", "targets": ("q",), "lora_tokens": "ref",
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


def test_a_film_of_a_run_is_its_shot_in_its_settings(monkeypatch, tiny, tmp_path):
    shots = [{"prompt": "a dog", "seed": 5}, {"prompt": "a cat", "seed": 6}]
    shots[1]["reference_file_name"] = str(MEDIA / "pairs" / "lawn.jpg")
    (tmp_path / "shots.jsonl").write_text("\n".join(map(json.dumps, shots)))
    text = weights.load_backbone(tiny, parts=("text",), log=lambda line: None).text
    seen = keep_what_is_filmed(monkeypatch)
    films = {"--sample-every": 9, "--sample-manifest": tmp_path / "shots.jsonl", "--sample-steps": 7}
    films |= {"--sample-guidance": 3, "--sample-ref-guidance": 2}
    run(monkeypatch, train, {"--backbone": tiny, **RUN, **films, "--steps": 1, "--out": tmp_path / "run"})
    for shot, (_, texts, negative, ref, cfg, seeds, *_) in zip(shots[::-1], seen[:2], strict=True):
        assert torch.equal(texts, text([shot["prompt"]])) and torch.equal(negative, text([""]))
        assert seeds == [shot["seed"]] and (ref is None) == ("reference_file_name" not in shot)
        assert (cfg.guidance, cfg.ref_guidance, cfg.steps, cfg.fps) == (3, 2, 7, 8)


def test_both_halves_of_a_task_hide_as_many_references(monkeypatch):
    clip = {"clip": torch.zeros(1, 3, 1, 4, 4), "prompt": [""]}
    monkeypatch.setattr(held_out, "halves", lambda rows, batches, size: [clip] * 2 * batches)
    cfg = train.Config(val_batches=3, motion_batch=1)
    losses = held_out.held_out_losses({"motion": None}, train.PAIR_OF, SAME, None, None, cfg)["motion"]
    hidden = [loss.__defaults__[0].keep is not None for loss in losses]
    assert hidden[:3] == hidden[3:] and sum(hidden) == 2
