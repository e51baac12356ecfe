"""Settings: ranges, conflicts, old names, help. A refusal is one line, before any file is read."""

import select
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import sample
import train
import weights
from helpers import MEDIA, ROOT, RUN, SIZE, argv, full_disk, run
from microworld import claims, demo, gradients, placement, world
from sdv.data.files import sampled_hash, write_text
from sdv.lora import adapt
from sdv.run.films import Shot, film_names, list_film, read_shots
from sdv.run.settings import check_device, parse
from sdv.run.settings import run as call


@pytest.mark.parametrize(
    "words",
    [
        "--save-every 0", "--fps 0", "--fps -8", "--fps nan", "--fps inf", "--rank 0", "--accumulate 0",
        "--identity-batch 0", "--p-video 1.5", "--p-video nan", "--p-video -0.1", "--p-drop 2", "--t-shift 0",
        "--warmup -5", "--betas 0.9", "--betas 0.9 1.1", "--betas 0.9 0.95 0.99", "--device gpu",
        "--device cuda:99", "--device mps", "--seed -1", "--lr 0", "--lr inf", "--eps 0", "--height 0",
        "--frames -1", "--val-batches 0", "--probe-every -1", "--keep -1", "--lora-dropout 1.5", "--alpha 0",
        "--lora-alpha 3", "--sample-every 5", "--dtype float16", "--steps 1.5", "--steps many",
        "--keep-attention --recompute 0",
    ],
)  # fmt: skip
def test_a_setting_that_cannot_be_is_refused_by_its_flag(words, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(train.weights, "load_backbone", None)
    options = {"--backbone": "nowhere", "--out": tmp_path / "run", "--steps": 1, **RUN}
    monkeypatch.setattr(sys, "argv", ["train.py", *argv(options), *words.split()])
    with pytest.raises((ValueError, SystemExit)) as caught:
        train.main()
    said = str(caught.value) + capsys.readouterr().err
    assert words.split()[0] in said and "nowhere" not in said
    assert "\n" not in said.strip() and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "gpus", "said"),
    [("cuda:1", 1, "cpu and cuda x 1"), ("mps", 8, "cpu and cuda x 8"), ("cuda", 0, "cpu")],
)
def test_a_device_that_is_not_here_is_told_what_is(name, gpus, said, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    with pytest.raises(ValueError, match=f"--device {name}: .* this machine has {said}$"):
        check_device(name)


def test_a_gpu_without_kernels_is_refused_before_anything_is_loaded(monkeypatch):
    chip = SimpleNamespace(name="Tesla V100", major=7, minor=0, multi_processor_count=80)
    monkeypatch.setattr("kernels.dispatch.HAVE_TRITON", True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 99)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: chip)
    check_device("cuda:98", kernels=False)
    with pytest.raises(ValueError, match="Tesla V100: .*Ampere"):
        check_device("cuda:98")


@pytest.mark.parametrize("words", ["--p-video 0", "--p-video 1", "--warmup 0", "--workers 0", "--p-drop 1"])
def test_the_edges_of_a_range_are_legal(words):
    cfg = parse(train.Config, "", words.split())
    assert getattr(cfg, words.split()[0][2:].replace("-", "_")) == float(words.split()[1])


@pytest.mark.parametrize(
    "words",
    [
        ["--steps", "0"], ["--guidance", "0.5"], ["--ref-guidance", "nan"], ["--seed", "0", "-1"],
        ["--merge"], ["--lora-alpha", "2"], ["--ref-guidance", "2"], ["--manifest", "m.jsonl"],
        ["--seed", "5", "--prompt", "", "--manifest", "m.jsonl"],
    ],
)  # fmt: skip
def test_sample_refuses_in_the_same_way(words, monkeypatch):
    monkeypatch.setattr(sample.weights, "open_backbone", None)
    monkeypatch.setattr(sys, "argv", ["sample.py", "--backbone", "nowhere", "--prompt", "a dog", *words])
    with pytest.raises(ValueError, match=words[0]):
        sample.main()


@pytest.mark.parametrize(
    ("study", "words"),
    [
        (claims, "--rows nothing"), (claims, "--rows"), (claims, "--cases 0"), (claims, "--ref-guidance nan"),
        (demo, "--cases -1"), (gradients, "--runs no"), (gradients, "--seeds -1"),
        (placement, "--places nowhere"), (world, "--fps 0"), (world, "--pairs -3"), (world, "--size 8"),
    ],
)  # fmt: skip
def test_studies_refuse_in_the_same_way(study, words, capsys):
    with pytest.raises((ValueError, SystemExit)) as caught:
        parse(study.Config, "", words.split())
    said = str(caught.value) + capsys.readouterr().err
    assert words.split()[0] in said and "\n" not in said.strip()


def test_too_little_memory_is_told_with_what_needs_less():
    def full() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.\nMore about it")

    with pytest.raises(SystemExit, match=r"Tried to allocate 20 GiB\.\n.*--tiling"):
        call(full)


def test_ctrl_c_ends_a_command_with_a_line_and_a_shells_loop_with_it():
    """Which goes on after a program that ends by itself, with whatever status."""
    script = "import os, signal; from sdv.run.settings import run\n"
    script += "run(lambda: os.kill(os.getpid(), signal.SIGINT))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "stopped\n")


def test_a_line_is_in_a_log_file_as_soon_as_it_is_said(monkeypatch):
    """A step can take two minutes, and Python keeps 8 KB of lines back where no terminal reads them."""
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    script = "import sys; from sdv.run.settings import run\n"
    script += "run(lambda: print('a step') or int(sys.stdin.read()))"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, text=True, **pipes) as child:
        said = bool(select.select([child.stdout], [], [], 120)[0]) and child.stdout.readline()
        child.communicate("0")
    assert (said, child.returncode) == ("a step\n", 0)


def test_old_names_are_read_for_this_version_with_a_line(capsys):
    words = ["--frozen=fp8", "--no-resume"]
    cfg = parse(train.Config, "", words, train.RENAMED)
    assert (cfg.base_storage, cfg.resume) == ("fp8", False)
    assert "--frozen is called --base-storage now" in capsys.readouterr().err


def test_help_is_grouped_by_concern(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(monkeypatch, train, {"--help": ""})
    said = capsys.readouterr().out
    places = [said.index(f"\n{kind.__doc__}:") for kind in train.Config.__mro__[-2::-1]]
    assert places == sorted(places) and len(places) == 6
    method = said[places[0] : places[1]]
    assert "--p-video" in method and "--rank" not in method


def test_films_have_names_of_their_own_and_are_kept(monkeypatch, tiny, tmp_path, capsys):
    """Prompts without a latin letter, another reference, other settings: five films, none of them lost."""
    options = {"--backbone": tiny, **SIZE, "--steps": 1, "--guidance": 1, "--out": tmp_path}
    changes = [
        {"--prompt": "一只白色的狗在沙滩上奔跑"}, {"--prompt": "一只黑色的猫在草地上睡觉"},
        {"--prompt": "a dog", "--ref": MEDIA / "pairs" / "lawn.jpg"},
        {"--prompt": "a dog", "--ref": MEDIA / "pairs" / "roots.jpg"}, {"--prompt": "a dog", "--steps": 2},
    ]  # fmt: skip
    for change in changes:
        run(monkeypatch, sample, options | change)
    films = {film: film.read_bytes() for film in tmp_path.glob("*.mp4")}
    assert len(films) == 5 and any("狗" in film.name for film in films)
    capsys.readouterr()
    monkeypatch.setattr(sample.weights, "load_backbone", None)
    for change in changes:  # again: nothing is loaded, nothing made
        run(monkeypatch, sample, options | change)
    assert capsys.readouterr().out.count("is there already and is kept") == 5
    assert {film: film.read_bytes() for film in tmp_path.glob("*.mp4")} == films
    assert len((tmp_path / "films.jsonl").read_text().splitlines()) == 5


def test_a_film_has_another_name_with_other_weights_or_another_strength(tiny, tmp_path):
    """Of one folder's name and one weights file's: a merged base, and peft's alpha beside its weights."""
    shot, folder = [Shot("a dog", None, 0)], tmp_path / "base"
    shutil.copytree(tiny, folder)
    dit = weights.load_backbone(folder, parts=("dit",), log=lambda line: None).dit
    adapt(dit, 8, 8.0)
    weights.save_adapter(dit, tmp_path / "peft", "peft")
    adapter = tmp_path / "peft" / "adapter_model.safetensors"

    def name() -> str:
        base = weights.sources(weights.open_backbone(folder))
        return film_names(shot, {"steps": 1}, base, weights.adapter_files(adapter))[0]

    names = [name()]
    config = tmp_path / "peft" / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 8', '"lora_alpha": 64'))
    names.append(name())
    changed = next((folder / "transformer").glob("*.safetensors"))
    tensors = load_file(changed)
    # One layer of a checkpoint that is mostly others: larger than the distance of the pieces.
    key = next(key for key in tensors if key.endswith("ff.net.2.weight"))
    assert tensors[key].nbytes > changed.stat().st_size / 256
    save_file(tensors | {key: tensors[key] + 1}, changed, {"format": "pt"})
    names.append(name())
    assert len(set(names)) == 3 and name() == names[-1]


def test_a_film_is_named_by_every_number_of_its_adapter_and_the_same_in_any_list(tmp_path):
    """A strength is one number among megabytes."""
    files, halves = (tmp_path / "a.safetensors", tmp_path / "b.safetensors"), torch.zeros(2, 2_000_000)
    for i, file in enumerate(files):
        save_file({"a.down": halves[0], "a.up": halves[1], "a.alpha": torch.tensor(1.0 + i)}, file)
    dog, cat = Shot("a dog", None, 0), Shot("a cat", None, 0)
    ((one,), (other,)) = (film_names([dog], {}, [], [file]) for file in files)
    assert one != other and film_names([cat, dog], {}, [], files[:1])[1] == one


def test_a_large_file_is_known_by_each_of_its_tensors(tmp_path):
    """Also by those that lie between the pieces that are evenly spread."""
    file = tmp_path / "base.safetensors"
    tensors = {f"{i:03d}": torch.zeros(1000 if i % 2 else 300_000, dtype=torch.int8) for i in range(20)}
    names = set()
    for changed in (None, *tensors):
        save_file({name: value + (name == changed) for name, value in tensors.items()}, file)
        names.add(sampled_hash(file))
    assert file.stat().st_size > 256 * 4096 and len(names) == 21


def test_settings_that_would_do_nothing_are_refused(monkeypatch, tiny, tiny_wan, tmp_path):
    base = {"--backbone": tiny, **SIZE, "--prompt": "a dog", "--steps": 1, "--out": tmp_path}
    for words in ({"--negative": "ugly"}, {"--dynamic-guidance": ""}):
        with pytest.raises(ValueError, match="--guidance 1 switches guidance off"):
            run(monkeypatch, sample, base | words | {"--guidance": 1})
    options = {"--backbone": tiny, **RUN, "--out": tmp_path / "run"}
    for words, match in (
        ({"--val-every": 25}, "give --val-pairs and --val-clips"),  # 25 and 100 are each other's defaults
        ({"--probe-every": 100}, "give --val-pairs and --val-clips"),
        ({"--cache": MEDIA / "pairs"}, "--cache and --out need folders of their own"),
        ({"--out": MEDIA / "clips"}, "--cache and --out need folders of their own"),
    ):
        with pytest.raises(ValueError, match=match):
            run(monkeypatch, train, options | words)
    with pytest.raises(ValueError, match="--dynamic-guidance is of CogVideoX"):
        run(monkeypatch, sample, base | {"--backbone": tiny_wan, "--dynamic-guidance": ""})


def test_a_list_of_films_that_a_full_disk_has_cut_goes_on_whole(tmp_path):
    for i in range(2):
        list_film(tmp_path, f"{i}.mp4", Shot("a dog", None, i))
    whole = (tmp_path / "films.jsonl").read_bytes()
    with full_disk(len(whole) + 20), pytest.raises(OSError):
        list_film(tmp_path, "2.mp4", Shot("a dog", None, 2))
    list_film(tmp_path, "3.mp4", Shot("a dog", None, 3))
    assert [shot.seed for shot in read_shots(tmp_path / "films.jsonl")] == [0, 1, 3]


def test_a_list_of_films_behind_a_link_names_the_picture_that_was_given(tmp_path, monkeypatch):
    (tmp_path / "disk/deep").mkdir(parents=True)
    (tmp_path / "project").mkdir()
    (tmp_path / "project/out").symlink_to(tmp_path / "disk/deep")
    (tmp_path / "project/dog.png").touch()
    monkeypatch.chdir(tmp_path / "project")
    list_film(Path("out"), "a.mp4", Shot("a dog", Path("dog.png"), 0))
    (shot,) = read_shots(Path("out/films.jsonl"))
    assert shot.ref.samefile("dog.png")
    Path("out/films").mkdir()
    list_film(Path("out/films"), "a.mp4", shot)  # a list that was made of a list
    (shot,) = read_shots(Path("out/films/films.jsonl"))
    assert shot.ref.samefile("dog.png")


def test_a_file_is_written_whatever_the_length_of_its_name_and_of_its_host(tmp_path, monkeypatch):
    monkeypatch.setattr("socket.gethostname", lambda: "a" * 250)
    write_text(tmp_path / ("b" * 255), "whole")
    assert (tmp_path / ("b" * 255)).read_text() == "whole"


def test_a_long_prompt_is_told_and_a_folder_may_have_any_name(monkeypatch, tiny, tmp_path, capsys):
    out, long = tmp_path / "16:9", "a dog that runs along a beach and further along " * 8
    run(monkeypatch, sample, {"--backbone": tiny, **SIZE, "--steps": 1, "--prompt": long, "--out": out})
    assert "1 of 1 captions are cut to" in capsys.readouterr().out and len(list(out.glob("*.mp4"))) == 1


def test_a_manifest_is_filmed_in_one_load_and_goes_on_where_it_was_stopped(monkeypatch, tiny, tmp_path):
    rows = [
        '{"prompt": "a dog", "reference_file_name": "a.jpg", "seed": 3}',
        '{"prompt": "a dog", "reference_file_name": "b.jpg", "kind": "is ignored"}', '{"prompt": "a cat"}',
    ]  # fmt: skip
    for name, source in (("a.jpg", "lawn.jpg"), ("b.jpg", "roots.jpg")):
        (tmp_path / name).write_bytes((MEDIA / "pairs" / source).read_bytes())
    (tmp_path / "m.jsonl").write_text("\ufeff" + "\r\n\n".join(rows), encoding="utf-8")
    options = {"--backbone": tiny, **SIZE, "--steps": 1, "--out": tmp_path}
    options |= {"--manifest": tmp_path / "m.jsonl"}
    load, loaded = sample.weights.load_backbone, []

    def counted(*args, **how):
        loaded.append(how["parts"])
        return load(*args, **how)

    monkeypatch.setattr(sample.weights, "load_backbone", counted)
    run(monkeypatch, sample, options)
    films = sorted(tmp_path.glob("*.mp4"))
    assert len(films) == 3 and loaded == [("text",), ("dit", "vae")]
    films[1].unlink()
    before = films[0].stat().st_mtime_ns
    run(monkeypatch, sample, options)
    assert sorted(tmp_path.glob("*.mp4")) == films and films[0].stat().st_mtime_ns == before
    (tmp_path / "m.jsonl").write_text('{"prompt": "a dog"}\n{"prompt": 3}')
    with pytest.raises(ValueError, match=r"m\.jsonl:2: write an object"):
        run(monkeypatch, sample, options)
