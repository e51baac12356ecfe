"""Files that appear whole or not at all, and are known by what is in them."""

import errno
import fcntl
import hashlib
import json
import os
import re
import socket
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, TypeVar

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

T, R = TypeVar("T"), TypeVar("R")
RECENT = 2 * 10**9  # nanoseconds; a tick of a file's clock is shorter, even that of FAT
OFTEN = 60  # seconds between two writings of what has been hashed
LARGEST_HEADER = 100_000_000  # bytes that a safetensors file may have
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


IN_THE_WAY = "a file stands in the way; name another folder"


def make_folder(path: Path) -> None:
    """A folder to write in, with its parents. OSError, with the reason and the fix, if it cannot be one."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise FileExistsError(f"{path}: {IN_THE_WAY}") from error
    except OSError as error:
        raise unwritable(path, error) from error
    _require_writable(path, path)


def _require_writable(path: Path, there: Path) -> None:
    if not os.access(there, os.W_OK):
        raise PermissionError(f"{path}: may not be written in; name another folder")


def require_empty(folder: Path) -> None:
    """ValueError or OSError if there are files in it, or if `make_folder` could not make it; makes nothing.

    Hidden files, of a stop, do not count.
    """
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir():
        raise FileExistsError(f"{folder}: {IN_THE_WAY}")
    _require_writable(folder, there)
    if folder.is_dir() and any(not file.name.startswith(".") for file in folder.iterdir()):
        raise ValueError(f"{folder}: not empty; name a new folder")


def path_from(folder: Path, path: Path) -> str:
    """How a file in `folder` names `path`, whatever links lead to both: `..` goes up from the real place."""
    return os.path.relpath(path.parent.resolve() / path.name, folder.resolve())


def lock(path: Path, problem: str) -> BinaryIO:
    """Open a file, for this process alone as long as it is open. ValueError if another one has it.

    On a disk without locks everybody gets it.
    """
    make_folder(path.parent)
    file = open(path, "a+b")  # noqa: SIM115 (whoever holds it closes it)
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # workers do not inherit it, and may outlive a kill
    except (BlockingIOError, PermissionError) as error:
        raise ValueError(f"{path.parent}: {problem}; wait for it, or name another folder") from error
    except OSError:
        pass
    return file


def write_whole(path: Path, write: Callable[[Path], object], durable: bool = True) -> None:
    """Let `write` fill a temporary file, then flush it to disk (if `durable`) and give it its name.

    On a full disk, say, the old file stays, nothing else is left behind, and the OSError names the path.
    """
    make_folder(path.parent)
    # Of one length, since a name holds 255 bytes, and not another process's, on this host or another.
    temporary = path.with_name(f".{digest(path.name, socket.gethostname())[:16]}.{os.getpid()}.tmp")
    try:
        write(temporary)
        if durable:
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch has one of its own
        raise unwritable(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str, durable: bool = True) -> None:
    """As write_whole, in UTF-8."""
    write_whole(path, lambda to: to.write_text(text, encoding="utf-8"), durable)


def unwritable(path: Path, error: Exception) -> OSError:
    """A failed write as one error with the path and what to do."""
    hidden = re.search(r"os error (\d+)", str(error))  # safetensors says the system's number, torch chains it
    cause = error.__context__ if isinstance(error.__context__, OSError) else error
    code = int(hidden[1]) if hidden else getattr(cause, "errno", None)
    reason = os.strerror(code) if code else str(error).split("\n")[0]
    fix = "free some space there" if code in FULL else "see to it"
    return OSError(f"{path}: could not be written ({reason}); {fix}, then start again")


def parse_json(text: str | bytes) -> object:
    """json.loads, but what is nested too deeply is a ValueError like all else that cannot be read."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def save_safetensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file that whoever the umask says can read: left alone, only its owner could."""
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata)
    path.chmod(mode)


def digest(*parts: object) -> str:
    """A short name made of JSON values."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def content_hash(path: str | Path) -> str:
    """SHA-256 of a file, or a name made of those of the files in a folder."""
    if Path(path).is_dir():
        files = sorted(file for file in Path(path).iterdir() if file.is_file())
        return digest(*((file.name, content_hash(file)) for file in files))
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sampled_hash(path: Path, pieces: int = 256, size: int = 4096) -> str:
    """A name made of a file's length and of pieces of it: of gigabytes in no time.

    They are evenly spread, and one is from the middle of each tensor: who changes a matrix changes all of it.
    """
    length = path.stat().st_size
    if length <= pieces * size:
        return content_hash(path)
    places = [(length - size) * i // (pieces - 1) for i in range(pieces)]
    hashed = hashlib.sha256(str(length).encode())
    with open(path, "rb") as file:
        for place in sorted(places + _middles(file)):
            file.seek(place)
            hashed.update(file.read(size))
    return hashed.hexdigest()


def _middles(file: BinaryIO) -> list[int]:
    """Of the tensors in a safetensors file; none of another one, or of a damaged one, which loading tells."""
    size = int.from_bytes(file.read(8), "little")
    try:
        header = parse_json(file.read(size if size < LARGEST_HEADER else 0))
        spans = [entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"]
        return [8 + size + (start + end) // 2 for start, end in spans]
    except (ValueError, KeyError, TypeError, AttributeError):
        return []


class Hashes:
    """SHA-256 of files, remembered in a file of its own until something says that a file is another one.

    A size and a time of change can come with other contents (cp -p, rsync -t, tar). The kernel's own time of
    the last write cannot, and a file moved into the place has another inode; both cost no more than looking.
    Files copied to another disk are hashed again, once. There they have paths relative to the memory, so that
    it can be moved with them.
    """

    def __init__(self, memory: Path):
        self.memory, self.known, self.fresh, self.problem = memory, {}, set(), ""
        self.recall()

    def recall(self) -> None:
        """Read what another process may have learned."""
        try:
            known = parse_json(self.memory.read_bytes())
        except (OSError, ValueError):  # none yet, or damaged: only time is lost
            return
        if isinstance(known, dict):
            self.known |= {key: entry for key, entry in known.items() if isinstance(entry, list)}

    def __call__(self, path: Path) -> str:
        stat = path.stat()
        key = os.path.relpath(path, self.memory.parent)
        state = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
        if self.known.get(key, [])[:-1] != state:
            self.known[key] = [*state, content_hash(path)]
            if time.time_ns() - max(state[1:3]) > RECENT:
                self.fresh.discard(key)
            else:
                self.fresh.add(key)
            self.changed = True
        return self.known[key][-1]

    def learn(self, paths: Collection[Path]) -> dict[Path, str]:
        """Hash files in parallel, and remember what is new. If that cannot be written, `problem` says so."""
        self.changed, found, written = False, {}, time.monotonic()
        with ThreadPoolExecutor() as pool:  # hashing leaves Python's lock
            for path, name in zip(paths, pool.map(self, paths), strict=True):
                found[path] = name
                if time.monotonic() - written > OFTEN:  # terabytes take hours, in which much can end them
                    self._remember()
                    written = time.monotonic()
        self._remember()
        return found

    def _remember(self) -> None:
        if not self.changed:
            return
        self.changed = False  # first: what a thread adds from here on is written the next time
        known = list(self.known.items())
        # One just written could be written once more within the same tick of the clock.
        lasting = {key: entry for key, entry in known if key not in self.fresh}
        try:
            write_text(self.memory, json.dumps(lasting))
        except OSError as error:  # only time is lost
            self.problem = str(error)


def in_threads(work: Callable[[T], R], items: Sequence[T], size: int = 256) -> Iterator[R]:
    """work of each item, in order, by many threads: a look at a file of a network disk is mostly waiting."""
    with ThreadPoolExecutor() as pool:
        for some in pool.map(lambda i: list(map(work, items[i : i + size])), range(0, len(items), size)):
            yield from some
