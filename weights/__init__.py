"""Public checkpoints in and out: folders in the diffusers layout, and LoRA adapters."""

from pathlib import Path

from torch import nn

from sdv.cogvideox_dit import CogVideoXDiT
from weights import adapter, cogvideox
from weights.tensors import Names


def names_of(dit: nn.Module) -> Names:
    """The checkpoint names of a transformer's modules."""
    return {CogVideoXDiT: cogvideox.DIT_NAMES}[type(dit)]


def load_adapter(dit: nn.Module, path: Path, alpha: float | None = None) -> str:
    """Add the LoRA in a file to a model; returns what was read and at what scale. See weights.adapter."""
    return adapter.load_adapter(dit, path, names_of(dit), alpha)


def save_adapter(dit: nn.Module, path: Path) -> None:
    """Write a model's LoRA so that diffusers reads it too. See weights.adapter."""
    adapter.save_adapter(dit, path, names_of(dit))
