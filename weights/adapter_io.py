"""LoRA adapters in and out of a model."""

from collections import defaultdict
from pathlib import Path

from torch import Tensor, nn

from sdv.lora import act_on_reference, acts_on, add_lora, lora_modules, lora_parameters
from sdv.models.positions import place_reference
from weights.formats import LAYER_NAMES, PLACE_NOTE, TOKENS_NOTE, Adapter, Update, read, write


def save_adapter(
    dit: nn.Module, path: str | Path, format: str = "diffusers", lora: dict[str, Tensor] | None = None
) -> None:
    """Write the LoRA of a model in one of the FORMATS; its readers apply it at the same strength.

    lora: its parameters by name, where the model itself has only a share of each.
    """
    path = Path(path)
    lora = lora_parameters(dit) if lora is None else lora
    modules = lora_modules(dit)
    if not modules:
        raise ValueError(f"{path}: the model has no LoRA to save")
    updates = {
        ours: Update(lora[f"{ours}.lora_A"].detach(), lora[f"{ours}.lora_B"].detach(), module.alpha)
        for ours, module in modules.items()
    }
    notes = {PLACE_NOTE: dit.ref_position, TOKENS_NOTE: acts_on(dit)}
    family = next(kind for kind in LAYER_NAMES if isinstance(dit, kind))  # sharding makes subclasses
    write(Adapter(path, format, family, updates, notes, "from the model"), path, format)


def load_adapter(dit: nn.Module, path: str | Path, alpha: float | None = None) -> str:
    """Add the LoRA in a file to a model that has none; returns a line that says what was read, at what scale.

    The reference goes where it was when the LoRA was learned, if the file says. alpha overrides the file's.
    ValueError if nothing says it, and for tensors that do not fit the model.
    """
    path = Path(path)
    if lora_modules(dit):
        raise ValueError(f"{path}: the model already has a LoRA")
    adapter = read(path, type(dit), alpha).known
    check_fit(adapter, dit)
    try:
        place_reference(dit, adapter.notes.get(PLACE_NOTE, dit.ref_position))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    alike = defaultdict(list)
    for ours, update in adapter.updates.items():
        alike[update.rank, update.alpha].append(ours)
    for (rank, alpha), paths in alike.items():
        add_lora(dit, rank, alpha, tuple(paths))
    for ours, module in lora_modules(dit).items():
        # Copied, not assigned: a mapped tensor is aligned as it lies in the file, matrix products then
        # round differently, and a resumed run would leave the path of the run that never stopped.
        module.lora_A.data.copy_(adapter.updates[ours].A)
        module.lora_B.data.copy_(adapter.updates[ours].B)
    for parameter in lora_parameters(dit).values():
        parameter.requires_grad_()  # add_lora froze what the one before it had added
    if adapter.notes.get(TOKENS_NOTE) == "ref":
        act_on_reference(dit)
    nothing = not any(update.scale and update.B.any() for update in adapter.updates.values())
    return f"{path}: {adapter}" + "; its update is zero: it changes nothing" * nothing


def check_fit(adapter: Adapter, dit: nn.Module) -> None:
    modules = dict(dit.named_modules())
    for ours, update in adapter.updates.items():
        if not isinstance(modules.get(ours), nn.Linear | nn.Conv2d):
            reason = "can hold no LoRA" if ours in modules else "is not in it; an adapter for a deeper model?"
            raise ValueError(f"{adapter.path}: layer {ours} of the model {reason}")
        out_features, *fan_in = modules[ours].weight.shape
        wanted = {"A": [update.rank, *fan_in], "B": [out_features, update.rank, *[1] * (len(fan_in) - 1)]}
        for half, shape in wanted.items():
            found = list(getattr(update, half).shape)
            if found != shape:
                raise ValueError(
                    f"{adapter.path}: lora_{half} of {ours} has shape {found}, expected {shape}; an adapter "
                    "for a model of another size?"
                )
