"""Adapters as files: the diffusers / PEFT layout, with rank and alpha in the file's own metadata."""

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from sdv.lora import act_on_reference, add_lora, lora_modules
from sdv.positions import place_reference
from weights.tensors import Names, rename, reverse, save_tensors

PREFIX = "transformer."
METADATA = "lora_adapter_metadata"
# Beside it, since diffusers takes nothing there that peft does not know:
PLACE = "ref_position"
TOKENS = "lora_tokens"  # "all", or "ref": the reference's alone


def save_adapter(dit: nn.Module, path: Path, names: Names) -> None:
    """Write the LoRA of a model; diffusers' load_lora_weights reads it at the right strength."""
    modules = lora_modules(dit)
    if not modules:
        raise ValueError(f"{path}: the model has no LoRA to save")
    theirs = {ours: rename(f"{ours}.weight", reverse(names)).removesuffix(".weight") for ours in modules}
    tensors = {
        f"{PREFIX}{theirs[path]}.{leaf}.weight": getattr(module, leaf)
        for path, module in modules.items()
        for leaf in ("lora_A", "lora_B")
    }
    one = next(iter(modules.values()))
    config = {"r": one.rank, "lora_alpha": one.alpha, "target_modules": sorted(theirs.values())}
    metadata = json.dumps({f"{PREFIX}{field}": value for field, value in config.items()}, sort_keys=True)
    notes = {PLACE: dit.ref_position, TOKENS: "all" if one.tokens is None else "ref"}
    save_tensors(path, tensors, {"format": "pt", METADATA: metadata, **notes})


def load_adapter(dit: nn.Module, path: Path, names: Names, alpha: float | None = None) -> str:
    """Add the LoRA in a file to a model that has none; returns a line that says what was read, at what scale.

    The reference goes where it was when the LoRA was learned, if the file says. alpha overrides the file's.
    ValueError if neither says it, and for tensors that do not fit the model.
    """
    if lora_modules(dit):
        raise ValueError(f"{path}: the model already has a LoRA")
    tensors, metadata = read_adapter(path)
    pairs = _pairs(path, tensors, names)
    rank = next(iter(pairs.values()))["lora_A"].shape[0]
    alpha, source = _alpha(path, metadata, alpha)
    _check_fit(path, dit, pairs, rank)
    place_reference(dit, metadata.get(PLACE, dit.ref_position))
    for module_path, module in add_lora(dit, rank, alpha, tuple(pairs)).items():
        for leaf, tensor in pairs[module_path].items():
            # Copied, not assigned: a mapped tensor is aligned as it lies in the file, matrix products then
            # round differently, and a resumed run would leave the path of the run that never stopped.
            getattr(module, leaf).data.copy_(tensor)
    if metadata.get(TOKENS) == "ref":
        act_on_reference(dit)
    return f"{path}: {len(pairs)} modules, rank {rank}, alpha {alpha:g} ({source}), scale {alpha / rank:g}"


def read_adapter(path: Path) -> tuple[dict[str, Tensor], dict]:
    """Tensors and the adapter's own settings ({} if the file has none)."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such adapter file")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            notes = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path}: not a safetensors file, or cut short ({error})") from error
    settings = {PREFIX + name: notes[name] for name in (PLACE, TOKENS) if name in notes}
    settings |= json.loads(notes.get(METADATA, "{}"))
    return tensors, {field.removeprefix(PREFIX): value for field, value in settings.items()}


def _alpha(path: Path, metadata: dict, alpha: float | None) -> tuple[float, str]:
    if alpha is not None:
        return alpha, "as asked"
    if "lora_alpha" in metadata:
        return float(metadata["lora_alpha"]), "from the file"
    raise ValueError(
        f"{path}: the file does not say its alpha, and a wrong guess applies it at the wrong strength. Give "
        "it with --lora-alpha (64 for the paper's released adapter; the rank for formats without alpha)."
    )


def _pairs(path: Path, tensors: dict[str, Tensor], names: Names) -> dict[str, dict[str, Tensor]]:
    """{our module path: {"lora_A": A, "lora_B": B}}."""
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        stem, _, leaf = key.removeprefix(PREFIX).removesuffix(".weight").rpartition(".")
        try:
            ours = rename(f"{stem}.weight", names)
        except KeyError:
            ours = None
        if ours is None or leaf not in ("lora_A", "lora_B") or not key.startswith(PREFIX):
            raise ValueError(f"{path}: {key} belongs to no layer of this model: an adapter for another one?")
        pairs.setdefault(ours.removesuffix(".weight"), {})[leaf] = tensor
    halves = [ours for ours, pair in pairs.items() if len(pair) != 2]
    if halves or not pairs:
        raise ValueError(f"{path}: " + (f"{halves[0]} has only one of lora_A, lora_B" if halves else "empty"))
    return pairs


def _check_fit(path: Path, dit: nn.Module, pairs: dict[str, dict[str, Tensor]], rank: int) -> None:
    modules = dict(dit.named_modules())
    for ours, pair in pairs.items():
        if ours not in modules:
            raise ValueError(f"{path}: the model has no layer {ours}; an adapter for a deeper model?")
        out_features, *fan_in = modules[ours].weight.shape
        wanted = {"lora_A": [rank, *fan_in], "lora_B": [out_features, rank, *[1] * (len(fan_in) - 1)]}
        for leaf, tensor in pair.items():
            if list(tensor.shape) != wanted[leaf]:
                raise ValueError(
                    f"{path}: {leaf} of {ours} has shape {list(tensor.shape)}, expected {wanted[leaf]}; "
                    "an adapter for a model of another size, or with a rank per layer?"
                )


