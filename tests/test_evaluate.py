"""The command that judges films, whole: on films of the tiny chain; its manifests; what it refuses."""

import csv
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import sample
from benchmarks import evaluate, manifest
from benchmarks.evaluation import films, scores, table, truth
from benchmarks.evaluation.judges import ClipJudge, DinoJudge
from benchmarks.evaluation.scores import Judges, film_scores
from benchmarks.evaluation.subjects import read_subjects
from benchmarks.evaluation.yardsticks import Sample
from microworld import world
from sdv.data.media import fit, write_image, write_video
from sdv.run.films import Shot, read_shots

# Files


def make_subjects(folder: Path) -> Path:
    """Two fish, one of them in three pictures, and a rocket, as DreamBooth has its subjects."""
    for name, number, count in (("fish", 0, 3), ("fish2", 1, 2), ("old_rocket", 2, 1)):
        who = world.heldout(number)[0].subject
        for i in range(count):
            picture = truth.drawn(world.heldout(number)[1][i], who, "white", 64)
            write_image(folder / name / f"{i:02d}.png", picture)
    return folder


@pytest.mark.parametrize(
    ("prompt", "noun", "said"),
    [
        ("A {noun} and a {noun}", "otter", "An otter and an otter"),
        ("a sea {noun} swims", "otter", "a sea otter swims"), ("a {noun}", "dog", "a dog"),
    ],
)  # fmt: skip
def test_an_article_fits_its_noun(prompt, noun, said):
    assert manifest.fill(prompt, noun) == said


def test_a_manifest_is_what_sample_takes(tmp_path, monkeypatch):
    subjects = make_subjects(tmp_path / "subjects")
    (subjects / "prompts_and_classes.txt").write_text(
        "Classes\nsubject_name,class\nfish,fish\nfish2,fish\nold_rocket,aircraft\n\nPrompts\na, b, c\n"
    )
    (tmp_path / "prompts.txt").write_text("a {noun} runs\n\nunder the sea, a red {noun}\n")
    words = ["manifest", subjects, tmp_path / "prompts.txt", tmp_path / "new" / "m.jsonl", "--seeds", 0, 5]
    monkeypatch.setattr(sys, "argv", list(map(str, words)))
    manifest.main()
    shots = read_shots(tmp_path / "new" / "m.jsonl")
    assert len(shots) == 3 * 2 * 2 and all(shot.ref.is_file() for shot in shots)
    assert [shot.prompt for shot in shots[::2]] == [
        "a fish runs", "under the sea, a red fish", "a fish runs", "under the sea, a red fish",
        "an aircraft runs", "under the sea, a red aircraft",
    ]  # fmt: skip
    assert [shot.seed for shot in shots[:2]] == [0, 5]
    (subjects / "prompts_and_classes.txt").unlink()
    assert [subject.noun for subject in read_subjects(subjects)] == ["fish", "fish", "old rocket"]
    hidden = subjects / "fish" / "._00.png"  # as macOS leaves them on other disks
    hidden.touch()
    (subjects / "nouns.csv").write_text("fish,carp\nfish2,carp\nold_rocket,rocket\n", encoding="utf-8-sig")
    found = read_subjects(subjects)
    assert found[0].noun == "carp" and hidden not in found[0].pictures


def call(monkeypatch, module, *words: object) -> None:
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, words)])
    module.main()


def vbench(path: Path, flow: str = "(after - before)[:, :2]") -> Path:
    """A file of functions in the place of VBench's networks."""
    middle = "def interpolate(before, after):\n    return (before + after) / 2\n"
    path.write_text(f"{middle}def flow(before, after):\n    return {flow}\n")
    return path


def write_lines(file: Path, *lines: dict) -> None:
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_the_whole_command_on_films_of_the_tiny_chain(tiny, networks, tmp_path, monkeypatch):
    subjects, out, base = make_subjects(tmp_path / "subjects"), tmp_path / "films", tmp_path / "base"
    shutil.rmtree(subjects / "old_rocket")
    (tmp_path / "prompts.txt").write_text("a {noun} runs\n")
    call(monkeypatch, manifest, subjects, tmp_path / "prompts.txt", tmp_path / "m.jsonl", "--seeds", 0, 7)
    tiny_films = ["--backbone", tiny, "--height", 64, "--width", 96, "--frames", 9, "--steps", 2]
    call(monkeypatch, sample, *tiny_films, "--manifest", tmp_path / "m.jsonl", "--out", out)
    call(monkeypatch, sample, *tiny_films, "--prompt", "a fish runs", "--out", base)
    options = [
        out, "--manifest", tmp_path / "m.jsonl", "--clip", networks["clip"], "--dino", networks["dino"],
        "--frames", 8, "--base", base, "--subjects", subjects, "--vbench", vbench(tmp_path / "networks.py"),
    ]  # fmt: skip
    call(monkeypatch, evaluate, *options)
    first, memory = (out / "evaluation" / name for name in ("table.md", "scores.jsonl"))
    first, numbers = first.read_text(), (out / "evaluation" / "table.csv").read_text().splitlines()
    numbers = list(csv.DictReader(numbers))
    counts = {row["row"]: int(row["n"]) for row in numbers}
    assert counts == {"films": 4, table.BASE: 2, table.STILL: 2, table.CEILING: 2, table.FLOOR: 2}
    assert [row["measure"] for row in numbers if row["row"] == "films"] == list(scores.MEASURES)
    assert "not comparable" in first and "77.14" in first and "not run" not in first

    # By hand: one film, and the means in the table.
    judges = Judges(ClipJudge(networks["clip"]), DinoJudge(networks["dino"]), frames=8)
    each = [json.loads(line) for line in memory.read_text().splitlines()]
    lines = [json.loads(line) for line in (out / "films.jsonl").read_text().splitlines()]
    frames, fps = films.read_frames(out / lines[0]["file_name"])
    ref, prompt = subjects / "fish" / "00.png", "a fish runs"
    mine = film_scores(frames, fps, prompt, films.canvas(ref, 64, 96), films.as_given(ref, 64, 96), judges)
    assert fps == pytest.approx(8, rel=1e-3) and len(each) == 6
    assert mine == {name: value for name, value in each[0]["scores"].items() if "VBench" not in name}
    mean = np.mean([row["scores"]["CLIP-I"] for row in each[:4]])
    (cell,) = (row for row in numbers if (row["row"], row["measure"]) == ("films", "CLIP-I"))
    assert float(cell["mean"]) == pytest.approx(mean, abs=1e-12) and cell["seeds"] == "2"

    # Stopped in the middle of a line: only that film is judged again, and the table is the same.
    memory.write_text(memory.read_text()[:-30])
    judged = []
    monkeypatch.setattr(evaluate, "film_scores", lambda *a: judged.append(a) or film_scores(*a))
    call(monkeypatch, evaluate, *options)
    assert len(judged) == 1 and (out / "evaluation" / "table.md").read_text() == first
    assert json.loads(memory.read_text().splitlines()[-1])["scores"] == each[-1]["scores"]

    # Some of the films, named by file; nothing but movement where no network is given.
    write_lines(out / "m.jsonl", *lines[1:])
    call(monkeypatch, evaluate, out, "--manifest", out / "m.jsonl", "--frames", 8, "--out", tmp_path / "some")
    text = (tmp_path / "some" / "table.md").read_text()
    assert "| films | 3 |" in text and text.count("not run") == 4 and "DINO-I | smoothness" in text
    assert "CLIP-T, CLIP-I, DINO-I: not run" in text
    assert len(judged) == 4


def test_every_subject_counts_alike_between_floor_and_ceiling():
    def samples(**means: list[float]) -> list[Sample]:
        return [Sample(name, None, {"DINO-I": value}) for name, values in means.items() for value in values]

    # Many dogs that are half of the way, one cat that is all of it; a hat has no other hat to be told from.
    many = {"dog": [0.5] * 9, "cat": [0.9], "hat": [0.1]}
    floor, ceiling = samples(dog=[0.2], cat=[0.4]), samples(dog=[0.8], cat=[0.9], hat=[0.2])
    said = table.position(samples(**many), floor, ceiling, "DINO-I")
    assert "at 73 % of the way" in said and "of 2 subjects" in said  # (0.7 - 0.3) / (0.85 - 0.3)
    assert "no subject" in table.position(samples(hat=[0.1]), floor, ceiling, "DINO-I")


def test_a_film_is_set_beside_the_base_of_its_prompt_and_seed():
    def film(name: str, ref: str | None, prompt: str, seed: int) -> Shot:
        return Shot(prompt, ref and Path(ref), seed, Path(name))

    made = [film("a", "dog", "runs", 0), film("b", "cat", "runs", 1), film("c", "cat", "sits", 5)]
    base = [film("x", None, "runs", 0), film("y", None, "runs", 1), film("z", None, "sits", 0)]
    found = evaluate.base_films(made, base, Path("base"))
    assert found == [film("x", "dog", "runs", 0), film("y", "cat", "runs", 1), film("z", "cat", "sits", 0)]


def test_a_manifest_is_read_as_sample_reads_it(one_film):
    """White space around a prompt is not part of it."""
    write_lines(one_film / "m.jsonl", {"prompt": " a fish\u200b ", "reference_file_name": "ref.png"})
    (found,) = films.read_films(one_film, one_film / "m.jsonl")
    assert found == Shot("a fish", one_film / "ref.png", 0, one_film / "a.mp4")


def test_two_films_of_one_request_are_not_averaged(one_film):
    """As one folder has them after a second sample.py with another guidance."""
    first, second = ({"file_name": name, "prompt": "a fish"} for name in ("a.mp4", "b.mp4"))
    shutil.copy(one_film / "a.mp4", one_film / "b.mp4")
    write_lines(one_film / "films.jsonl", first, second, first)
    write_lines(one_film / "m.jsonl", {"prompt": "a fish"})
    for wanted in (None, one_film / "m.jsonl"):
        with pytest.raises(ValueError, match="a.mp4 and b.mp4 have one prompt, reference and seed"):
            films.read_films(one_film, wanted)
    write_lines(one_film / "m.jsonl", second)
    assert [film.file.name for film in films.read_films(one_film, one_film / "m.jsonl")] == ["b.mp4"]
    write_lines(one_film / "films.jsonl", {"file_name": "a.mp4", "prompt": ""})  # of an unconditional film
    assert [film.prompt for film in films.read_films(one_film)] == [""]


# Refusals


@pytest.fixture
def one_film(tmp_path) -> Path:
    """A folder with a film, its reference and its line."""
    frames = fit(torch.from_numpy(world.render(world.scene(0, 9))).movedim(-1, 1), 64, 64).transpose(0, 1)
    write_video(tmp_path / "films" / "a.mp4", frames, 8)
    write_image(tmp_path / "films" / "ref.png", frames[:, 0])
    write_line(tmp_path / "films")
    return tmp_path / "films"


def write_line(folder: Path, **changes: object) -> None:
    line = {"file_name": "a.mp4", "reference_file_name": "ref.png", "prompt": "a fish", "seed": 0} | changes
    kept = {name: value for name, value in line.items() if value is not None}
    write_lines(folder / "films.jsonl", kept)


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda folder: (folder / "films.jsonl").unlink(), "films.jsonl: no such file"),
        (lambda folder: (folder / "films.jsonl").write_text("\n"), "holds no lines"),
        (lambda folder: (folder / "films.jsonl").write_text("{'prompt'"), "films.jsonl:1: write an object"),
        (lambda folder: write_line(folder, prompt=None), "films.jsonl:1: .*prompt"),
        (lambda folder: write_line(folder, seed="x"), "films.jsonl:1: "),
        (
            lambda folder: write_line(folder, file_name="b.mp4"),
            "1 of 1 films are not there, the first .*b.mp4",
        ),
        (
            lambda folder: write_line(folder, file_name=None),
            "films are not there, the first of 'a fish', seed 0",
        ),
        (lambda folder: write_line(folder, reference_file_name=None), "has no reference_file_name"),
        (
            lambda folder: write_line(folder, reference_file_name="b.png"),
            "b.png: no such file; it is the ref",
        ),
        (lambda folder: (folder / "ref.png").write_bytes(b"no"), "ref.png: not a JPEG"),
        (lambda folder: (folder / "a.mp4").write_bytes(b"no"), "a.mp4: cannot be decoded as a video"),
        (lambda folder: None, "a.mp4: has 9 frames, 16 are needed; give a lower --frames"),
    ],
)
def test_what_is_not_there_is_named(one_film, monkeypatch, spoil, message):
    spoil(one_film)
    with pytest.raises((ValueError, OSError), match=message):
        call(monkeypatch, evaluate, one_film)


@pytest.mark.parametrize(
    "flag, spoil, message",
    [
        ("--clip", lambda folder: shutil.rmtree(folder), "no config.json"),
        ("--clip", lambda folder: (folder / "model.safetensors").unlink(), "no weights"),
        ("--clip", lambda folder: (folder / "preprocessor_config.json").unlink(), "no preprocessor_config"),
        ("--clip", lambda folder: (folder / "config.json").write_text("{}"), "no config of transformers"),
        ("--clip", lambda folder: torn(folder / "model.safetensors"), "weights cannot be read"),
        ("--clip", lambda folder: (folder / "tokenizer.json").unlink(), "its tokenizer has 2 tokens"),
        ("--clip", lambda folder: rename_weights(folder, "text_projection", "x"), "1 weights are missing"),
        ("--dino", lambda folder: None, "holds a model of type 'clip'; give one of vit, dinov2"),
        ("--vbench", lambda folder: None, "no such file"),
    ],
)
def test_a_wrong_network_is_refused(one_film, networks, tmp_path, monkeypatch, flag, spoil, message):
    shutil.copytree(networks["clip"], tmp_path / "network")
    spoil(tmp_path / "network")
    with pytest.raises((ValueError, OSError), match=f"{flag}.*{message}|{message}"):
        call(monkeypatch, evaluate, one_film, "--frames", 8, flag, tmp_path / "network")


def torn(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:5000])


def rename_weights(folder: Path, old: str, new: str) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    renamed = {name.replace(old, new): value for name, value in tensors.items()}
    save_file(renamed, folder / "model.safetensors", {"format": "pt"})


def test_other_refusals(one_film, tmp_path, monkeypatch):
    subjects = make_subjects(tmp_path / "subjects")
    networks = vbench(tmp_path / "networks.py", flow="before, after")
    with pytest.raises(ValueError, match=r"--vbench: a function returned tuple for \(1, 2, 64, 64\)"):
        call(monkeypatch, evaluate, one_film, "--frames", 8, "--vbench", networks)
    networks.write_text("raft = None")
    with pytest.raises(ValueError, match="networks.py: has neither a function flow nor interpolate"):
        call(monkeypatch, evaluate, one_film, "--frames", 8, "--vbench", networks)
    base = tmp_path / "base"
    shutil.copytree(one_film, base)
    write_line(base, prompt="a cat")
    with pytest.raises(ValueError, match="--base .*base: has no film of 'a fish'"):
        call(monkeypatch, evaluate, one_film, "--frames", 8, "--base", base)
    (tmp_path / "prompts.txt").write_text("a fish runs\n")
    with pytest.raises(ValueError, match="prompts.txt:1: has no {noun}"):
        call(monkeypatch, manifest, subjects, tmp_path / "prompts.txt", tmp_path / "m.jsonl")
    (subjects / "nouns.csv").write_text("fish,fish\n")
    with pytest.raises(ValueError, match="nouns.csv: has no noun for fish2, old_rocket"):
        read_subjects(subjects)
    (subjects / "empty").mkdir()
    (subjects / "nouns.csv").unlink()
    with pytest.raises(ValueError, match="empty: holds no pictures"):
        read_subjects(subjects)


def test_references_must_be_among_the_subjects(one_film, networks, tmp_path, monkeypatch):
    subjects = make_subjects(tmp_path / "subjects")
    with pytest.raises(ValueError, match="--subjects: .*ref.png is none of its pictures"):
        words = "--frames", 8, "--dino", networks["dino"], "--subjects", subjects
        call(monkeypatch, evaluate, one_film, *words)
