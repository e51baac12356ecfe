"""The two scripts end to end, on real photos and clips and a tiny random model."""

import errno
import json
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import sample
import train
import weights
from helpers import MEDIA, ROOT, RUN, SIZE, argv, assert_same, fixed_losses, four_pairs, losses, run
from sdv import seeds
from sdv.data.loader import locate
from sdv.objectives import draws_of
from sdv.run import held_out, parallel
from sdv.run import saves as runs


def test_both_losses_fall_and_the_adapter_makes_a_video(monkeypatch, tiny, tmp_path):
    out = tmp_path / "run"
    manifest = tmp_path / "shots.jsonl"
    ref = os.path.relpath(MEDIA / "pairs" / "lawn.jpg", tmp_path)
    manifest.write_text(json.dumps({"prompt": "a dog", "reference_file_name": ref}) + '\n{"prompt": "a cat"}')
    look = {"--sample-every": 25, "--sample-manifest": manifest, "--sample-steps": 2}
    run(monkeypatch, train, {"--backbone": tiny, "--out": out, "--steps": 40, **RUN, **look})
    assert [v.name for v in sorted((out / "samples").iterdir())] == [
        f"step-{step:06d}-{shot:02d}.mp4" for step in (0, 25, 40) for shot in (0, 1)
    ]
    before, after = fixed_losses(tiny, None), fixed_losses(tiny, out / "step-000040" / "adapter.safetensors")
    assert after["identity"] < 0.9 * before["identity"]
    assert after["motion"] < 0.9 * before["motion"]

    options = {
        "--backbone": tiny, "--adapter": out / "step-000040" / "adapter.safetensors", "--steps": 3, **SIZE,
        "--ref": MEDIA / "pairs" / "lawn.jpg", "--out": tmp_path / "samples",
    }  # fmt: skip
    monkeypatch.setattr(
        sys, "argv", ["sample.py", *argv(options), "--prompt", "a dog", "a cat", "--seed", "0", "1"]
    )
    sample.main()
    videos = sorted((tmp_path / "samples").glob("*.mp4"))
    assert [v.name.rpartition("-")[0] for v in videos] == [
        f"{words}-seed{seed}" for words in ("a-cat", "a-dog") for seed in (0, 1)
    ]
    assert len({v.read_bytes() for v in videos}) == 4


@pytest.mark.parametrize("extra", [{}, {"--coin": "micro", "--dropout": "tokens", "--lora-dropout": 0.2}])
def test_a_resumed_run_equals_the_one_never_stopped(monkeypatch, tiny, tmp_path, extra):
    options = {"--backbone": tiny, **RUN, "--accumulate": 2, "--window": "random", "--save-every": 3, **extra}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(monkeypatch, train, options | {"--out": whole, "--steps": 6})
    run(monkeypatch, train, options | {"--out": parts, "--steps": 4})
    # The second part goes on from the save at step 3 as if the process had died after it.
    for name in ("adapter.safetensors", "training.pt", "README.md"):
        (parts / "step-000004" / name).unlink()
    (parts / "step-000004").rmdir()
    run(monkeypatch, train, options | {"--out": parts, "--steps": 6, "--resume": ""})
    assert_same(whole, parts, 6)
    assert losses(whole) == losses(parts)


def test_tensorboard_reads_what_the_journal_says(monkeypatch, tiny, tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    options = {"--backbone": tiny, "--out": tmp_path / "run", "--steps": 4, **RUN}
    run(monkeypatch, train, options | {"--tensorboard": ""})
    board = reader.EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    for task in train.PAIR_OF:
        rows = [row for row in losses(tmp_path / "run") if row[1] == task]
        for field, column in (("loss", 2), ("grad_norm", 3)):
            events = board.Scalars(f"metrics/{task}/{field}")
            assert [event.step for event in events] == [row[0] for row in rows]
            assert [event.value for event in events] == pytest.approx([row[column] for row in rows])
        assert any(f"metrics/{task}/quarter {i}" in board.Tags()["scalars"] for i in range(1, 5))


def test_the_coin_is_fair_and_its_own(monkeypatch):
    cfg = train.Config(p_video=0.2)
    draws = [train.draw_task(step, 0, cfg) for step in range(2000)]
    assert abs(draws.count("motion") / 2000 - 0.2) < 0.03
    assert all(train.draw_task(step, micro, cfg) == draws[step] for step in range(50) for micro in range(3))
    mixed = train.Config(coin="micro")
    assert len({train.draw_task(0, micro, mixed) for micro in range(50)}) == 2


def test_captions_are_dropped_in_both_tasks_at_their_share_and_nothing_else_is_drawn_without_it():
    heard = []
    enc = train.Encoders(lambda x: x, lambda prompts: heard.append(prompts), 4, "clip")
    still, moving = torch.zeros(400, 3, 4, 4), torch.zeros(400, 3, 5, 4, 4)
    batches = {"identity": {"target": still, "ref": still}, "motion": {"clip": moving}}
    after = {}
    for p in (0.0, 0.25, 1.0):
        for task, batch in batches.items():
            draws = draws_of((0, 1), [(0, 2, k) for k in range(400)])
            cfg = train.Method(text_drop=p, ref_frame="first")
            train.PAIR_OF[task](batch | {"prompt": ["a dog"] * 400}, enc, cfg, draws)
            gone = heard[-1].count("") / 400
            assert abs(gone - p) <= 4 * (p * (1 - p) / 400) ** 0.5
            after[task, p] = torch.rand((), generator=draws.each[0])
    for task in batches:  # a run without it draws what runs drew before there was the setting
        assert after[task, 0.0] == torch.rand((), generator=seeds.generator(0, 2, 0))


def test_the_reference_of_a_clip_is_moved_as_numpy_moves_it_and_only_as_far_as_is_said():
    enc = train.Encoders(lambda x: x, lambda prompts: prompts, 4, "clip")
    clips = torch.randn(200, 3, 2, 8, 12)
    seen = set()
    for share in (0.0, 0.25):
        draws = draws_of((0, 1), [(0, 2, k) for k in range(200)])
        cfg = train.Method(ref_shift=share, ref_frame="first", p_drop=0.0)
        pair = train.PAIR_OF["motion"]({"clip": clips, "prompt": ["a dog"] * 200}, enc, cfg, draws)
        assert pair.target is clips  # what is denoised stays where it was
        if not share:
            assert pair.ref.equal(clips[:, :, :1])
            assert torch.rand((), generator=draws.each[0]) == torch.rand(
                (), generator=seeds.generator(0, 2, 0)
            )
            continue
        for clip, moved in zip(clips, pair.ref, strict=True):
            wide = np.pad(clip[:, 0].numpy(), ((0, 0), (2, 2), (3, 3)), mode="edge")
            places = [(i, j) for i in range(5) for j in range(7)]
            fits = [
                (i, j) for i, j in places if (wide[:, i : i + 8, j : j + 12] == moved[:, 0].numpy()).all()
            ]
            assert len(fits) == 1
            seen |= set(fits)
    assert len(seen) > 30  # of 5 x 7 places


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_rows(monkeypatch, tiny, tmp_path):
    options = {"--backbone": tiny, "--out": tmp_path / "run", "--steps": 5, **RUN, "--p-video": 0}
    monkeypatch.setattr(train, "identity_pair", None)
    rows = []

    def poisoned(batch, enc, cfg, rng, original=train.PAIR_OF["identity"]):
        pair = original(batch, enc, cfg, rng)
        pair.target[1] = float("nan")
        rows.extend(batch["row"])
        return pair

    monkeypatch.setitem(train.PAIR_OF, "identity", poisoned)
    with pytest.raises(
        FloatingPointError, match=r"step 1, identity: the loss of metadata.jsonl:\d [^,]* is not"
    ) as error:
        run(monkeypatch, train, options)
    good, bad = rows
    assert bad in str(error.value) and good not in str(error.value)


def test_a_gradient_that_is_not_finite_reaches_no_weight(monkeypatch, tiny, tmp_path):
    """The second step has a finite loss and no finite gradient: the run ends there, the first save stays."""
    options = {"--backbone": tiny, "--out": tmp_path, "--steps": 4, **RUN, "--save-every": 1}
    average, steps = train.parallel.average, []

    def poisoned(grads):
        steps.append(1)
        if len(steps) == 2:
            grads[0][0, 0] = float("inf")
        average(grads)

    monkeypatch.setattr(train.parallel, "average", poisoned)
    with pytest.raises(FloatingPointError, match="step 2: the gradient is not finite"):
        run(monkeypatch, train, options)
    assert [save.name for save in runs.saves(tmp_path)] == ["step-000001"]
    run(monkeypatch, train, options | {"--resume": ""})


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"--height": 65}, ValueError, "height 65.*multiple"),
        ({"--frames": 10}, ValueError, "10 frames"),
        ({"--frames": 49}, ValueError, "samoyed"),
        ({"--pairs": "nowhere"}, FileNotFoundError, "nowhere"),
        ({"--clips": MEDIA / "pairs"}, ValueError, "file_name is missing.*a row of pairs"),
        ({"--pairs": MEDIA / "clips" / "metadata.jsonl"}, FileNotFoundError, "is a file; name the folder"),
        ({"--out": MEDIA / "ATTRIBUTION.md"}, FileExistsError, "ATTRIBUTION.md: a file stands in the way"),
        ({"--cache-frames": 4}, ValueError, "--cache"),
        ({"--targets": "attn.x"}, ValueError, "attn.x"),
        ({"--backbone": "nowhere"}, FileNotFoundError, "nowhere"),
        ({"--adapter": MEDIA / "pairs" / "lawn.jpg"}, ValueError, "lawn.jpg"),
    ],
)
def test_bad_input_is_one_error_before_training_starts(monkeypatch, tiny, tmp_path, change, error, match):
    with pytest.raises(error, match=match):
        run(monkeypatch, train, {"--backbone": tiny, "--out": tmp_path / "run", "--steps": 1, **RUN} | change)
    metrics = tmp_path / "run" / "metrics.jsonl"
    assert not metrics.exists() or metrics.read_text() == ""


def test_an_adapter_that_does_not_say_its_alpha_is_refused_at_once_and_goes_on_once_it_is_said(
    monkeypatch, tiny, tmp_path
):
    """The paper's released file is such a one."""
    first = {"--backbone": tiny, "--out": tmp_path / "first", "--steps": 1, **RUN}
    run(monkeypatch, train, first)
    adapter = load_file(tmp_path / "first" / "step-000001" / "adapter.safetensors")
    save_file(adapter, tmp_path / "released.safetensors", metadata={"format": "pt"})
    options = first | {"--out": tmp_path / "second", "--adapter": tmp_path / "released.safetensors"}
    with monkeypatch.context() as patch:
        patch.setattr(train.weights, "load_backbone", None)
        with pytest.raises(ValueError, match=r"released\.safetensors.*--lora-alpha"):
            run(monkeypatch, train, options)
        with pytest.raises(ValueError, match=r"attn\.x"):
            run(monkeypatch, train, first | {"--out": tmp_path / "third", "--targets": "attn.x"})
        given = first | {"--adapter": tmp_path / "first" / "step-000001" / "adapter.safetensors"}
        given |= {"--out": tmp_path / "third"}
        for other in ({"--rank": 4}, {"--alpha": 3}, {"--lora-tokens": "ref"}, {"--targets": "attn.q"}):
            with pytest.raises(ValueError, match=next(iter(other))):  # it has its own
                run(monkeypatch, train, given | other)
    options |= {"--lora-alpha": 6, "--alpha": 6}
    run(monkeypatch, train, options)
    (tmp_path / "released.safetensors").unlink()  # a run that goes on does not need it
    run(monkeypatch, train, options | {"--steps": 2, "--resume": ""})
    with safe_open(tmp_path / "second" / "step-000002" / "adapter.safetensors", "pt") as file:
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])
    assert metadata["transformer.lora_alpha"] == 6


def test_a_picture_that_cannot_be_read_is_found_before_the_weights_are(monkeypatch, tiny, tmp_path):
    shutil.copytree(MEDIA / "pairs", tmp_path / "pairs")
    (tmp_path / "pairs" / "lawn.jpg").write_bytes((MEDIA / "pairs" / "lawn.jpg").read_bytes()[:20_000])
    monkeypatch.setattr(train.weights, "load_backbone", None)
    options = {"--backbone": tiny, "--out": tmp_path / "run", "--steps": 1, **RUN}
    with pytest.raises(ValueError, match="metadata.jsonl:1 .*lawn.jpg"):
        run(monkeypatch, train, options | {"--pairs": tmp_path / "pairs"})


def test_a_finished_run_is_not_overwritten_and_a_changed_setting_is_refused(monkeypatch, tiny, tmp_path):
    options = {"--backbone": tiny, "--out": tmp_path / "run", "--steps": 1, **RUN}
    run(monkeypatch, train, options)
    with pytest.raises(FileExistsError, match="--resume"):
        run(monkeypatch, train, options)
    with pytest.raises(ValueError, match="rank was 8, is 4"):
        run(monkeypatch, train, options | {"--resume": "", "--rank": 4})


def test_sample_refuses_bad_input_before_loading(monkeypatch, tiny, tmp_path):
    base = {"--backbone": tiny, **SIZE, "--prompt": "a dog", "--steps": 1, "--out": tmp_path}
    for change, error, match in (
        ({"--ref": "nowhere.jpg"}, FileNotFoundError, "nowhere.jpg"),
        ({"--sampler": "euler"}, ValueError, "ddim, dpm"),
        ({"--steps": 2000}, ValueError, "2000"),
        ({"--width": 100}, ValueError, "width 100"),
        ({"--adapter": "nowhere.safetensors"}, FileNotFoundError, "nowhere.safetensors"),
        ({"--ref": MEDIA / "pairs"}, FileNotFoundError, "pairs: is a folder"),
        (
            {"--prompt": MEDIA / "pairs" / "metadata.jsonl"},
            ValueError,
            "is a file; give words, or --manifest",
        ),
        ({"--out": MEDIA / "ATTRIBUTION.md"}, FileExistsError, "ATTRIBUTION.md: a file stands in the way"),
        ({"--out": MEDIA / "ATTRIBUTION.md" / "films"}, FileExistsError, "films: a file stands in the way"),
    ):
        with pytest.raises(error, match=match):
            run(monkeypatch, sample, base | change)


def test_a_resumed_run_with_fewer_steps_writes_nothing(monkeypatch, tiny, tmp_path):
    options = {"--backbone": tiny, "--out": tmp_path, **RUN}
    run(monkeypatch, train, options | {"--steps": 2})
    for steps in (1, 2):
        with pytest.raises(ValueError, match=f"--steps {steps}: .*step-000002 is as far"):
            run(monkeypatch, train, options | {"--steps": steps, "--resume": ""})
    assert [save.name for save in runs.saves(tmp_path)] == ["step-000002"]


def test_the_finished_model_is_validated_and_the_vae_is_loaded_once(monkeypatch, tiny, tmp_path):
    for kind in ("pairs", "clips"):
        shutil.copytree(MEDIA / kind, tmp_path / kind)
    (tmp_path / "shots.jsonl").write_text('{"prompt": "a dog"}')
    load, loaded = weights.load_backbone, []

    def counted(path, device, dtype, parts, log):
        loaded.extend(parts)
        return load(path, device, dtype, parts, log)

    monkeypatch.setattr(train.weights, "load_backbone", counted)
    monkeypatch.setattr(held_out, "check_unseen", lambda *rows: None)  # these are copies
    look = {"--val-pairs": tmp_path / "pairs", "--val-clips": tmp_path / "clips", "--val-batches": 1}
    look |= {"--val-every": 2, "--probe-every": 0, "--sample-every": 9, "--sample-steps": 1}
    look |= {"--sample-manifest": tmp_path / "shots.jsonl"}
    options = {"--backbone": tiny, "--out": tmp_path / "run", "--steps": 3, **RUN, **look}
    run(monkeypatch, train, options)
    rows = (tmp_path / "run" / "validation.jsonl").read_text().splitlines()
    assert [row["step"] for row in map(json.loads, rows) if row["task"] == "motion"] == [0, 2, 3]
    assert sorted(loaded) == ["dit", "text", "vae"]
    # Killed in its last look, after the last save: a resumed run does only that.
    films = sorted((tmp_path / "run" / "samples").iterdir())
    films[-1].unlink()
    (tmp_path / "run" / "validation.jsonl").write_text("\n".join(rows[:-1]) + "\n")
    run(monkeypatch, train, options | {"--resume": ""})
    assert sorted((tmp_path / "run" / "samples").iterdir()) == films
    assert (tmp_path / "run" / "validation.jsonl").read_text().splitlines() == rows
    assert [save.name for save in runs.saves(tmp_path / "run")] == ["step-000003"]


def test_a_coin_a_micro_batch_is_resumed_with_the_same_cut_only(monkeypatch, tiny, tmp_path):
    options = {"--backbone": tiny, "--out": tmp_path, **RUN, "--coin": "micro", "--accumulate": 2}
    run(monkeypatch, train, options | {"--steps": 1})
    other = {"--steps": 2, "--resume": "", "--accumulate": 1, "--identity-batch": 4, "--motion-batch": 2}
    with pytest.raises(ValueError, match="changed: cut was"):
        run(monkeypatch, train, options | other)
    run(monkeypatch, train, options | {"--steps": 2, "--resume": ""})
    # Four of one process draw four coins, two of two processes two.
    cut = [train.kept_settings(train.Config(coin="micro", accumulate=n), 4 // n) for n in (4, 2)]
    assert cut[0]["batch"] == cut[1]["batch"] and cut[0] != cut[1]


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"--cache-frames": 1}, "give --cache too"),
        ({"--ref-shift": 0.5}, "changed: cached was True, is False"),
    ],
)
def test_a_cache_that_changes_what_is_drawn_is_kept_to(monkeypatch, tiny, tmp_path, setting, said):
    options = {"--backbone": tiny, "--out": tmp_path / "run", **RUN, **setting, "--cache": tmp_path / "cache"}
    run(monkeypatch, train, options | {"--steps": 1})
    again = {name: value for name, value in options.items() if name != "--cache"}
    with pytest.raises(ValueError, match=said):
        run(monkeypatch, train, again | {"--steps": 2, "--resume": ""})
    config = tmp_path / "run" / "config.json"
    kept = json.loads(config.read_text())
    del kept["cached"]
    config.write_text(json.dumps(kept))  # of a run that began before this was kept
    run(monkeypatch, train, options | {"--steps": 2, "--resume": ""})


def test_a_run_says_where_it_comes_from(monkeypatch, tiny, tmp_path):
    options = {"--backbone": tiny, "--out": tmp_path, **RUN}
    run(monkeypatch, train, options | {"--steps": 1})
    run(monkeypatch, train, options | {"--steps": 2, "--resume": ""})
    first, second = json.loads((tmp_path / "config.json").read_text())["parts"]
    assert (
        first["settings"]["rank"] == 8 and first["settings"]["steps"] == 1 and "--resume" in second["command"]
    )
    assert first["versions"]["torch"] == torch.__version__ and "CPU" in first["device"]


def test_a_run_begun_before_settings_were_renamed_or_added_goes_on(monkeypatch, tiny, tmp_path):
    options = {"--backbone": tiny, "--out": tmp_path, **RUN}
    run(monkeypatch, train, options | {"--steps": 1})
    config = json.loads((tmp_path / "config.json").read_text())
    del config["parts"]
    config["frozen"] = config.pop("base_storage")
    del config["text_drop"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    run(monkeypatch, train, options | {"--steps": 2, "--resume": ""})


def test_a_model_card_lies_beside_every_saved_adapter(monkeypatch, tiny, tmp_path):
    yaml = pytest.importorskip("yaml")
    run(monkeypatch, train, {"--backbone": tiny, "--out": tmp_path / "run", "--steps": 1, **RUN})
    card = (tmp_path / "run" / "step-000001" / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["base_model"] == tiny.name and front["license"] == "other"
    assert "4 pairs of pictures, 3 clips" in card and "rank 8, alpha 8" in card and "--p-video 0.5" in card
    assert "| 2 pairs or 1 clips, in 1 process |" in card


def test_a_model_card_names_the_adapter_that_a_run_began_with_and_a_cached_repository(
    monkeypatch, tiny, tmp_path
):
    base = tmp_path / "hub/models--zai-org--CogVideoX-5b/snapshots/0123abcd"
    shutil.copytree(tiny, base)
    options = {"--backbone": base, "--out": tmp_path / "run", **RUN}
    run(monkeypatch, train, {"--backbone": base, "--out": tmp_path / "first", "--steps": 1, **RUN})
    first = tmp_path / "first/step-000001/adapter.safetensors"
    options = {name: value for name, value in options.items() if name not in ("--rank", "--alpha")}
    run(monkeypatch, train, options | {"--steps": 1, "--adapter": first})
    run(monkeypatch, train, options | {"--steps": 2, "--resume": ""})
    card = (tmp_path / "run/step-000002/README.md").read_text()
    assert "rank 8, alpha 8" in card and "base_model: zai-org/CogVideoX-5b\n" in card


def test_a_row_that_cannot_be_written_costs_no_step(monkeypatch, tiny, tmp_path):
    options = {"--backbone": tiny, **RUN, "--save-every": 9}
    run(monkeypatch, train, options | {"--out": tmp_path / "whole", "--steps": 4})
    write = train.log.RunLog.write

    def broken(self, name: str, row: dict) -> None:
        if row["step"] == 2:
            raise OSError(errno.ESTALE, "Stale file handle")
        write(self, name, row)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="Stale"):
        patch.setattr(train.log.RunLog, "write", broken)
        run(patch, train, options | {"--out": tmp_path / "run", "--steps": 4})
    assert (tmp_path / "run/step-000003").is_dir()
    run(monkeypatch, train, options | {"--out": tmp_path / "run", "--steps": 4, "--resume": ""})
    assert_same(tmp_path / "run", tmp_path / "whole", 4)


def test_a_damaged_checkpoint_is_refused_before_anything_is_encoded(monkeypatch, tiny, tmp_path):
    base = shutil.copytree(tiny, tmp_path / "base")
    file = base / "transformer/diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    options = {"--backbone": base, **RUN, "--cache": tmp_path / "cache", "--out": tmp_path / "run"}
    monkeypatch.setattr(train, "open_rows", None)
    with pytest.raises(ValueError, match="damaged or cut short"):
        run(monkeypatch, train, options)


def test_what_a_file_manager_leaves_is_not_of_the_model(tiny, tmp_path):
    base = shutil.copytree(tiny, tmp_path / "base")
    before = train.weights.sources(train.weights.open_backbone(base))
    (base / "tokenizer/.DS_Store").write_bytes(b"x")
    assert train.weights.sources(train.weights.open_backbone(base)) == before


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"--lora-tokens": "ref"}, "Stock diffusers cannot"),
        ({"--dropout": "tokens"}, "each token of the ref"),
    ],
)
def test_a_model_card_says_how_this_adapter_was_made_and_is_used(monkeypatch, tiny, tmp_path, more, said):
    run(monkeypatch, train, {"--backbone": tiny, "--out": tmp_path, "--steps": 1, **RUN, **more})
    card = (tmp_path / "step-000001" / "README.md").read_text()
    assert said in card and ("load_lora_weights" in card) == ("--dropout" in more)


def test_what_cannot_run_is_refused_before_anything_is_encoded(monkeypatch, tiny, tmp_path):
    monkeypatch.setattr(train.weights, "load_backbone", None)
    monkeypatch.setattr(held_out, "check_unseen", lambda *rows: None)
    row = (MEDIA / "pairs" / "metadata.jsonl").read_text().splitlines()[0]
    shutil.copytree(MEDIA / "pairs", tmp_path / "one")
    (tmp_path / "one" / "metadata.jsonl").write_text(row)
    unseen = {"--val-pairs": tmp_path / "one", "--val-clips": MEDIA / "clips"}
    options = {"--backbone": tiny, **RUN, "--cache": tmp_path / "cache", "--out": tmp_path / "run"}
    for more, match in ((unseen, "too few rows"), ({"--shard": "", "--probe-every": 0}, "with torchrun")):
        with pytest.raises(ValueError, match=match):
            run(monkeypatch, train, options | more)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("moment", [1, 3, 4, 5, 6, 7])
def test_a_step_that_a_sigterm_interrupts_is_given_up_and_comes_again(monkeypatch, tiny, tmp_path, moment):
    """It is asked for at the start of a step and before each of two micro-batches."""
    same = {"--backbone": tiny, **RUN, "--accumulate": 2, "--pcgrad": "buffer-4", "--save-every": 2}
    run(monkeypatch, train, same | {"--out": tmp_path / "whole", "--steps": 4})
    calls, written = [], []
    write_save = runs.write_save
    monkeypatch.setattr(runs, "write_save", lambda *args: (written.append(args[1]), write_save(*args)))

    @contextmanager
    def noted(numbers, device):
        def stop_if_asked(problem=None):
            calls.append(device)
            if len(calls) == moment:
                raise parallel.Stopped

        yield stop_if_asked

    with monkeypatch.context() as patch:
        patch.setattr(parallel, "signals_noted", noted)
        if moment <= 3:
            patch.setattr(sys, "argv", ["train.py", *argv(same | {"--out": tmp_path / "none", "--steps": 4})])
            assert train.main() == 1 and not written
            return
        run(patch, train, same | {"--out": tmp_path / "stopped", "--steps": 4})
    assert written == [(moment - 1) // 3]  # once
    run(monkeypatch, train, same | {"--out": tmp_path / "stopped", "--steps": 4, "--resume": ""})
    assert_same(tmp_path / "whole", tmp_path / "stopped", 4)
    assert losses(tmp_path / "whole") == losses(tmp_path / "stopped")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_cannot_be_read_costs_no_step(monkeypatch, tiny, tmp_path, capsys, workers):
    """The run saves before it ends, and with the file in its place again it is the run without a fault."""
    rows = four_pairs(tmp_path / "pairs")
    same = {"--backbone": tiny, **RUN, "--pairs": tmp_path / "pairs", "--p-video": 0, "--identity-batch": 1}
    same |= {"--steps": 4, "--workers": workers}
    run(monkeypatch, train, same | {"--out": tmp_path / "whole"})
    broken = rows[locate(0, 2, len(rows))[1]].files[1]  # the third step's target
    good = broken.read_bytes()
    broken.write_bytes(good[:2000])
    with pytest.raises(ValueError, match=broken.name):
        run(monkeypatch, train, same | {"--out": tmp_path / "run", "--verify": 0})
    assert "stopped after step 2; --resume goes on" in capsys.readouterr().out
    assert [save.name for save in runs.saves(tmp_path / "run")] == ["step-000002"]
    broken.write_bytes(good)
    run(monkeypatch, train, same | {"--out": tmp_path / "run", "--resume": ""})
    assert_same(tmp_path / "whole", tmp_path / "run", 4)
    assert losses(tmp_path / "whole") == losses(tmp_path / "run")


def test_a_run_that_goes_on_has_its_rows_and_the_folder_for_itself(monkeypatch, tiny, tmp_path):
    shutil.copytree(MEDIA / "pairs", tmp_path / "pairs")
    options = {"--backbone": tiny, **RUN, "--pairs": tmp_path / "pairs", "--out": tmp_path / "run"}
    run(monkeypatch, train, options | {"--steps": 1})
    metadata = tmp_path / "pairs" / "metadata.jsonl"
    rows = metadata.read_text()
    metadata.write_text(rows.rstrip("\n") + "\n" + rows.splitlines()[0] + "\n")
    with pytest.raises(ValueError, match="keeps its settings and rows; changed: data was .*--adapter"):
        run(monkeypatch, train, options | {"--steps": 2, "--resume": ""})
    metadata.write_text(rows)
    hold = f"import time\nfrom sdv.data.files import lock\nheld = lock({str(tmp_path / 'run/.lock')!r}, '')"
    hold = hold.replace("lock('", "lock(Path('").replace("', '')", "'), '')")
    script = f"from pathlib import Path\n{hold}\nprint(flush=True)\ntime.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(ValueError, match="run: another run is writing there"):
            run(monkeypatch, train, options | {"--steps": 2, "--resume": ""})
        other.kill()
    run(monkeypatch, train, options | {"--steps": 2, "--resume": ""})


def test_a_run_goes_on_where_all_its_folders_were_moved(monkeypatch, tiny, tmp_path):
    """As from one machine's scratch disk to another's; but not with another model."""
    here, there = tmp_path / "here", tmp_path / "there"
    for part in ("pairs", "clips"):
        shutil.copytree(MEDIA / part, here / part)
    shutil.copytree(tiny, here / "model")

    def options(home, steps) -> dict:
        folders = {"--backbone": home / "model", "--pairs": home / "pairs", "--clips": f"{home / 'clips'}/"}
        return {**RUN, **folders, "--out": home / "run", "--steps": steps}

    run(
        monkeypatch, train, options(here, 4) | {"--out": tmp_path / "whole", "--resume": ""}
    )  # no save: begins
    run(monkeypatch, train, options(here, 2))
    here.rename(there)
    run(monkeypatch, train, options(there, 4) | {"--resume": ""})
    assert_same(tmp_path / "whole", there / "run", 4)
    file = there / "model" / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, file)
    with pytest.raises(ValueError, match="changed: model was"):
        run(monkeypatch, train, options(there, 5) | {"--resume": ""})


def test_the_last_look_of_a_run_that_is_extended_stays(monkeypatch, tiny, tmp_path):
    unseen = {"--val-pairs": MEDIA / "pairs", "--val-clips": MEDIA / "clips", "--val-batches": 1}
    monkeypatch.setattr(held_out, "check_unseen", lambda *rows: None)
    options = {"--backbone": tiny, **RUN, **unseen, "--val-every": 3, "--probe-every": 0, "--out": tmp_path}
    run(monkeypatch, train, options | {"--steps": 4})
    run(monkeypatch, train, options | {"--steps": 7, "--resume": ""})
    rows = [json.loads(line) for line in (tmp_path / "validation.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [step for step in (0, 3, 4, 6, 7) for _ in train.PAIR_OF]


def test_a_command_line_in_another_encoding_does_not_stop_the_save(monkeypatch, tiny, tmp_path):
    out = tmp_path / "run_\udce9"
    run(monkeypatch, train, {"--backbone": tiny, **RUN, "--out": out, "--steps": 1})
    card = (out / "step-000001" / "README.md").read_text()
    assert "\\udce9" in card and "--rank 8" in card


def test_a_dropout_of_the_lora_keeps_how_a_batch_is_cut():
    def kept(**settings) -> dict:
        return train.kept_settings(train.Config(**settings), 1)

    two = {"identity_batch": 16, "motion_batch": 2, "accumulate": 16}
    assert kept()["batch"] == kept(**two)["batch"] and kept() == kept(**two)
    assert kept(lora_dropout=0.2) != kept(lora_dropout=0.2, **two)


def test_a_model_that_has_diverged_is_said_by_the_look_at_it(monkeypatch, tiny, tmp_path):
    unseen = {"--val-pairs": MEDIA / "pairs", "--val-clips": MEDIA / "clips", "--val-batches": 1}
    monkeypatch.setattr(held_out, "check_unseen", lambda *rows: None)
    options = {"--backbone": tiny, **RUN, **unseen, "--lr": 1e30, "--steps": 3}
    for every, match in (
        ({"--probe-every": 1, "--val-every": 0}, "held-out loss is not finite"),
        ({"--probe-every": 0, "--val-every": 1}, "held-out loss is not finite"),
    ):
        with pytest.raises(FloatingPointError, match=match):
            run(monkeypatch, train, options | every | {"--out": tmp_path / str(every)})


def test_a_run_of_an_earlier_version_goes_on(monkeypatch, tiny, tmp_path):
    """Whose config.json lacks what later ones have, and has null where processes did not count."""
    options = {"--backbone": tiny, **RUN, "--lora-dropout": 0.2, "--out": tmp_path}
    run(monkeypatch, train, options | {"--steps": 1})
    config, new = json.loads((tmp_path / "config.json").read_text()), ("data", "model", "cut")
    old = {name: value for name, value in config.items() if name not in new} | {"processes": None}
    (tmp_path / "config.json").write_text(json.dumps(old))
    run(monkeypatch, train, options | {"--steps": 2, "--resume": ""})
    assert (tmp_path / "step-000002").is_dir()


def test_training_refuses_held_out_copies(monkeypatch, tiny, tmp_path):
    shutil.copytree(MEDIA / "clips", tmp_path / "clips")
    unseen = {"--val-pairs": MEDIA / "pairs", "--val-clips": tmp_path / "clips"}
    with pytest.raises(ValueError, match="is held out .* and trained on"):
        run(monkeypatch, train, {"--backbone": tiny, **RUN, **unseen, "--out": tmp_path / "run"})
