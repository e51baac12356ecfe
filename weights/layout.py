"""What a checkpoint folder holds, known from its configs alone."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

from torch import nn

from sdv.models.cogvideox_dit import CogVideoXConfig
from sdv.models.cogvideox_vae import CogVideoXVAEConfig
from sdv.models.text import T5Config, Tokenizer
from sdv.models.wan_dit import WanConfig
from sdv.models.wan_vae import WanVAEConfig
from sdv.schedule import Schedule
from weights.tensors import Names, read_json

T = TypeVar("T")
DiTConfig = CogVideoXConfig | WanConfig
VAEConfig = CogVideoXVAEConfig | WanVAEConfig


def files_in(path: Path, folder: str) -> list[str]:
    """Of a checkpoint, relative to its path, without the hidden ones, which file managers leave."""
    return sorted(str(file.relative_to(path)) for file in (path / folder).glob("[!.]*") if file.is_file())


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
    schedule: Schedule
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

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(C, T', H', W') of a video of so many frames and pixels."""
        sides = height // self.spatial_ratio, width // self.spatial_ratio
        return self.channels, 1 + (frames - 1) // self.temporal_ratio, *sides


def read_config(file: Path, convert: Callable[[dict], T]) -> T:
    """What a JSON file means. Errors name the file."""
    content = read_json(file)
    try:
        return convert(content)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def same_channels(field_in: str, channels_in: int, field_out: str, channels_out: int) -> None:
    """ValueError for a transformer that takes more than it gives."""
    if channels_in != channels_out:
        raise ValueError(
            f"{field_in} = {channels_in}, {field_out} = {channels_out}: an image-to-video model, which takes "
            "an image beside the noise; the method starts from a text-to-video model"
        )


def require_rows(file: Path, tokenizer: Tokenizer, text: T5Config) -> None:
    """ValueError if the text encoder of a config file has no row for the tokenizer's last id, <cls>."""
    if text.vocab <= tokenizer.cls_id:
        raise ValueError(
            f"{file}: text_encoder has {text.vocab} rows (vocab_size), but <cls> of the tokenizer has id "
            f"{tokenizer.cls_id}: the two are not of one checkpoint, or the table needs more rows"
        )


def same_model(path: Path, dit: DiTConfig, vae: VAEConfig, text: T5Config) -> None:
    """ValueError if the parts of a folder do not fit each other."""
    for what, of, part, wanted in (
        ("channels", dit.channels, "VAE", vae.latent_channels),
        ("features for a word", dit.text_dim, "text encoder", text.dim),
    ):
        if of != wanted:
            raise ValueError(
                f"{path}: the transformer has {of} {what}, the {part} {wanted}: not of one model"
            )
