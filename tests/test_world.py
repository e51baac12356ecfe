"""The micro-world against closed forms (areas, moments, symmetries); its files as the loaders read them."""

import hashlib
import json
import subprocess
import sys
from itertools import combinations

import numpy as np
import pytest
import torch

from microworld import world
from microworld.sprites import COLOURS, COUNT, PATTERNS, SPECIES, Pose, Subject, draw, layer, subject
from sdv.data.media import read_clip, read_image

GREY = np.full((64, 64, 3), 128.0, np.float32)


def lone(species: str, pattern="plain", build=1, trait=0) -> Subject:
    return Subject(0, species, ("red", "blue", "yellow"), pattern, build, trait)


def test_every_number_is_another_subject():
    drawn = {subject(i)[1:] for i in range(0, COUNT, 11)}
    assert COUNT > 500_000 and len(drawn) == len(range(0, COUNT, 11))
    with pytest.raises(ValueError, match="does not exist"):
        subject(COUNT)


@pytest.mark.parametrize("species", SPECIES)
def test_variants_of_a_silhouette_look_different(species):
    """At training size, every pattern, build and trait of one palette can be told from every other."""
    kinds = [(p, b, t) for p in PATTERNS for b in range(3) for t in range(3)]
    seen = [layer(lone(species, *kind), Pose(0.5, 0.5, 0.42, 0.0, False), 64).ravel() for kind in kinds]
    closest = min(np.square(a - b).sum() / np.square(a).sum() for a, b in combinations(seen, 2))
    assert closest > 0.02


@pytest.mark.parametrize("species", SPECIES)
@pytest.mark.parametrize("size", [32, 64])
def test_pose_is_area_and_centre_to_a_fraction_of_a_pixel(species, size):
    x, y, diameter = np.array([0.5, 0.513, 0.47]), np.array([0.5, 0.531, 0.44]), np.array([0.4, 0.41, 0.3])
    cover = layer(lone(species), Pose(x, y, diameter, np.array([0.0, 1.0, 3.0]), False), size)[3]
    grid = (np.arange(size) + 0.5) / size
    area = cover.sum((1, 2))
    radius = np.sqrt(area / np.pi)  # an edge that two parts share is covered twice: a tenth of a pixel more
    np.testing.assert_allclose(radius, diameter * size / 2, atol=0.15)
    np.testing.assert_allclose(cover.sum(1) @ grid / area * size, x * size, atol=0.15)
    np.testing.assert_allclose(cover.sum(2) @ grid / area * size, y * size, atol=0.15)


@pytest.mark.parametrize("species", SPECIES)
def test_symmetries_of_the_grid_are_exact(species):
    def frame(x=0.5, y=0.5, angle=0.0, mirror=False):
        return draw(lone(species, "checks"), Pose(x, y, 0.4, angle, mirror), GREY)[0].astype(int)

    upright = frame()
    assert np.abs(np.rot90(frame(angle=np.pi / 2)) - upright).max() <= 1
    assert np.abs(frame(mirror=True)[:, ::-1] - upright).max() <= 1
    assert np.abs(np.roll(frame(x=0.5 + 3 / 64, y=0.5 - 2 / 64), (2, -3), (0, 1)) - upright).max() <= 1


def test_all_of_the_subject_stays_in_the_frame():
    edge = np.ones((64, 64), bool)
    edge[1:-1, 1:-1] = False
    for i in range(400):
        truth = world.scene(i, 9)
        frames = world.render(truth)
        ground = world.background(truth.background, 64).astype(np.uint8)
        assert np.abs(frames[:, edge].astype(int) - ground[edge]).max() <= 1, (i, truth)


def test_every_colour_stands_out_everywhere():
    colours = np.array(list(COLOURS.values())) / 255
    for name, place in world.BACKGROUNDS.items():
        for ground in (place.ground, *(part.paint for part in place.parts)):
            assert np.linalg.norm(np.array(ground) / 255 - colours, axis=-1).min() >= 0.32, name


def test_splits_never_share_a_subject():
    for seed, other in ((0, 0), (0, 5), (3, 41)):
        for one, two in combinations(world.SPLITS, 2):
            first = {world.split_subject(one, i, seed).index for i in range(3000)}
            assert first.isdisjoint(world.split_subject(two, i, other).index for i in range(3000))


def test_captions_tell_the_scene_and_not_the_subject():
    robot, octopus = lone("robot"), lone("octopus")
    assert world.caption(robot, "left", "sea") == "a robot moves to the left under the sea"
    assert world.caption(octopus, None, "city") == "an octopus in the city"
    assert world.caption(octopus, "spin", "beach", colour=True) == "a red octopus spins around on the beach"
    prompts = [world.scene(i, split="clips").prompt for i in range(300)]
    prompts += [world.pair(i)[1].prompt for i in range(300)]
    prompts += [want.prompt for i in range(75) for want in world.heldout(i)[1]]
    places = " ".join(place.phrase for place in world.BACKGROUNDS.values())
    telling = set(COLOURS) - set(places.split())
    assert len(telling) >= 8 and telling.isdisjoint(" ".join(prompts).split())
    named = np.mean([world.scene(i).prompt.split()[1] in COLOURS for i in range(400)])
    assert 0.4 < named < 0.6
    words = set(" ".join(world.scene(i).prompt for i in range(3000)).split())
    assert len(words) < 100


def test_scenes_of_a_pair_differ_and_heldout_motions_are_balanced():
    for i in range(200):
        ref, target = world.pair(i)
        assert ref.subject == target.subject and ref.background != target.background
        assert ref.motion is None and target.prompt.endswith(world.BACKGROUNDS[target.background].phrase)
    truths = [(ref, want) for i in range(50) for ref, wanted in [world.heldout(i)] for want in wanted]
    counts = {motion: sum(want.motion == motion for _, want in truths) for motion in world.MOTIONS}
    assert set(counts.values()) == {20}
    assert all(ref.background != want.background for ref, want in truths)


def test_a_clip_shows_the_same_path_at_any_length():
    long, short = (world.path("circle", n, 1.4, np.random.default_rng(1)) for n in (17, 9))
    np.testing.assert_allclose(long.x[::2], short.x)
    np.testing.assert_allclose(long.y[::2], short.y)
    still = world.render(next(scene for scene in map(world.scene, range(99)) if scene.motion == "still"))
    assert (still == still[:1]).all()
    with pytest.raises(ValueError, match="choose one of left"):
        world.path("sideways", 9, 1.4, np.random.default_rng(1))


def write(out, jobs: int) -> dict[str, str]:
    counts = [f"--{split}=3" for split in ("base", "pairs", "clips", "heldout")]
    command = [sys.executable, "-m", "microworld.world", f"--out={out}", "--size=32", "--frames=9", *counts]
    subprocess.run([*command, f"--jobs={jobs}"], check=True, capture_output=True)
    files = sorted(p for p in out.rglob("*") if p.is_file())
    return {str(p.relative_to(out)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_files_are_ordinary_and_do_not_depend_on_the_processes(tmp_path):
    files = write(tmp_path / "one", 1)
    assert files == write(tmp_path / "two", 2) and len(files) == 3 + 6 + 3 + 6 + 4

    def rows(name):
        return [json.loads(line) for line in (tmp_path / "one" / name).read_text().splitlines()]

    for i, row in enumerate(rows("clips/metadata.jsonl")):
        assert set(row) == {"file_name", "prompt"}
        truth = world.scene(i, 9, "clips")
        frames = torch.from_numpy(world.render(truth, 32)).permute(3, 0, 1, 2)
        read = read_clip(tmp_path / "one" / "clips" / row["file_name"], 9, 8, 32, 32)
        assert row["prompt"] == truth.prompt and psnr(read, frames) > 33
    for i, row in enumerate(rows("pairs/metadata.jsonl")):
        assert set(row) == {"reference_file_name", "target_file_name", "prompt"}
        read = read_image(tmp_path / "one" / "pairs" / row["target_file_name"])
        drawn = torch.from_numpy(world.render(world.pair(i)[1], 32 * world.SCALE)[0]).permute(2, 0, 1)
        assert torch.equal(read, drawn)
    wanted = [want for i in range(3) for want in world.heldout(i, 9)[1]]
    for row, want in zip(rows("heldout/prompts.jsonl"), wanted, strict=True):
        asked = row["subject"], row["motion"], row["background"], row["prompt"]
        assert asked == (want.subject.index, want.motion, want.background, want.prompt)
        white = read_image(tmp_path / "one" / "heldout" / row["white_reference_file_name"])
        assert (white[:, :2] == 250).all()


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    return 10 * float(np.log10(255**2 / (a.float() - b.float()).square().mean().item()))
