"""Sizes that a backbone can take, and the tokens that they become."""

import dataclasses
import math
from typing import NamedTuple, Protocol, TypeVar

T = TypeVar("T")

# What a model was trained at, and pixels, frames and latents that become one latent or token.
SIZES = ("height", "width", "frames", "fps", "text", "spatial_ratio", "temporal_ratio", "patch")
MODELS = {
    "CogVideoX-5b": dict(zip(SIZES, (480, 720, 49, 8, 226, 8, 4, 2), strict=True)),
    "Wan2.2-TI2V-5B": dict(zip(SIZES, (704, 1280, 121, 24, 512, 16, 4, 2), strict=True)),
}


class Tokens(NamedTuple):
    """Sequence lengths of one sample."""

    text: int
    ref: int
    video: int

    @property
    def total(self) -> int:
        return sum(self)


def require_least(name: str, value: float, least: float) -> None:
    """ValueError unless a setting is a number of at least so much."""
    if not least <= value < math.inf:
        raise ValueError(f"--{name.replace('_', '-')} {value}: use {least:g} or more")


class Model(Protocol):
    """Of weights.Layout: the sizes that a backbone was trained at, and its ratios."""

    height: int
    width: int
    frames: int
    fps: float
    spatial_ratio: int
    temporal_ratio: int
    patch: int


def check_size(height: int, width: int, frames: int, model: Model) -> None:
    """Raise ValueError unless the VAE and the patches divide the size, and frames = temporal_ratio k + 1."""
    step = model.spatial_ratio * model.patch
    for name, value in (("height", height), ("width", width)):
        if value < step or value % step:
            below = max(1, value // step) * step
            raise ValueError(
                f"{name} {value} is not a multiple of {step} (VAE {model.spatial_ratio} x patch "
                f"{model.patch}): use {below} or {below + step}"
            )
    ratio = model.temporal_ratio
    if frames < 1 or (frames - 1) % ratio:
        below = max(0, (frames - 1) // ratio) * ratio + 1
        raise ValueError(f"{frames} frames are not {ratio}k + 1: use {below} or {below + ratio}")


def count_tokens(height: int, width: int, frames: int, text: int, model: Model) -> Tokens:
    """Tokens of one sample: text, one reference frame, and the latent frames of the video."""
    check_size(height, width, frames, model)
    frame = height * width // (model.spatial_ratio * model.patch) ** 2
    return Tokens(text, frame, frame * (1 + (frames - 1) // model.temporal_ratio))


def with_model_defaults(cfg: T, model: Model) -> T:
    """Settings with the model's own values where None was given. ValueError for sizes that it cannot take."""
    missing = [name for name, value in vars(cfg).items() if value is None and hasattr(model, name)]
    cfg = dataclasses.replace(cfg, **{name: getattr(model, name) for name in missing})
    check_size(cfg.height, cfg.width, cfg.frames, model)
    return cfg
