"""Safetensors in and out: one file or an index of shards, renamed by a table, checked in both directions.

A table has a row for every module of a checkpoint: {their path: our path}, `{}` for a number, None for
tensors that are known and not needed. A row may also name a single parameter, where the two sides call it
differently. Whatever a table does not name is an error, never a guess.
"""

import re
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from sdv.data.files import parse_json, save_safetensors, write_whole
from sdv.models.layers import is_finite, stays_float32

Names = dict[str, str | None]

# What diffusers and transformers call the weights of a part.
STEMS = ("diffusion_pytorch_model", "model")
# Dtypes that weights are stored in, as the headers of safetensors and torch call them.
WEIGHTS = {"F64", "F32", "F16", "BF16", "float64", "float32", "float16", "bfloat16"}


class Report(NamedTuple):
    """What was loaded into one module."""

    part: str
    tensors: int
    parameters: int
    stored: str
    dtype: torch.dtype
    gigabytes: float
    seconds: float

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return (
            f"{self.part:<13} {self.tensors:>5} tensors {self.parameters:>14,} parameters  "
            f"{self.stored} -> {dtype}  {self.gigabytes:6.2f} GB  {self.seconds:5.1f} s"
        )


class Checkpoint:
    """The tensors of one folder, read lazily by memory map.

    Raises FileNotFoundError for a missing folder, index or shard and ValueError for a damaged one, before any
    tensor is read.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self.files = {path: _open(path) for path in shards(self.folder)}
        self.where = {name: file for file in self.files.values() for name in file.keys()}
        _require_weights(self)

    def __getitem__(self, name: str) -> Tensor:
        return self.where[name].get_tensor(name)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.where[name].get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """A tensor's stored dtype, as the file headers call it."""
        return self.where[name].get_slice(name).get_dtype()

    def dtypes(self) -> str:
        return "/".join(sorted({self.dtype(name) for name in self.where}))


class Pickle:
    """The tensors of one .pth file, mapped, read without running any code that a pickle may hold."""

    def __init__(self, file: Path):
        self.folder = Path(file)
        if not self.folder.is_file():
            raise FileNotFoundError(f"{file}: missing. Download it again.")
        try:
            self.where = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # a damaged pickle fails in any way
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise ValueError(
                f"{file}: damaged, or more than tensors ({reason}). Download it again."
            ) from error
        if not isinstance(self.where, dict) or not all(isinstance(x, Tensor) for x in self.where.values()):
            raise ValueError(
                f"{file}: holds something else than named tensors: another file of the same name?"
            )
        _require_weights(self)

    def __getitem__(self, name: str) -> Tensor:
        return self.where[name]

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.where[name].shape)

    def dtypes(self) -> str:
        return "/".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in self.where.values()}))


def _require_weights(stored: Checkpoint | Pickle) -> None:
    if not set(filter(None, stored.dtypes().split("/"))) <= WEIGHTS:
        raise ValueError(
            f"{stored.folder}: stored as {stored.dtypes()}: a copy for inference, rounded, and meaningless "
            "without its scales. Download the bf16 or fp32 files."
        )


def shards(folder: Path) -> list[Path]:
    """The safetensors files of a folder. FileNotFoundError names what is missing."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; a checkpoint in the diffusers layout has one")
    stem = next((stem for stem in STEMS if list(folder.glob(f"{stem}.safetensors*"))), None)
    if stem is None:
        raise FileNotFoundError(
            f"{folder}: found neither {STEMS[0]}.safetensors nor {STEMS[1]}.safetensors, nor an index of "
            "shards. Download the folder again."
        )
    index = folder / f"{stem}.safetensors.index.json"
    whole = folder / f"{stem}.safetensors"
    if not index.is_file():
        return [whole]
    if whole.is_file():
        raise ValueError(
            f"{index}: lies beside {whole.name}; which of them is meant? Move the other one away"
        )
    names = read_json(index, "weight_map").values()
    if not all(isinstance(name, str) for name in names):
        raise ValueError(f"{index}: weight_map names something else than files. Download it again.")
    names = sorted(set(names))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{folder / missing[0]}: missing, with {len(missing) - 1} more of the {len(names)} shards that "
            f"{index.name} lists. Download the missing files again."
        )
    return [folder / name for name in names]


def _open(path: Path):
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path}: damaged or cut short ({error}). Download it again.") from error


def read_json(path: Path, field: str | None = None) -> dict:
    """The object in a JSON file, or one field of it. Errors name file and field."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing; a checkpoint in the diffusers layout has one")
    try:
        content = parse_json(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:  # not UTF-8, not JSON, a number or a nesting without end
        raise ValueError(f"{path}: broken JSON ({error})") from error
    if not isinstance(content, dict) or (field is not None and not isinstance(content.get(field), dict)):
        wanted = "" if field is None else f" with the object {field!r}"
        raise ValueError(f"{path}: expected a JSON object{wanted}")
    return content if field is None else content[field]


def rename(key: str, names: Names) -> str | None:
    """Their tensor name -> ours, None if the table ignores it. KeyError if no row fits."""
    module, _, leaf = key.rpartition(".")
    for theirs, ours in names.items():
        pattern = re.escape(theirs).replace(r"\{\}", r"(\d+)")
        for part, end in ((module, f".{leaf}"), (key, "")):
            if match := re.fullmatch(pattern, part):
                return None if ours is None else ours.format(*match.groups()) + end
    raise KeyError(key)


def reverse(names: Names) -> Names:
    """The table for writing: {our path: their path}."""
    return {ours: theirs for theirs, ours in names.items() if ours is not None}


def plan(module: nn.Module, names: Names, checkpoint: Checkpoint | Pickle) -> dict[str, str]:
    """{our parameter: their tensor}, after every name and shape was compared in both directions."""
    shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    found, unknown, wrong = {}, [], []
    for key in checkpoint.where:
        try:
            ours = rename(key, names)
        except KeyError:
            unknown.append(key)
            continue
        if ours is None:
            continue
        if ours not in shapes:
            unknown.append(key)
        elif shapes[ours] != checkpoint.shape(key):
            wrong.append(f"{key} has shape {list(checkpoint.shape(key))}, expected {list(shapes[ours])}")
        found[ours] = key
    missing = sorted(shapes.keys() - found.keys())
    problems = {"unknown tensors": unknown, "wrong shapes": wrong, "missing tensors": missing}
    for problem, items in problems.items():
        if items:
            raise ValueError(
                f"{checkpoint.folder}: {len(items)} {problem}: {_first(items)}. The files do not fit the "
                "config.json beside them: another model's, or only part of it."
            )
    return found


def _first(items: Iterable[str], n: int = 3) -> str:
    items = list(items)
    return "; ".join(items[:n]) + (f"; and {len(items) - n} more" if len(items) > n else "")


def opened(source: Path) -> Checkpoint | Pickle:
    """Tensors of a folder of safetensors, or of a .pth file."""
    return Pickle(source) if Path(source).suffix == ".pth" else Checkpoint(source)


def load_into(
    module: nn.Module, names: Names, source: Path, device: str | torch.device, dtype: torch.dtype
) -> Report:
    """Give a module on the meta device its parameters, frozen, one tensor at a time.

    source is a folder of safetensors, or a .pth file.
    What the module lists as `in_float32` stays in that, whatever the dtype of the rest.
    """
    start = time.perf_counter()
    checkpoint = opened(source)
    size = count = 0
    for ours, theirs in plan(module, names, checkpoint).items():
        owner, _, leaf = ours.rpartition(".")
        kept = torch.float32 if stays_float32(module, ours) else dtype
        tensor = checkpoint[theirs].to(device=device, dtype=kept)
        if not is_finite(tensor):
            raise ValueError(
                f"{source}: {theirs} has NaN or infinity in {kept}: damaged, or a training that broke. "
                "Download it again."
            )
        setattr(module.get_submodule(owner), leaf, nn.Parameter(tensor, requires_grad=False))
        size += tensor.nbytes
        count += tensor.numel()
    seconds = time.perf_counter() - start
    tensors = len(checkpoint.where)
    return Report(Path(source).name, tensors, count, checkpoint.dtypes(), dtype, size / 1e9, seconds)


def save_tensors(
    path: Path,
    tensors: dict[str, Tensor],
    metadata: dict[str, str] | None = None,
    outdated: Path | None = None,
) -> None:
    """Write one file (safetensors, or a .pth without metadata) whole or not at all: flushed, then renamed.

    outdated: a file about the one that is replaced; it goes once the new one is on the disk.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}

    def write(to: Path) -> None:
        if path.suffix == ".pth":
            torch.save(tensors, to)
        else:
            save_safetensors(tensors, to, metadata)
        if outdated:
            outdated.unlink(missing_ok=True)

    write_whole(path, write)


def save_module(module: nn.Module, names: Names, path: Path, dtype: torch.dtype | None = None) -> None:
    """Write a module's parameters under their names, in a dtype or each in its own."""
    table = reverse(names)
    tensors = {rename(name, table): parameter.to(dtype) for name, parameter in module.named_parameters()}
    save_tensors(path, tensors, {"format": "pt"})
