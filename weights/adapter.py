"""LoRA adapters between the formats of the public tools.

    python -m weights.adapter inspect adapter.safetensors
    python -m weights.adapter convert adapter.safetensors for-comfyui.safetensors --format comfyui
    python -m weights.adapter mean one.safetensors another.safetensors both.safetensors --rank 128
    python -m weights.adapter merge adapter.safetensors merged --backbone CogVideoX-5b

Reading knows the formats of --format by their keys, a folder being peft's. To convert, no weights are
needed: the keys tell CogVideoX from Wan. With --backbone, names and shapes are compared with its config's.
"""

import json
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from sdv.data.files import require_empty, write_text
from sdv.data.sizes import require_least
from sdv.lora import merge as merge_lora
from sdv.lora import require_mergeable
from sdv.models.layers import is_finite
from sdv.run.settings import Parser, run
from weights.adapter_io import check_fit, load_adapter
from weights.backbone import load_backbone, open_backbone
from weights.formats import (
    FORMATS,
    PLACE_NOTE,
    TOKENS_NOTE,
    Adapter,
    Update,
    label,
    read,
    require_target,
    write,
)
from weights.layout import Layout
from weights.tensors import Checkpoint, plan, read_json, save_module

HALF_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16}


def require_new(target: Path) -> None:
    """ValueError if something is there already."""
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise ValueError(f"{target}: is there already; name a new file, or delete it first")


def convert(source: Path, target: Path, format: str, alpha: float | None, backbone: str) -> None:
    """Write an adapter in another format."""
    require_new(target)
    adapter = _read(source, alpha, backbone)
    write(adapter, target, format)
    print(f"{source}: {adapter.format}, {label(adapter.family)}, {adapter}")
    print(f"{target}: {format}")


def inspect(source: Path, alpha: float | None, backbone: str) -> None:
    """Print what an adapter is, and the norm of its update by kind of layer."""
    adapter = _read(source, alpha, backbone)
    tensors = [half for update in adapter.updates.values() for half in (update.A, update.B)]
    dtypes = ", ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors}))
    size, count = sum(tensor.nbytes for tensor in tensors), sum(tensor.numel() for tensor in tensors)
    print(f"{source}: {adapter.format}, {label(adapter.family)}")
    print(f"  LoRA    {adapter}")
    print(f"  stored  {dtypes}, {count:,} parameters, {size / 1e6:.1f} MB")
    print(f"  notes   {', '.join(f'{name} {note}' for name, note in adapter.notes.items()) or 'none'}")
    scaled = "" if adapter.alpha_from else ", if alpha is the rank"
    print(f"  norm of the update{scaled}\n    {'layer':<12} {'count':>6} {'mean':>11} {'largest':>11}")
    kinds = defaultdict(list)
    for ours, update in adapter.updates.items():
        scale = update.scale if adapter.alpha_from else 1.0
        kinds[re.sub(r"^blocks\.\d+\.", "", ours)].append(scale * update.norm())
    for kind, norms in sorted(kinds.items()):
        print(f"    {kind:<12} {len(norms):>6} {sum(norms) / len(norms):>11.4g} {max(norms):>11.4g}")


def mean(
    source: list[Path], target: Path, rank: int | None, dtype: str, alpha: float | None, backbone: str
) -> None:
    """Write the mean of several adapters of one backbone as one adapter, in the first one's format."""
    if len(source) < 2:
        raise ValueError(f"{target}: name two adapters or more, and after them the file to write")
    require_new(target)
    if rank is not None:
        require_least("rank", rank, 1)
    adapters = [_read(path, None, backbone) for path in source]
    adapters = [known if known.alpha_from else _read(known.path, alpha, backbone) for known in adapters]
    for adapter in adapters:
        print(f"{adapter.path}: {adapter.format}, {label(adapter.family)}, {adapter}")
    require_target(target, adapters[0].format)
    both = mean_adapter(adapters, rank, getattr(torch, dtype))
    write(both, target, both.format)
    print(f"{target}: their mean, rank {max(update.rank for update in both.updates.values())}")


def mean_adapter(
    adapters: Sequence[Adapter], rank: int | None = None, dtype: torch.dtype = torch.float32
) -> Adapter:
    """The mean of several LoRAs of one backbone, as one: a model soup (arXiv 2203.05482).

    Runs that see other data, or learn in another way, err in other ways; what they agree on is what they were
    to learn. The mean costs no training, and is sampled like any other adapter. Its ranks are the sum of
    theirs; `rank` keeps only so many directions of an update, the strongest.

    A layer that one of them lacks counts as zero there. ValueError, with the file, for adapters that are not
    of one backbone, or do not agree on what the LoRA acts on and where the reference sits.
    """
    first, notes, updates = adapters[0].known, {}, {}
    for adapter in adapters:
        if adapter.known.family != first.family:
            raise ValueError(f"{adapter.path}: is of another backbone than {first.path}")
        unsaid = {TOKENS_NOTE: "all", PLACE_NOTE: first.family.ref_position}
        for name, note in (unsaid | adapter.notes).items():
            if notes.setdefault(name, note) != note:
                raise ValueError(f"{adapter.path}: has {name} {note}, others {notes[name]}: no mean of these")
    for layer in dict.fromkeys(layer for adapter in adapters for layer in adapter.updates):
        parts = [(adapter, adapter.updates[layer]) for adapter in adapters if layer in adapter.updates]
        (_, like), *_ = parts
        for adapter, part in parts:
            if part.A.shape[1:] != like.A.shape[1:] or len(part.B) != len(like.B):
                raise ValueError(f"{adapter.path}: {layer} is of another size than in {first.path}")
        A = torch.cat([part.A.float() for _, part in parts])
        B = torch.cat([part.scale / len(adapters) * part.B.float() for _, part in parts], 1)
        A, B = (A, B) if rank is None or rank >= len(A) else strongest(A, B, rank)
        updates[layer] = Update(A.to(dtype), B.to(dtype), float(len(A)))
    return replace(first, updates=updates, notes=notes)


def strongest(A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Of A (R, in, ..) and B (out, R, ..) the nearest with a smaller rank: (rank, in, ..), (out, rank, ..).

    By the singular values of B A, found without making it: (out, R) and (R, in) are thin.
    """
    q_in, r_in = torch.linalg.qr(A.double().flatten(1).T)
    q_out, r_out = torch.linalg.qr(B.double().flatten(1))
    U, S, V = torch.linalg.svd(r_out @ r_in.T)
    rank = min(rank, len(S))  # a narrow layer has no more directions
    root = S[:rank].sqrt()
    reads = root[:, None] * (V[:rank] @ q_in.T)
    writes = q_out @ U[:, :rank] * root
    return reads.float().view(rank, *A.shape[1:]), writes.float().view(len(B), rank, *B.shape[2:])


def merge(source: Path, target: Path, alpha: float | None, backbone: str) -> None:
    """Write the backbone's transformer with an adapter in it, in its layout and its stored dtypes."""
    layout = open_backbone(backbone)
    part = layout.parts["dit"]
    folder = target / part.folder
    require_empty(folder)
    # What can be wrong with the adapter is found before the weights are read.
    with torch.device("meta"):
        dit = part.build()
        load_adapter(dit, source, alpha)
    require_mergeable(dit, str(source))
    stored = Checkpoint(layout.path / part.source)
    dtype = torch.bfloat16 if stored.dtypes() == "BF16" else torch.float32  # in which it is added
    dit = load_backbone(backbone, dtype=dtype, parts=("dit",)).dit
    place = dit.ref_position
    print(load_adapter(dit, source, alpha))
    merge_lora(dit)
    for ours, theirs in plan(dit, part.names, stored).items():
        parameter = dit.get_parameter(ours)
        parameter.data = parameter.to(HALF_DTYPES.get(stored.dtype(theirs), torch.float32))
        if not is_finite(parameter):
            raise ValueError(f"{source}: {ours} is not finite in {parameter.dtype} with this LoRA in it")
    save_module(dit, part.names, folder / part.file)
    config = read_json(layout.path / part.folder / "config.json")
    if dit.ref_position != place:  # the adapter has it elsewhere
        config["ref_position"] = dit.ref_position
    write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")
    print(f"{folder}: the merged transformer, {stored.dtypes()}")


def _read(source: Path, alpha: float | None, backbone: str) -> Adapter:
    """An adapter, compared with a backbone if one is given."""
    if not backbone:
        return read(source, None, alpha)
    layout: Layout = open_backbone(backbone)
    with torch.device("meta"):
        dit = layout.parts["dit"].build()
    adapter = read(source, type(dit), alpha)
    check_fit(adapter, dit)
    return adapter


def main() -> None:
    parser = Parser(prog="python -m weights.adapter", description=__doc__)
    commands = parser.add_subparsers(required=True)
    for command in (inspect, convert, mean, merge):
        options = commands.add_parser(command.__name__, help=command.__doc__, description=command.__doc__)
        options.set_defaults(command=command)
        several = {"nargs": "+"} if command is mean else {}
        options.add_argument(
            "source", type=Path, help="adapter: a file, or the folder that peft wrote", **several
        )
        if command is not inspect:
            options.add_argument("target", type=Path, help="what to write")
        if command is convert:
            options.add_argument("--format", required=True, choices=FORMATS)
        if command is mean:
            options.add_argument("--rank", type=int, help="only so many directions of each; all if not given")
            options.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
        options.add_argument("--alpha", "--lora-alpha", type=float, help="for a file that does not say it")
        needed = {"required": True} if command is merge else {"default": ""}
        options.add_argument("--backbone", help="folder of the checkpoint", **needed)
    settings = vars(parser.parse_args())
    command = settings.pop("command")
    run(lambda: command(**settings))


if __name__ == "__main__":
    main()
