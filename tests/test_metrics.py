"""Metrics against the truth: real renders, spoilt ones (blur, noise, tint, blocks), every way to cheat."""

from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from microworld import metrics, world
from microworld import movement as clip_metrics

GENERATOR = torch.Generator().manual_seed(0)


@cache
def real(i: int, size: int = 64, frames: int = 17) -> tuple[torch.Tensor, world.Scene]:
    truth = world.scene(i, frames, "clips")
    return world.to_clip(world.render(truth, size)), truth


@cache
def asked() -> list[tuple[torch.Tensor, world.Scene, torch.Tensor]]:
    """(what should come out, its truth, the reference picture) of ten held-out prompts, one a motion."""
    rows = []
    for i in range(5):
        ref, wanted = world.heldout(i)
        picture = world.to_clip(world.render(ref))[:, 0]
        rows += [(world.to_clip(world.render(want)), want, picture) for want in wanted]
    return sorted(rows, key=lambda row: list(world.MOTIONS).index(row[1].motion))[::2]


def mean(change) -> dict[str, float]:
    clips = [change(clip, truth, ref) for clip, truth, ref in asked()]
    return metrics.evaluate(clips, [row[1] for row in asked()], [row[2] for row in asked()])["mean"]


def blur(clip: torch.Tensor, sigma: float) -> torch.Tensor:
    kernel = torch.exp(-((torch.arange(-6.0, 7) / sigma) ** 2) / 2)
    kernel = (kernel / kernel.sum()).view(1, 1, 1, -1)
    frames = F.pad(clip.flatten(0, 1)[:, None], (6,) * 4, mode="replicate")
    return F.conv2d(F.conv2d(frames, kernel), kernel.mT)[:, 0].view(clip.shape)


def noise(clip: torch.Tensor, sigma: float) -> torch.Tensor:
    return clip + sigma * torch.randn(clip.shape, generator=GENERATOR)


def tint(clip: torch.Tensor) -> torch.Tensor:
    return clip + torch.tensor([0.08, -0.06, 0.05]).view(3, 1, 1, 1)


def blocks(clip: torch.Tensor, step: float = 0.25) -> torch.Tensor:
    """JPEG-like: the cosine transform of 8 x 8 blocks, rounded in steps that grow with the frequency."""
    k = torch.arange(8.0)
    basis = torch.cos(np.pi / 8 * (k + 0.5) * k[:, None]) * (torch.where(k > 0, 2.0, 1.0) / 8).sqrt()[:, None]
    tiles = clip.unfold(-2, 8, 8).unfold(-2, 8, 8)
    steps = step * (1 + (k + k[:, None]) / 4)
    tiles = basis.T @ ((basis @ tiles @ basis.T / steps).round() * steps) @ basis
    return tiles.transpose(-3, -2).reshape(clip.shape)


def test_motion_classes_of_200_real_renders():
    right = [metrics.motion_class(metrics.track(real(i)[0])) == real(i)[1].motion for i in range(200)]
    assert np.mean(right) >= 0.98


@pytest.mark.parametrize("size, frames", [(64, 17), (48, 9), (32, 9)])
def test_track_follows_the_truth(size, frames):
    """Centre within half a pixel, angle within 6 degrees, size to the edge's pixels, background found."""
    for i in range(40):
        clip, truth = real(i, size, frames)
        seen = metrics.track(clip)
        turned = truth.pose.angle - truth.pose.angle[0]
        assert seen.place == truth.background
        assert np.abs(seen.blob.x.numpy() - truth.pose.x).max() < 0.5 / size
        assert np.abs(seen.blob.y.numpy() - truth.pose.y).max() < 0.5 / size
        swell = np.log(seen.blob.size.numpy() / truth.pose.size)  # a mask takes in pixels of the edge
        assert swell.min() > -0.03 and swell.max() < 0.06 + 2.5 / size and np.ptp(swell) < 0.1
        assert np.abs(seen.angle.numpy() - turned).max() < np.deg2rad(6)


@pytest.mark.parametrize(
    "change, least",
    [
        (lambda clip: clip, 0.98),
        (lambda clip: blur(clip, 1.0), 0.98),
        (lambda clip: blur(clip, 1.5), 0.90),
        (lambda clip: noise(clip, 0.1), 0.98),
        (tint, 0.98),
        (blocks, 0.95),
        (lambda clip: noise(tint(blocks(blur(clip, 1.0))), 0.06), 0.95),
    ],
    ids=["clean", "blur 1.0 px", "blur 1.5 px", "noise", "tint", "blocks", "all"],
)
def test_the_subject_is_found_among_100_of_its_species(change, least):
    top, motion, place = [], [], []
    for i in range(40):
        clip, truth = real(i)
        seen = metrics.track(change(clip))
        gallery = world.lookalikes(truth.subject)
        top.append(metrics.identity(seen, truth.subject, gallery).rank == 1)
        motion.append(metrics.motion_class(seen) == truth.motion)
        place.append(seen.place == truth.background)
    assert len(set(gallery)) == 99 and truth.subject not in gallery
    assert np.mean(top) >= least and np.mean(motion) >= 0.96 and np.mean(place) >= 0.98


def test_real_renders_score_near_perfect():
    row = mean(lambda clip, truth, ref: clip)
    assert row["top1"] == row["motion"] == row["background"] == 1
    assert row["margin"] > 0.4 and row["colour"] > 0.93 and row["shape"] > 0.9 and row["fit"] > 0.99
    assert row["dynamic"] == 0.9 and row["duplicates"] == 0.1  # all but the one that should stay still
    assert row["smoothness"] > 0.985 and row["flicker"] < 0.001
    assert row["copied"] == 0 and row["layout"] < 0.7 and row["paste"] < 0.6


@pytest.mark.parametrize("species, margin, alike", [(None, -0.5, 0.9), ("rocket", -0.05, 0.8)])
def test_another_subject_is_not_the_subject(species, margin, alike):
    def impostor(clip, truth, ref):
        other = world.lookalikes(truth.subject._replace(species=species or truth.subject.species))[60]
        return world.to_clip(world.render(truth._replace(subject=other)))

    row = mean(impostor)
    assert row["top1"] == 0 and row["margin"] < margin
    assert row["colour"] < 0.5 and row["shape"] < alike
    assert row["motion"] == row["background"] == 1


def test_a_freeze_and_a_shuffle_fail_on_motion_only():
    frozen = mean(lambda clip, truth, ref: clip[:, :1].expand_as(clip))
    assert frozen["top1"] == 1 and frozen["motion"] == 0.1 and frozen["duplicates"] == 1
    assert frozen["dynamic"] == 0 and frozen["smoothness"] == 1
    order = torch.randperm(17, generator=GENERATOR)
    shuffled = mean(lambda clip, truth, ref: clip[:, order])
    assert shuffled["top1"] == 1 and shuffled["motion"] <= 0.2 and shuffled["fit"] < 0.3
    assert shuffled["smoothness"] < 0.97 and shuffled["dynamic"] == 0.9


def test_a_clip_played_backwards_is_the_opposite_motion():
    opposite = {"left": "right", "up": "down", "grow": "shrink"}
    opposite |= {b: a for a, b in opposite.items()}
    for clip, truth, _ in asked():
        assert metrics.motion_class(metrics.track(clip.flip(1))) == opposite.get(truth.motion, truth.motion)


def test_a_pasted_reference_is_a_copy():
    whole = mean(lambda clip, truth, ref: ref[:, None].expand_as(clip))
    assert whole["copied"] == 1 and whole["paste"] > 0.99 and whole["layout"] > 0.99
    assert whole["background"] == 0 and whole["top1"] == 1

    def cut_out(clip, truth, ref):
        """Only the subject is pasted, in place, onto the background that was asked for."""
        mask = metrics.track(ref[:, None]).mask
        ground = world.to_clip(world.background(truth.background, 64).astype(np.uint8)[None])
        return (mask * ref[:, None] + (1 - mask) * ground).expand_as(clip)

    row = mean(cut_out)
    assert row["copied"] == 1 and row["layout"] > 0.9 and row["background"] == 1 and row["paste"] < 0.9


def test_noise_shows_nothing():
    row = mean(lambda clip, truth, ref: torch.randn(clip.shape, generator=GENERATOR))
    assert row["top1"] == row["motion"] == row["background"] == row["colour"] == row["shape"] == 0


def test_measures_that_need_no_truth():
    """On footage of no known world: a rectangular texture that slides by two pixels a frame."""
    generator = torch.Generator().manual_seed(1)
    texture = blur(torch.rand(3, 1, 64, 160, generator=generator) * 2 - 1, 1.5)
    texture = texture / texture.abs().max()
    slide = torch.stack([texture[:, 0, :, k : k + 96] for k in range(0, 34, 2)], 1)
    rest = slide[:, :1].expand_as(slide)
    for fps in (8, 3):  # half a second is no whole number of frames at 3; what enters matches by chance
        assert clip_metrics.speed(slide, fps=fps) == pytest.approx(2 * fps / 64, rel=0.15)
    assert clip_metrics.speed(noise(rest, 0.1)) == 0 and clip_metrics.smoothness(rest) == 1
    assert clip_metrics.smoothness(slide) > 0.98 > clip_metrics.smoothness(slide[:, torch.randperm(17)])
    bulbs = 0.1 * (-1) ** torch.arange(17).view(1, -1, 1, 1)
    assert clip_metrics.flicker(rest * 0.8 + bulbs) == pytest.approx(0.1, rel=0.01)
    stutter = slide[:, torch.arange(17) // 2 * 2]
    assert clip_metrics.duplicates(stutter) == 0.5 and clip_metrics.duplicates(slide) == 0
    assert clip_metrics.paste(slide, slide[:, 5]) > 0.999 > 0.5 > clip_metrics.paste(slide, -slide[:, 5])
    double = F.interpolate(slide.transpose(0, 1), scale_factor=2).transpose(0, 1)
    assert clip_metrics.speed(double) == pytest.approx(clip_metrics.speed(slide), rel=0.01)


def test_wrong_input_is_named():
    with pytest.raises(ValueError, match="a clip is"):
        clip_metrics.speed(torch.zeros(1, 3, 5, 64, 64))
    with pytest.raises(ValueError, match="square"):
        metrics.track(torch.zeros(3, 5, 64, 96))
