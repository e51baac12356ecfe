"""What a checkpoint folder holds, known from its configs alone."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

from torch import nn

from sdv.schedule import NoiseProcess
from weights.tensors import Names, read_json

T = TypeVar("T")


class Part(NamedTuple):
    """One network of a checkpoint: where its tensors lie and how to build the module they fit."""

    folder: str
    file: str  # its name when written as one file
    names: Names
    build: Callable[[], nn.Module]
    root: str = ""  # submodule that the names are relative to
    note: str = ""  # to be told when it is loaded

    @property
    def source(self) -> Path:
        """The folder of its safetensors, or its one .pth file."""
        return Path(self.folder, self.file) if self.file.endswith(".pth") else Path(self.folder)


@dataclass(frozen=True)
class Layout:
    """A checkpoint before its weights are read; sizes are what the model was trained at."""

    path: Path
    parts: dict[str, Part]  # "dit", "vae", "text"
    schedule: NoiseProcess
    files: tuple[str, ...]  # configs and vocabulary, relative to path
    frames: int
    height: int
    width: int
    fps: float
    guidance: float
    negative: str  # prompt to move away from
    spatial_ratio: int  # pixels per latent
    temporal_ratio: int  # frames per latent, after the first
    channels: int  # of a latent
    patch: int  # latents per token, in each direction
    text_tokens: int


def read_config(file: Path, convert: Callable[[dict], T]) -> T:
    """What a JSON file means. Errors name the file."""
    content = read_json(file)
    try:
        return convert(content)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
