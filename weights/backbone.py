"""A pretrained model as a folder: in the diffusers layout, or in the one that Wan's authors publish."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from sdv.schedule import Schedule
from weights import cogvideox, wan
from weights.layout import Layout
from weights.tensors import load_into, opened, plan, shards

PARTS = ("dit", "vae", "text")


@dataclass
class Backbone:
    """A pretrained model; parts that were not asked for are None."""

    layout: Layout
    dit: nn.Module | None = None
    vae: nn.Module | None = None
    text: nn.Module | None = None

    @property
    def schedule(self) -> Schedule:
        return self.layout.schedule


def open_backbone(path: str | Path) -> Layout:
    """Read the configs of a checkpoint folder, without its weights. ValueError for what is not supported."""
    path = Path(path)
    if path.is_file():
        raise ValueError(
            f"{path}: a single file, without the configs that say what is in it and, if it is scaled fp8, "
            "with rounded weights. Give the folder of the checkpoint as its authors or diffusers publish it"
        )
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such folder, seen from {Path.cwd()}; name that of a checkpoint")
    return (wan if wan.is_wan(path) else cogvideox).read_layout(path)


def load_backbone(
    path: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    parts: Sequence[str] = PARTS,
    log: Callable[[str], None] = print,
) -> Backbone:
    """Load parts of a checkpoint folder, frozen, tensor by tensor straight to their device and dtype.

    dtype is bf16 or fp32. Missing, damaged, unknown or misshapen tensors raise one error that names them.
    """
    if dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f"dtype {dtype}: use bf16 or fp32; the activations of these models overflow fp16")
    backbone = Backbone(open_backbone(path))
    torch.cuda.empty_cache()  # memory that a part before this one has left would be cut into odd pieces
    for name in parts:
        part = backbone.layout.parts[name]
        with torch.device("meta"):
            module = part.build()
        source = backbone.layout.path / part.source
        log(str(load_into(module.get_submodule(part.root), part.names, source, device, dtype)))
        if part.note:
            log(part.note)
        setattr(backbone, name, module.eval())
    return backbone


def check_weights(layout: Layout, parts: Sequence[str] = PARTS) -> None:
    """ValueError for weights that are cut short or do not fit the configs. Reads headers only."""
    for part in (layout.parts[name] for name in parts):
        with torch.device("meta"):
            module = part.build().get_submodule(part.root)
        plan(module, part.names, opened(layout.path / part.source))


def token_counter(layout: Layout) -> tuple[Callable[[str], int], int]:
    """(tokens of a prompt, how many of them the model reads), without its weights."""
    with torch.device("meta"):
        text = layout.parts["text"].build()
    return text.length, text.tokenizer.max_length


def sources(layout: Layout, parts: Sequence[str] = PARTS) -> list[Path]:
    """The files that parts of a checkpoint are made of: all configs, vocabulary, and their own weights."""
    found = [layout.path / file for file in layout.files]
    for part in (layout.parts[name] for name in parts):
        source = layout.path / part.source
        found += [source] if source.suffix == ".pth" else shards(source)
    return found
