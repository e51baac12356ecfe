"""peft's settings of an adapter: its alpha, and whether A and B alone are the update.

They stand in a folder's adapter_config.json, or in the metadata of a file as diffusers writes it.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import Protocol

# Which layers, where and how they were trained: whatever these say, the update is (alpha / rank) B A.
HARMLESS = {
    "alpha_pattern", "auto_mapping", "corda_config", "ensure_weight_tying", "eva_config", "exclude_modules",
    "fan_in_fan_out", "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config",
    "lora_ga_config", "megatron_config", "r", "rank_pattern", "runtime_config", "target_modules",
    "target_parameters", "use_rslora",
}  # fmt: skip
# What else is on changes it.
REASONS = {
    "alora_invocation_tokens": "an aLoRA acts on some tokens of its prompt",
    "arrow_config": "Arrow mixes several LoRAs",
    "kasa_config": "KaSA has changed the base's own weights, and scales each rank",
    "layer_replication": "a deeper model, made of copies of layers",
    "lora_bias": "biases were trained as well",
    "modules_to_save": "whole layers were trained as well",
    "monteclora_config": "MonteCLoRA draws its update",
    "trainable_token_indices": "rows of an embedding were trained as well",
    "use_bdlora": "BD-LoRA, whose A or B is block-diagonal",
    "use_dora": "DoRA, which also rescales the weight",
    "use_qalora": "QALoRA, whose A sees means of groups",
    "velora_config": "VeLoRA, which brings tensors of its own",
}
STARTS = ("gaussian", "eva", "orthogonal", "mica")  # of A and B; others begin by changing the base
CHANGED = (
    "it began by taking a part of the base's own weights, so A and B alone are not the update; save it again "
    "with peft's path_initial_model_for_weight_conversion"
)


class Sized(Protocol):
    """The update of one layer."""

    rank: int
    alpha: float


def check(where: str, settings: dict) -> None:
    """ValueError, with place, field and reason, if A and B alone are not the update."""
    for field, value in settings.items():
        if reason := _objection(field, value):
            raise ValueError(f"{where}: {field} = {value!r}; {reason}; supported: LoRA as (alpha / rank) B A")


def _objection(field: str, value: object) -> str:
    if field == "peft_type":
        return "" if value in (None, "LORA") else "another kind of adapter"
    if field == "bias":
        return "" if value in (None, "none") else "biases were trained as well"
    if field == "init_lora_weights":
        plain = value is None or isinstance(value, bool) or str(value).lower() in STARTS
        return "" if plain else CHANGED
    if field == "use_rslora":
        return "" if value is None or isinstance(value, bool) else "neither true nor false"
    if field in HARMLESS or not value:
        return ""
    if field in REASONS:
        return REASONS[field]
    # A number or a word of a field that is not known is a detail of something; what turns it on says so.
    return "not known here, and may change the update" if isinstance(value, bool | list | dict) else ""


def alpha_of(where: str, settings: dict, layer: str, rank: int) -> float | None:
    """What they say of a layer in their names, as the alpha of a scale alpha / rank; None if nothing.

    ValueError for what is no number, and for a rank that is not the tensors'.
    """
    if "lora_alpha" not in settings:
        return None
    try:
        stated = _own(settings, "rank_pattern", "r", layer)
        alpha = float(_own(settings, "alpha_pattern", "lora_alpha", layer))
    except (AttributeError, TypeError, ValueError, OverflowError, re.error) as error:
        raise ValueError(f"{where}: broken lora_alpha, alpha_pattern or rank_pattern ({error})") from error
    if stated is not None and stated != rank:
        raise ValueError(f"{where}: says rank {stated} of {layer}, whose tensors have rank {rank}")
    # rsLoRA's scale is alpha / sqrt(rank).
    return alpha * math.sqrt(rank) if settings.get("use_rslora") else alpha


def _own(settings: dict, patterns: str, field: str, layer: str) -> object:
    """A layer's own value, from the first pattern that fits its name, or everybody's."""
    for pattern, value in (settings.get(patterns) or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", layer):
            return value
    return settings.get(field)


def settings_of(updates: Mapping[str, Sized]) -> dict:
    """peft's settings: the most frequent rank and alpha, and the layers that have others."""
    settings = {"target_modules": sorted(updates)}
    for field, pattern, of in (("r", "rank_pattern", "rank"), ("lora_alpha", "alpha_pattern", "alpha")):
        values = {layer: getattr(update, of) for layer, update in updates.items()}
        settings[field] = Counter(values.values()).most_common(1)[0][0]
        # Written also where it is empty: diffusers 0.34 to 0.39 fail on a file without rank_pattern.
        settings[pattern] = {layer: value for layer, value in values.items() if value != settings[field]}
    return settings
