"""Files that appear whole or not at all, and are known by what is in them."""

import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from safetensors import SafetensorError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write_whole(path: Path, write: Callable[[Path], object], durable: bool = True) -> None:
    """Let `write` fill a temporary file, then flush it to disk (if `durable`) and give it its name.

    On a full disk, say, the old file stays, nothing else is left behind, and the OSError names the path.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
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


def unwritable(path: Path, error: Exception) -> OSError:
    """A failed write as one error with the path and what to do."""
    code, reason = getattr(error, "errno", None), getattr(error, "strerror", None)
    reason = reason or str(error).split("\n")[0]
    fix = "free some space there" if code in FULL or "space" in reason else "see to it"
    return OSError(code, f"{reason}; {fix}, then start again", str(path))


def digest(*parts: object) -> str:
    """A short name made of JSON values."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


class Hashes:
    """SHA-256 of files, remembered in a file of its own as long as their size and time of change stay.

    There they have paths relative to it, so that it can be moved with them.
    """

    def __init__(self, memory: Path):
        self.memory = memory
        try:
            self.known = json.loads(memory.read_text())
        except (FileNotFoundError, ValueError):  # none yet, or damaged: only time is lost
            self.known = {}

    def __call__(self, path: Path) -> str:
        stat = path.stat()
        key, state = os.path.relpath(path, self.memory.parent), [stat.st_size, stat.st_mtime_ns]
        if self.known.get(key, [])[:2] != state:
            with open(path, "rb") as file:
                self.known[key] = [*state, hashlib.file_digest(file, "sha256").hexdigest()]
        return self.known[key][2]

    def learn(self, paths: Iterable[Path]) -> None:
        """Hash files in parallel, and remember them for the next run."""
        with ThreadPoolExecutor() as pool:  # hashing leaves Python's lock
            list(pool.map(self, paths))
        write_whole(self.memory, lambda path: path.write_text(json.dumps(self.known)))
