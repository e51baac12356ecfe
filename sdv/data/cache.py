"""Latents and text states of a training set, encoded once: what the frozen networks say does not change.

An entry is named by all that it was made from: the bytes of the file or prompt, the weights of the network,
sizes and precision. Whatever changes gives another name, so a stale entry cannot be used. Shards appear whole
or not at all; one that is damaged all the same is removed, and its entries are made again.
"""

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from sdv.data.files import Hashes, digest, make_folder, save_safetensors, write_whole
from sdv.data.pixels import from_uint8
from sdv.data.rows import Pairs, Row, Rows
from sdv.seeds import generator

VERSION = 2  # of the way from a file to an entry: to be raised when that changes
SHARD_BYTES = 2**28
TORN_SECONDS = 3600  # a temporary file that nobody has written to for so long was left by a killed run
AHEAD = 4  # rows decoded while another one is encoded
# A bar, drawn anew every half a minute where it is not a terminal's: a log file keeps all its states.
bar = partial(tqdm, mininterval=0.1 if sys.stderr.isatty() else 30)


class Shards:
    """Named tensors in the safetensors files of a folder, read by memory map."""

    def __init__(self, folder: Path):
        self.folder, self.where, self.open = folder, {}, {}
        self.waiting, self.waiting_bytes = {}, 0
        if not folder.is_dir():  # one that is there may be for reading only
            make_folder(folder)
        self.damaged = 0
        for torn in folder.glob(".*.tmp"):  # by a process that was killed
            with suppress(OSError):  # the disk may be read-only
                if time.time() - torn.stat().st_mtime > TORN_SECONDS:
                    torn.unlink()
        self.refresh()

    def refresh(self) -> None:
        """Look for shards that other processes have written."""
        for path in sorted(self.folder.glob("[!.]*.safetensors")):
            try:
                path.open("rb").close()  # what may not be read, a colleague's say, is not damaged for that
                with safe_open(path, "pt") as file:  # a file cut short does not fit its header
                    self.where |= dict.fromkeys(file.keys(), path)
            except FileNotFoundError:
                continue  # another process has removed it
            except SafetensorError:
                with suppress(OSError):  # the disk may be read-only
                    path.unlink()
                self.damaged += 1

    def __getstate__(self) -> dict:
        """For a worker process that is not forked."""
        return self.__dict__ | {"open": {}}

    def __contains__(self, name: str) -> bool:
        return name in self.where or name in self.waiting

    def __getitem__(self, name: str) -> Tensor:
        path = self.where[name]
        if (os.getpid(), path) not in self.open:  # a worker process maps the file by itself
            self.open[os.getpid(), path] = safe_open(path, "pt")
        return self.open[os.getpid(), path].get_tensor(name)

    def add(self, name: str, tensor: Tensor) -> None:
        self.waiting[name] = tensor.cpu().contiguous()
        self.waiting_bytes += tensor.nbytes
        if self.waiting_bytes >= SHARD_BYTES:
            self.flush()

    def flush(self) -> None:
        if self.waiting:
            path = self.folder / f"{digest(*sorted(self.waiting))}.safetensors"
            write_whole(path, lambda to: save_safetensors(self.waiting, to))
            self.where |= dict.fromkeys(self.waiting, path)
            self.waiting, self.waiting_bytes = {}, 0


class Networks(NamedTuple):
    """What encodes: a picture or clip (1, 3, T, H, W) to latents, one prompt to states (1, L, D)."""

    video: Callable[[Tensor], Tensor]
    text: Callable[[list[str]], Tensor]


class Job(NamedTuple):
    """Fields of one row that have no entry yet: {field: name}."""

    rows: Rows
    index: int
    fields: dict[str, str]


class Cache:
    """The entries of one pair of networks at one precision.

    vae, text: the files they are made of. frames: how many frames of a clip are also encoded alone, to be its
    reference; 0: all, so that any of them is drawn, as without a cache. cleaning: what is done to
    a prompt before it is read, which may depend on what is installed.
    """

    def __init__(
        self,
        folder: str | Path,
        vae: Sequence[Path],
        text: Sequence[Path],
        dtype: str,
        frames: int = 0,
        cleaning: str = "",
    ):
        self.shards, self.hashes = Shards(Path(folder)), Hashes(Path(folder) / "hashes.json")
        self.hashes.learn({*vae, *text})
        # What an entry's name is made of beside its own file: whatever changes what the networks give.
        self.video_key = VERSION, dtype, [self.hashes(file) for file in vae]
        self.text_key = VERSION, dtype, [self.hashes(file) for file in text], cleaning
        self.frames = frames

    def text_name(self, prompt: str) -> str:
        return digest("text", self.text_key, prompt)

    def names(self, rows: Rows, row: Row, hashed: Mapping[Path, str] | None = None) -> dict[str, str]:
        """{field of an item: name of its entry}. hashed: of its files, if they have just been looked at."""
        hash_of = self.hashes if hashed is None else hashed.__getitem__
        if isinstance(rows, Pairs):
            made_of = {"ref": [row.files[0]], "target": [row.files[1]]}
        else:
            length = row.files[0], rows.frames, rows.fps
            made_of = {"clip": length, "frames": [*length, self.frames]}
        return {
            field: digest(self.video_key, rows.size, *how, hash_of(file))
            for field, (file, *how) in made_of.items()
        }

    def fill(
        self, sources: Sequence[Rows], prompts: Iterable[str], load: Callable[[], Networks],
        rank: int = 0, world: int = 1, wait: Callable[[], object] = lambda: None,
        from_first: Callable[[set[str]], set[str]] = lambda value: value,
    ) -> str:  # fmt: skip
        """Encode this rank's share of what is missing; says what was done. `load` is called only if needed.

        What has been encoded stays when a bad file ends it. `wait` returns when all ranks have come to it;
        from_first gives all of them the first one's value.
        OSError if something is missing and the folder cannot be written; else it need not be.
        """
        if rank > 0:  # the first reads all files, the others look at what it has learned
            wait()
            self.hashes.recall()
        hashed = self.hashes.learn({file for rows in sources for row in rows.rows for file in row.files})
        if rank == 0:
            wait()
        # All ranks cut the same list, whatever another run has written between their looks into the folder.
        there = from_first(set(self.shards.where))
        entries, jobs = set(), []
        for rows in sources:
            for index, row in enumerate(rows.rows):
                fields = {f: name for f, name in self.names(rows, row, hashed).items() if name not in entries}
                entries |= set(fields.values())
                if missing := {f: name for f, name in fields.items() if name not in there}:
                    jobs.append(Job(rows, index, missing))
        texts = {self.text_name(prompt): prompt for prompt in sorted(prompts)}  # the same order everywhere
        new_texts = [(name, prompt) for name, prompt in texts.items() if name not in there]
        new = sum(len(job.fields) for job in jobs)
        said = f"cache: new are {new} of {len(entries)} latents and {len(new_texts)} of {len(texts)} prompts"
        if others := len(there - entries - texts.keys()):
            said += f"; {others} in the folder are of other data or settings"
        if self.shards.damaged:
            said += f"; {self.shards.damaged} damaged shards were removed"
        if self.hashes.problem:
            said += f"; hashes are not remembered: {self.hashes.problem}"
        if (jobs or new_texts) and not os.access(self.shards.folder, os.W_OK):
            raise PermissionError(
                f"{self.shards.folder}: cannot be written, but {new} of {len(entries)} latents and "
                f"{len(new_texts)} of {len(texts)} prompts are missing; give another --cache"
            )
        if jobs or new_texts:
            networks = load()
            try:
                for name, prompt in bar(new_texts[rank::world], "prompts", disable=rank > 0):
                    self.shards.add(name, networks.text([prompt])[0])
                self._encode(jobs[rank::world], networks.video, rank)
            finally:
                self.shards.flush()
            wait()
        self._see(entries | texts.keys())
        return said

    def _see(self, wanted: set[str]) -> None:
        """Find what others have written: the list of a folder on a network disk may be a minute old."""
        for pause in (0, 1, 10, 60):
            if not wanted <= self.shards.where.keys():
                time.sleep(pause)
                self.shards.refresh()
        if missing := len(wanted - self.shards.where.keys()):
            raise OSError(
                f"{self.shards.folder}: {missing} entries that others wrote are not seen; start again"
            )

    def _encode(self, jobs: list[Job], encode: Callable[[Tensor], Tensor], rank: int) -> None:
        items = zip(jobs, decoded(jobs), strict=True)
        for job, item in bar(items, "latents", len(jobs), disable=rank > 0):
            for field, name in job.fields.items():
                self.shards.add(name, self._latents(item, field, encode))

    def _latents(self, item: dict, field: str, encode: Callable[[Tensor], Tensor]) -> Tensor:
        """A picture's (C, H, W), a clip's (C, T', H, W), or (C, n, H, W) of frames each encoded alone."""
        x = from_uint8(item["clip" if field == "frames" else field])[None]
        if field == "clip":
            return encode(x)[0]
        if field != "frames":
            return encode(x[:, :, None])[0, :, 0]
        length = x.shape[2]
        chosen = torch.linspace(0, length - 1, self.frames or length).round().long().tolist()
        return torch.cat([encode(x[:, :, i : i + 1])[0] for i in chosen], 1)

    def text(self, prompts: list[str]) -> Tensor:
        """States (B, L, D) of prompts that were given to fill."""
        return torch.stack([self.shards[self.text_name(prompt)] for prompt in prompts])


def decoded(jobs: list[Job]) -> Iterator[dict]:
    """The items of jobs in their order. While a GPU encodes, threads decode what comes next.

    Without one they would compete with the encoder for its cores: on two it then took 1.7 times as long.
    """

    def decode(job: Job) -> dict:
        return job.rows.load(job.index, generator(job.index))

    if not torch.cuda.is_available():
        yield from map(decode, jobs)
        return
    with ThreadPoolExecutor(AHEAD) as pool:
        ahead = [pool.submit(decode, job) for job in jobs[:AHEAD]]
        for i in range(len(jobs)):
            yield ahead.pop(0).result()
            ahead += [pool.submit(decode, job) for job in jobs[i + AHEAD : i + AHEAD + 1]]


class Cached(Rows):
    """The rows of pairs or clips with latents where the pixels were."""

    def __init__(self, source: Rows, cache: Cache):
        self.source, self.rows, self.cache = source, source.rows, cache

    def prompt(self, row: Row) -> str:
        return self.source.prompt(row)

    def read(self, row: Row, rng: torch.Generator) -> dict:
        names = self.cache.names(self.source, row)
        if any(name not in self.cache.shards for name in names.values()):
            raise ValueError("its files have changed since the cache was filled; start again")
        latents, prompt = {field: self.cache.shards[name] for field, name in names.items()}, self.prompt(row)
        self.cache.text([prompt])  # so that training, which reads it again, need not wait for the disk
        return {**latents, "prompt": prompt}
