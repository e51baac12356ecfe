"""Files that appear whole or not at all, and are known by what is in them."""

import errno
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file, then flush it to disk and give it its name.

    On a full disk, say, the old file stays, nothing else is left behind, and the OSError names the path.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch has one of its own
        raise unwritable(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def unwritable(path: Path, error: Exception) -> OSError:
    """A failed write as one error with the path and what to do."""
    hidden = re.search(r"os error (\d+)", str(error))  # safetensors says the system's number, torch chains it
    cause = error.__context__ if isinstance(error.__context__, OSError) else error
    code = int(hidden[1]) if hidden else getattr(cause, "errno", None)
    reason = os.strerror(code) if code else str(error).split("\n")[0]
    fix = "free some space there" if code in FULL else "see to it"
    return OSError(f"{path}: could not be written ({reason}); {fix}, then start again")


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
            self.known[key] = [*state, content_hash(path)]
        return self.known[key][2]

    def learn(self, paths: Iterable[Path]) -> None:
        """Hash files in parallel, and remember them for the next run."""
        with ThreadPoolExecutor() as pool:  # hashing leaves Python's lock
            list(pool.map(self, paths))
        write_whole(self.memory, lambda path: path.write_text(json.dumps(self.known)))
