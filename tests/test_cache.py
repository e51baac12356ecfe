"""The cache of latents and text states: the same training bit for bit, nothing stale or torn ever used."""

import os
import pickle
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from threading import Barrier

import pytest
import torch

import sample
import train
import weights
from helpers import MEDIA, ROOT, RUN, assert_same, full_disk, losses, run
from sdv.data import cache as cache_module
from sdv.data import files
from sdv.data.cache import Cache, Cached, Networks
from sdv.data.rows import Clips, Pairs
from sdv.run.films import Shot

SIDES = 64, 96


def count_calls(calls: list):
    """Networks that compute something cheap of what they see, and note every call."""

    def video(clip):
        calls.append(tuple(clip.shape))
        return clip.mean((1, 3, 4), keepdim=True).expand(-1, 4, -1, 2, 3).clone()

    def text(prompts):
        calls.append(prompts[0])
        return torch.full((1, 3, 2), float(len(prompts[0])))

    return lambda: Networks(video, text)


@pytest.fixture
def media(tmp_path):
    for name in ("pairs", "clips"):
        shutil.copytree(MEDIA / name, tmp_path / name)
    return tmp_path


def sources(media):
    return [Pairs(media / "pairs", *SIDES), Clips(media / "clips", 9, 8, *SIDES)]


def prompts_of(media) -> set[str]:
    return {rows.prompt(row) for rows in sources(media) for row in rows.rows}


def new_cache(media, weight=b"one", frames=0):
    network = media / "vae.safetensors"
    if not network.exists() or network.read_bytes() != weight:
        network.write_bytes(weight)
    return Cache(media / "cache", [network], [network], "float32", frames)


@pytest.mark.parametrize("extra", [{}, {"--ref-frame": "first", "--coin": "micro"}])
def test_training_from_a_cache_equals_training_without(monkeypatch, tiny, tmp_path, extra):
    options = {"--backbone": tiny, "--steps": 6, **RUN, **extra}
    run(monkeypatch, train, options | {"--out": tmp_path / "plain"})
    run(monkeypatch, train, options | {"--out": tmp_path / "cached", "--cache": tmp_path / "cache"})
    assert losses(tmp_path / "plain") == losses(tmp_path / "cached")
    assert {task for _, task, _, _ in losses(tmp_path / "plain")} == {"identity", "motion"}
    assert_same(tmp_path / "plain", tmp_path / "cached", 6)

    # A second run finds everything: the frozen networks are not even loaded.
    load, loaded = weights.load_backbone, []

    def watch(*args, **kwargs):
        loaded.append(args[3] if len(args) > 3 else kwargs["parts"])
        return load(*args, **kwargs)

    monkeypatch.setattr(weights, "load_backbone", watch)
    run(monkeypatch, train, options | {"--out": tmp_path / "again", "--cache": tmp_path / "cache"})
    assert loaded == [("dit",)]
    assert_same(tmp_path / "plain", tmp_path / "again", 6)


@pytest.mark.parametrize("ahead", [False, True])
def test_entries_are_what_the_networks_make_of_each_row(media, monkeypatch, ahead):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: ahead)  # threads decode ahead of a GPU
    cache, (pairs, clips) = new_cache(media), sources(media)
    networks = count_calls([])
    cache.fill([pairs, clips], prompts_of(media), networks)
    video, text = networks()
    for i in range(len(pairs)):
        item, cached = pairs[i], Cached(pairs, cache)[i]
        assert torch.equal(cached["ref"], video(item["ref"][None, :, None])[0, :, 0])
        assert torch.equal(cached["target"], video(item["target"][None, :, None])[0, :, 0])
        assert torch.equal(cache.text([cached["prompt"]]), text([item["prompt"]]))
    for i in range(len(clips)):
        clip, cached = clips[i]["clip"][None], Cached(clips, cache)[i]
        assert torch.equal(cached["clip"], video(clip)[0])
        alone = [video(clip[:, :, k : k + 1])[0] for k in range(9)]
        assert torch.equal(cached["frames"], torch.cat(alone, 1))


def test_what_is_there_is_not_encoded_again(media):
    first, second = [], []
    new_cache(media).fill(sources(media), ["a", "b", "a"], count_calls(first))
    new_cache(media).fill(sources(media), ["a", "b"], count_calls(second))
    assert len(set(first)) < len(first)
    assert [call for call in first if isinstance(call, str)] == ["a", "b"]
    assert second == []


def test_what_has_changed_is_encoded_again(media):
    new_cache(media).fill(sources(media), ["a"], count_calls([]))
    pairs, _ = sources(media)
    changed = pairs.rows[0].files[0]
    others = {file for row in pairs.rows for file in row.files if file != changed}
    shutil.copyfile(next(file for file in others if file.suffix == changed.suffix), changed)
    calls = []
    new_cache(media).fill(sources(media), ["a"], count_calls(calls))
    assert calls == []  # the bytes are known, under another name

    changed.write_bytes(changed.read_bytes() + b"\0")
    new_cache(media).fill(sources(media), ["a"], count_calls(calls))
    assert calls == [(1, 3, 1, *SIDES)]

    everything = []
    new_cache(media, weight=b"two").fill(sources(media), ["a"], count_calls(everything))
    assert "a" in everything and len(everything) > len(calls)
    sizes = []
    other = [Pairs(media / "pairs", 64, 64), sources(media)[1]]
    new_cache(media, weight=b"two").fill(other, ["a"], count_calls(sizes))
    assert {call[3:] for call in sizes} == {(64, 64)}


@pytest.mark.parametrize("how", ["written", "moved"])
def test_another_file_of_the_same_size_and_time_is_noticed(media, monkeypatch, how):
    monkeypatch.setattr(files, "RECENT", 0)
    path = sources(media)[0].rows[0].files[0]
    data, stat = path.read_bytes(), path.stat()
    new_cache(media).fill(sources(media), ["a"], count_calls([]))
    place = path if how == "written" else path.with_suffix(".new")
    place.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    os.utime(place, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    os.replace(place, path)
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (stat.st_size, stat.st_mtime_ns)
    calls = []
    new_cache(media).fill(sources(media), ["a"], count_calls(calls))
    assert calls == [(1, 3, 1, *SIDES)]


def test_files_are_hashed_once_unless_they_are_very_new(media, monkeypatch):
    hashed, content_hash = [], files.content_hash
    monkeypatch.setattr(files, "content_hash", lambda path: hashed.append(path) or content_hash(path))
    new_cache(media).fill(sources(media), ["a"], count_calls([]))
    first = len(hashed)
    new_cache(media).fill(sources(media), ["a"], None)  # they could have changed within a tick of the clock
    assert len(hashed) == 2 * first
    monkeypatch.setattr(files, "RECENT", 0)
    new_cache(media).fill(sources(media), ["a"], None)
    before = (media / "cache" / "hashes.json").stat().st_mtime_ns
    del hashed[:]
    new_cache(media).fill(sources(media), ["a"], None)
    assert hashed == []
    assert (media / "cache" / "hashes.json").stat().st_mtime_ns == before


READ_ONLY = """
import sys; sys.path[:0] = [sys.argv[2], sys.argv[3]]
from pathlib import Path
from test_cache import Cached, count_calls, new_cache, prompts_of, sources
media = Path(sys.argv[1]); cache = new_cache(media)
print(cache.fill(sources(media), prompts_of(media), None))
print(Cached(sources(media)[0], cache)[0]["ref"].shape)
try: cache.fill(sources(media), {"b", *prompts_of(media)}, count_calls([]))
except OSError as error: print(error)
"""


def test_a_complete_cache_may_be_read_only(media):
    new_cache(media).fill(sources(media), prompts_of(media), count_calls([]))
    n = len(prompts_of(media))
    cache, words = media / "cache", [sys.executable, "-c", READ_ONLY, media, ROOT, ROOT / "tests"]
    if os.getuid() == 0:  # permissions do not stop root
        bind = 'mount --bind "$0" "$0" && mount -o remount,ro,bind "$0" && exec "$@"'
        words = ["unshare", "-m", "bash", "-c", bind, cache, *words]
        if subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
            pytest.skip("no mounts here")
    else:
        cache.chmod(0o555)
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True)
    cache.chmod(0o755)
    said, shape, error = done.stdout.splitlines()
    assert "cache: new are 0 of" in said and f"and 0 of {n} prompts; hashes are not remembered: " in said
    assert shape == "torch.Size([4, 2, 3])"
    assert f"{cache}: cannot be written, but 0 of" in error and f"1 of {n + 1} prompts are missing" in error


def test_a_full_disk_costs_nothing_but_time(media):
    with (
        full_disk(2000),
        pytest.raises(OSError, match=r"\.safetensors: could not be written .*free some space"),
    ):
        new_cache(media).fill(sources(media), ["a"], count_calls([]))
    assert not [path for path in (media / "cache").iterdir() if path.suffix != ".json"]
    new_cache(media).fill(sources(media), ["a"], count_calls([]))
    new_cache(media).fill(sources(media), ["a"], None)


def test_a_file_that_changes_while_one_trains_is_told(media):
    cache = new_cache(media)
    cache.fill(sources(media), ["a"], count_calls([]))
    pairs = sources(media)[0]
    Path(pairs.rows[0].files[0]).write_bytes(b"another")
    with pytest.raises(ValueError, match=r"metadata\.jsonl:1 .*have changed since the cache was filled"):
        Cached(pairs, cache)[0]


@pytest.mark.parametrize("keep", [0.5, 0.0])
def test_a_torn_shard_is_made_again(media, keep):
    cache = new_cache(media)
    cache.fill(sources(media), {"a", *prompts_of(media)}, count_calls([]))
    truth = Cached(sources(media)[1], cache)[0]["frames"].clone()  # not a view of the file
    (shard,) = (media / "cache").glob("*.safetensors")
    whole = shard.read_bytes()
    shard.write_bytes(whole[: int(len(whole) * keep)])
    (media / "cache" / "hashes.json").write_text('{"torn": ')
    calls, cache = [], new_cache(media)
    said = cache.fill(sources(media), {"a", *prompts_of(media)}, count_calls(calls))
    assert "1 damaged shards were removed" in said
    assert "a" in calls
    assert torch.equal(Cached(sources(media)[1], cache)[0]["frames"], truth)


def test_a_shard_that_may_not_be_read_is_no_damaged_one(media, monkeypatch):
    """A colleague's, in a folder that both write to."""
    cache = new_cache(media)
    cache.fill(sources(media), ["a"], count_calls([]))
    (shard,) = (media / "cache").glob("*.safetensors")
    read = Path.open

    def refused(path, *how, **more):
        if path == shard:
            raise PermissionError(13, "Permission denied", str(path))
        return read(path, *how, **more)

    monkeypatch.setattr(Path, "open", refused)
    with pytest.raises(PermissionError, match=shard.name):
        new_cache(media)
    assert shard.is_file()


def test_a_cache_that_was_read_goes_to_a_worker_that_is_not_forked(media):
    cache = new_cache(media)
    cache.fill(sources(media), prompts_of(media), count_calls([]))
    rows = Cached(sources(media)[0], cache)
    first = rows[0]["target"].clone()
    assert torch.equal(pickle.loads(pickle.dumps(rows))[0]["target"], first)


def test_what_was_encoded_before_a_bad_file_stays(media):
    (media / "pairs" / sources(media)[0].rows[-1].files[0].name).write_bytes(b"not a picture")
    first, second = [], []
    with pytest.raises(ValueError, match="metadata.jsonl"):
        new_cache(media).fill(sources(media)[:1], ["a"], count_calls(first))
    with pytest.raises(ValueError, match="metadata.jsonl"):
        new_cache(media).fill(sources(media)[:1], ["a"], count_calls(second))
    assert "a" in first and "a" not in second


def test_two_processes_share_the_work(media):
    whole, calls = [], ([], [])
    cache = Cache(media / "alone", [], [], "float32")
    cache.fill(sources(media), ["a", "b"], count_calls(whole))
    meet, there = Barrier(2, timeout=60), set()

    def process(rank: int, cache: Cache) -> None:
        cache.fill(
            sources(media), ["a", "b"], count_calls(calls[rank]), rank, 2, meet.wait, lambda mine: there
        )

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(process, (0, 1), [new_cache(media), new_cache(media)]))
    assert calls[0] and calls[1]
    assert sorted(map(str, calls[0] + calls[1])) == sorted(map(str, whole))
    new_cache(media).fill(sources(media), ["a", "b"], None)  # nothing is missing


def test_the_first_rank_reads_the_files_and_the_others_look(media, monkeypatch):
    for file in media.rglob("*.*"):
        os.utime(file, (1e9, 1e9))  # not just written
    read, turns = [], [new_cache(media), new_cache(media)]
    monkeypatch.setattr(files, "content_hash", lambda path: read.append(path) or f"of {path.name}")
    load = count_calls([])
    monkeypatch.setattr(files, "RECENT", 0)
    turns[0].fill(sources(media), {"a dog"}, load)
    known = {file for rows in sources(media) for row in rows.rows for file in row.files}
    assert known <= set(read)
    read.clear()
    turns[1].fill(sources(media), {"a dog"}, load, 1, 2)
    assert read == []


def test_what_others_wrote_is_looked_for_again_before_it_is_missed(media, monkeypatch):
    done, late, pauses = new_cache(media), new_cache(media), []
    done.fill(sources(media), {"a dog"}, count_calls([]))
    refresh = late.shards.refresh
    late.shards.refresh = lambda: len(pauses) > 2 and refresh()  # a network disk that shows them late
    monkeypatch.setattr(cache_module.time, "sleep", pauses.append)
    late._see(set(done.shards.where))
    assert pauses == [0, 1, 10] and late.shards.where == done.shards.where
    with pytest.raises(OSError, match="1 entries that others wrote are not seen; start again"):
        late._see({"never"})


def test_a_worker_reads_the_prompt_ahead_too(media, monkeypatch):
    cache = new_cache(media)
    rows = sources(media)[0]
    cache.fill([rows], prompts_of(media), count_calls([]))
    seen = []
    monkeypatch.setattr(Cache, "text", lambda self, prompts: seen.extend(prompts))
    assert [Cached(rows, cache)[0]["prompt"]] == seen


def test_a_few_frames_of_a_clip_can_stand_for_all(media):
    cache, clips = new_cache(media, frames=3), sources(media)[1]
    cache.fill([clips], prompts_of(media), count_calls([]))
    every = new_cache(media)
    every.fill([clips], prompts_of(media), count_calls([]))
    few, all_of_them = Cached(clips, cache)[0]["frames"], Cached(clips, every)[0]["frames"]
    assert torch.equal(few, all_of_them[:, [0, 4, 8]])


@pytest.mark.parametrize("change", [{"--crop-jitter": 0.1}, {"--window": "random"}])
def test_views_that_change_are_refused(monkeypatch, tiny, tmp_path, change):
    options = {"--backbone": tiny, "--out": tmp_path / "run", "--cache": tmp_path / "cache", **RUN, **change}
    with pytest.raises(ValueError, match="--cache keeps one view"):
        run(monkeypatch, train, options)
    assert not (tmp_path / "cache").exists()


def test_a_text_state_knows_how_its_prompt_was_cleaned(media):
    network = media / "text.safetensors"
    network.write_bytes(b"one")
    names = {
        Cache(media / "c", [network], [network], "float32", 0, way).text_name("a") for way in ("", "ftfy")
    }
    assert len(names) == 2


def test_ranks_cut_one_list_though_another_run_writes_between_their_looks(media):
    """Else they would wait for each other a different number of times."""
    first, waits = new_cache(media), []
    new_cache(media).fill(sources(media), ["a"], count_calls([]))
    second = new_cache(media)  # finds all of it, the first one nothing
    there = set(first.shards.where)
    for rank, cache in enumerate((first, second)):
        wait = partial(waits.append, rank)
        cache.fill(sources(media), ["a"], count_calls([]), rank, 2, lambda w=wait: w(), lambda _: there)
    assert waits.count(0) == waits.count(1) and not there


def test_what_a_killed_run_left_half_written_is_removed_when_nobody_can_be_writing_it(media):
    new, old = (media / "cache" / f".{name}.safetensors.7.tmp" for name in ("new", "old"))
    new_cache(media)
    for torn in (new, old):
        torn.write_bytes(b"half")
    os.utime(old, (0, 0))
    new_cache(media)
    assert new.exists() and not old.exists()


def test_an_entry_is_named_by_all_that_it_is_made_of(tmp_path):
    for word in ("v", "w", "t", "u"):
        (tmp_path / word).write_text(word)

    def names(vae="v", text="t", dtype="float32", frames=0, size=(64, 96), count=9, fps=8):
        cache = Cache(tmp_path / "cache", [tmp_path / vae], [tmp_path / text], dtype, frames)
        of = Pairs(MEDIA / "pairs", *size), Clips(MEDIA / "clips", count, fps, *size)
        named = {field: name for rows in of for field, name in cache.names(rows, rows.rows[0]).items()}
        return named | {"text": cache.text_name("a dog")}

    plain, video = names(), {"ref", "target", "clip", "frames"}
    for change, others in (
        ({"vae": "w"}, video), ({"text": "u"}, {"text"}), ({"dtype": "bfloat16"}, video | {"text"}),
        ({"size": (64, 64)}, video), ({"count": 5}, {"clip", "frames"}), ({"fps": 4}, {"clip", "frames"}),
        ({"frames": 2}, {"frames"}),
    ):  # fmt: skip
        found = names(**change)
        assert {field for field in plain if found[field] != plain[field]} == others, change


def test_latents_are_written_before_all_are_there(monkeypatch, tiny, tmp_path):
    monkeypatch.setattr(cache_module, "SHARD_BYTES", 1)
    run(
        monkeypatch,
        train,
        {"--backbone": tiny, "--steps": 1, **RUN, "--cache": tmp_path / "cache", "--out": tmp_path / "run"},
    )
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) > 10


def test_a_cache_holds_what_films_are_asked_for_and_as_many_frames_as_asked(tiny, tmp_path):
    cfg = train.Config(
        backbone=str(tiny), height=64, width=96, frames=9, fps=8.0, device="cpu", dtype="float32",
        cache=str(tmp_path), cache_frames=3, text_drop=0.1,
    )  # fmt: skip
    shots, film_cfg = [Shot("a dog", None, 0)], sample.Config(str(tiny), negative="ugly")
    folders = [Clips(MEDIA / "clips", 9, 8, 64, 96)]
    layout = weights.open_backbone(tiny)
    enc, vae, store = train.open_encoders(cfg, layout, folders, shots, film_cfg, lambda *words: None)
    said = [folders[0].rows[0].prompt, "a dog", "ugly", ""]  # the last where captions are dropped
    plain = weights.load_backbone(tiny, parts=("text",), log=lambda line: None).text
    assert torch.equal(enc.text(said), torch.cat([plain([prompt]) for prompt in said]))
    assert Cached(folders[0], store)[0]["frames"].shape[1] == 3 and vae is not None
