"""LoRA files as the public tools write them: a format is one row of a table, with one reader and one writer.

A row says how a format spells the key of a layer, whose names of layers it uses, and where alpha lies. The
update of a weight is (alpha / rank) B A, so a reader that guesses alpha applies it at the wrong strength:
what neither the file, its format nor the caller says stays unknown, and is an error where it is needed.
"""

import json
import math
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from sdv.data.files import parse_json, write_text
from sdv.models.cogvideox_dit import CogVideoXDiT
from sdv.models.layers import is_finite
from sdv.models.wan_dit import WanDiT
from weights import cogvideox, wan
from weights.peft_settings import alpha_of, check, settings_of
from weights.tensors import Names, read_json, rename, reverse, save_tensors

METADATA = "lora_adapter_metadata"  # peft's settings as JSON, where diffusers looks for them
PEFT_WEIGHTS, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
SAVED = "adapter.safetensors"  # in a save of train.py
# Beside them, in every format, since no tool takes there what it does not know:
PLACE_NOTE = "ref_position"
TOKENS_NOTE = "lora_tokens"  # "all", or "ref": the reference's alone

LARGEST = torch.finfo(torch.float32).max
STORED = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
)  # fmt: skip

# ------------------------------------------------------------------------------------------- the formats
AB, DEFAULT_AB = ("lora_A", "lora_B"), ("lora_A.default", "lora_B.default")
DOWN_UP, OLD_DOWN_UP = ("lora_down", "lora_up"), ("lora.down", "lora.up")


class Format(NamedTuple):
    """Of prefixes, halves and names the first is written and all are read."""

    prefixes: tuple[str, ...]  # before the layer's name
    halves: tuple[tuple[str, str], ...]  # what A and B are called, after it
    names: tuple[str, ...]  # whose names of layers: a column of LAYER_NAMES
    alpha: Literal["metadata", "config", "key", "nowhere"]  # where it is written
    folded: bool = False  # written with alpha = rank, and the rest of the scale in B
    flat: bool = False  # the dots in a layer's name are underscores
    convention: str = ""  # by which alpha is the rank where a file does not say it


# Tried in this order: a bare key with `.default` in a native name is DiffSynth's.
FORMATS = {
    "comfyui": Format(
        ("diffusion_model.", "model.diffusion_model."), (AB, DOWN_UP, DEFAULT_AB, OLD_DOWN_UP),
        ("native", "diffusers"), "key", convention="the rank, as ComfyUI reads a file without it",
    ),
    "kohya": Format(  # and, in this order, VideoX-Fun, OneTrainer, SimpleTuner
        ("lora_unet_", "lora_unet__", "lora_transformer_", "lycoris_"), (DOWN_UP, AB),
        ("native", "diffusers"), "key", flat=True,
    ),
    "diffsynth": Format(
        ("", "pipe.dit."), (DEFAULT_AB,), ("diffsynth",), "nowhere", folded=True,
        convention="the rank, as always in DiffSynth",
    ),
    "peft": Format(("base_model.model.",), (AB, DEFAULT_AB), ("diffusers", "native"), "config"),
    "diffusers-old": Format(("transformer.", ""), (OLD_DOWN_UP,), ("diffusers",), "metadata", folded=True),
    "diffusers": Format(
        ("transformer.", ""), (AB, DEFAULT_AB, DOWN_UP), ("diffusers", "native"), "metadata"
    ),
}  # fmt: skip

# What wraps a layer's name without meaning anything: torch's data parallel, torch.compile.
WRAPPERS = re.compile(r"^module\.|(?<![^.])_orig_mod\.")

# What is none of these formats, by its keys.
REFUSED = {
    r"\.lora_magnitude_vector\b|\.dora_scale$": "DoRA, which also rescales the weight",
    r"\.lokr_\w+$": "LoKr, not a LoRA",
    r"\.hada_\w+$": "LoHa, not a LoRA",
    r"\.oft_\w+$|\.boft_\w+$": "OFT, not a LoRA",
    r"\.lora_mid\b": "a LoRA in three parts (Tucker)",
    r"\.lora_diag\b": "KaSA, which also scales each rank",
    r"\.(diff|diff_b|set_weight|w_norm|b_norm)$": "a change of a whole weight or bias",
    r"\.bias$": "a change of a bias",
    r"\.matrix_[AB]\.\d+$": "a LoRA in the names of SAT, CogVideoX's first training code: export it first",
    r"^(lora_te\d?_|text_encoder)": "a LoRA of the text encoder, which stays as it is",
}

# ComfyUI's CogVideoX, the layers that can hold a LoRA.
COGVIDEOX_COMFYUI: Names = {
    "patch_embed.proj": "patch_in",
    "patch_embed.text_proj": "text_in",
    "time_embedding_linear_{}": "time_in.linear_{}",
    "blocks.{}.norm{}.linear": "blocks.{}.mod{}",
    "blocks.{}.q": "blocks.{}.attn.q",
    "blocks.{}.k": "blocks.{}.attn.k",
    "blocks.{}.v": "blocks.{}.attn.v",
    "blocks.{}.attn_out": "blocks.{}.attn.out",
    "blocks.{}.ff_proj": "blocks.{}.ff.up",
    "blocks.{}.ff_out": "blocks.{}.ff.down",
    "norm_out.linear": "mod_out",
    "proj_out": "proj_out",
}
# DiffSynth 1.1's. Not the patches' convolution: it multiplies A and B as matrices, and stops at a kernel.
COGVIDEOX_DIFFSYNTH: Names = {
    "context_embedder": "text_in",
    "time_embedder.timestep_embedder.0": "time_in.linear_1",
    "time_embedder.timestep_embedder.2": "time_in.linear_2",
    "blocks.{}.norm{}.linear": "blocks.{}.mod{}",
    "blocks.{}.attn1.to_q": "blocks.{}.attn.q",
    "blocks.{}.attn1.to_k": "blocks.{}.attn.k",
    "blocks.{}.attn1.to_v": "blocks.{}.attn.v",
    "blocks.{}.attn1.to_out": "blocks.{}.attn.out",
    "blocks.{}.ff.0": "blocks.{}.ff.up",
    "blocks.{}.ff.2": "blocks.{}.ff.down",
    "norm_out.linear": "mod_out",
    "proj_out": "proj_out",
}
Family = type[nn.Module]  # a backbone, known by the class of its transformer
LAYER_NAMES: dict[Family, dict[str, Names]] = {
    CogVideoXDiT: {
        "diffusers": cogvideox.DIT_NAMES,
        "native": COGVIDEOX_COMFYUI,
        "diffsynth": COGVIDEOX_DIFFSYNTH,
    },
    WanDiT: {
        "diffusers": wan.DIT_NAMES,
        "native": wan.DIT_NAMES_ORIGINAL,
        "diffsynth": wan.DIT_NAMES_ORIGINAL,
    },
}


# ----------------------------------------------------------------------------------- what a file says
class Update(NamedTuple):
    """What a LoRA adds to one weight, (alpha / rank) B A; alpha is None if nothing says it."""

    A: Tensor  # (rank, in) or (rank, in, height, width)
    B: Tensor  # (out, rank) or (out, rank, 1, 1)
    alpha: float | None

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def norm(self) -> float:
        """|B A|, without alpha / rank; its square is the trace of (A A^T)(B^T B), rank x rank."""
        a, b = self.A.double().flatten(1), self.B.double().flatten(1)
        return math.sqrt(max((a @ a.T * (b.T @ b)).sum().item(), 0.0))


@dataclass(frozen=True)
class Adapter:
    """The LoRA of one file, in our names of layers."""

    path: Path
    format: str
    family: Family
    updates: dict[str, Update]
    notes: dict[str, str]  # of PLACE_NOTE and TOKENS_NOTE, what the file has
    alpha_from: str  # "" if nothing says it

    @property
    def known(self) -> "Adapter":
        """Itself. ValueError if nothing says its alpha."""
        if self.alpha_from:
            return self
        raise ValueError(
            f"{self.path}: the file does not say its alpha, and a wrong guess applies it at the wrong "
            "strength. Give it with --lora-alpha (64 for the paper's released adapter; whoever trained it "
            "knows: often the rank)."
        )

    def __str__(self) -> str:
        updates = self.updates.values()
        rank = _span(update.rank for update in updates)
        if not self.alpha_from:
            return f"{len(updates)} modules, rank {rank}, alpha not said: give it with --lora-alpha"
        alpha, scale = _span(update.alpha for update in updates), _span(update.scale for update in updates)
        return f"{len(updates)} modules, rank {rank}, alpha {alpha} ({self.alpha_from}), scale {scale}"


def _span(values: Iterable[float]) -> str:
    values = set(values)
    ends = [f"{end:g}" for end in (min(values), max(values))]
    return ends[0] if len(values) == 1 else " to ".join(ends)


def label(family: Family) -> str:
    return family.__name__.removesuffix("DiT")


# ------------------------------------------------------------------------------------------------ reading
def read(path: Path, family: Family | None = None, alpha: float | None = None) -> Adapter:
    """The LoRA in a file of any format, or in a PEFT folder; alpha overrides the file's.

    The keys say which format it is and, unless given, which backbone it is for. ValueError, with file and
    reason, for what is damaged, of another model, or not a LoRA.
    """
    tensors, notes, settings = _contents(path)
    name, family, places = _recognise(path, tensors, family)
    layers: dict[str, dict[str, Tensor]] = {}
    spelled = {}
    for key, (ours, theirs, part) in places.items():
        if part in layers.setdefault(ours, {}):
            raise ValueError(f"{path}: {key} is the second {part} of one layer: two adapters in one file?")
        layers[ours][part], spelled[ours] = tensors[key], theirs
    updates, sources = {}, set()
    for ours, parts in layers.items():
        _check_parts(path, spelled[ours], parts)
        value, source, rank = alpha, "as asked", len(parts["A"])
        if alpha is None:
            said = parts["alpha"].item() if "alpha" in parts else None
            value = alpha_of(str(path), settings, spelled[ours], rank) if said is None else said
            source = "from the file"
        if value is None and (convention := FORMATS[name].convention):
            value, source = float(rank), convention
        if value is not None and not abs(value) <= LARGEST:
            raise ValueError(
                f"{path}: the alpha of {spelled[ours]} is {value} ({source}), not a finite number"
            )
        updates[ours] = Update(parts["A"], parts["B"], value)
        sources.add("" if value is None else source)
    # Half an answer is none.
    alpha_from = "" if "" in sources else ", or ".join(sorted(sources))
    return Adapter(path, name, family, updates, notes, alpha_from)


def adapter_files(path: Path) -> list[Path]:
    """What an adapter is read from: its file, or that in a folder, and the settings peft wrote beside it."""
    files = [path / name for name in (PEFT_WEIGHTS, SAVED)] if path.is_dir() else [path]
    file = next(filter(Path.is_file, files), files[0])
    config = file.with_name(PEFT_CONFIG)
    return [file, config] if file.name == PEFT_WEIGHTS and config.is_file() else [file]


def _contents(path: Path) -> tuple[dict[str, Tensor], dict[str, str], dict]:
    """The tensors of a file or PEFT folder, its notes, and peft's settings ({} if there are none)."""
    file, *configs = adapter_files(path)
    if not file.is_file():
        hint = f", a folder as peft writes it has one; or name the file in {path}" if path.is_dir() else ""
        raise FileNotFoundError(f"{file}: no such adapter file{hint}")
    try:
        with safe_open(file, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}
            metadata = opened.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{file}: not a safetensors file, or cut short ({error})") from error
    if configs:
        where, settings = str(configs[0]), read_json(configs[0])
    else:
        where = f"{file}: {METADATA} in its metadata"
        try:
            settings = dict(parse_json(metadata.get(METADATA, "{}")))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{where} is no JSON object ({error})") from error
    if any(field.startswith("transformer.") for field in settings):  # beside others' of the pipeline
        settings = {
            field.removeprefix("transformer."): value
            for field, value in settings.items()
            if field.startswith("transformer.")
        }
    check(where, settings)
    return tensors, {name: metadata[name] for name in (PLACE_NOTE, TOKENS_NOTE) if name in metadata}, settings


Place = tuple[str, str, str]  # our layer, theirs, and "A", "B" or "alpha"


def _recognise(
    path: Path, keys: Collection[str], family: Family | None
) -> tuple[str, Family, dict[str, Place]]:
    """The format and the backbone whose spelling fits all keys, and what each key is."""
    if not keys:
        raise ValueError(f"{path}: no tensors in it")
    fits = []
    for kind in LAYER_NAMES if family is None else (family,):
        for name, format in FORMATS.items():
            places = {key: _place(key, format, kind) for key in keys}
            fits.append(([key for key, place in places.items() if place is None], name, kind, places))
    strange, name, kind, places = min(fits, key=lambda fit: len(fit[0]))
    if strange:
        wanted = label(family) if family else " or ".join(map(label, LAYER_NAMES))
        if not any(re.search("lora|lycoris|oft|hada|lokr|diff|matrix_", key) for key in places):
            raise ValueError(
                f"{path}: {strange[0]} and all others are names of a model's weights: no adapter"
            )
        reasons = ((key, why) for key in strange for what, why in REFUSED.items() if re.search(what, key))
        key, reason = next(reasons, (strange[0], ""))
        raise ValueError(
            f"{path}: {key}, like {len(strange)} of {len(places)} keys, "
            + (
                f"is {reason}; supported: LoRA"
                if reason
                else f"belongs to no layer of this model ({wanted}): an adapter for another one?"
            )
        )
    if len({kind for strange, _, kind, _ in fits if not strange}) > 1:
        both = " and ".join(map(label, LAYER_NAMES))
        raise ValueError(f"{path}: its names fit {both}; say --backbone FOLDER")
    return name, kind, places


def _place(key: str, format: Format, family: Family) -> Place | None:
    match = _pattern(format).fullmatch(WRAPPERS.sub("", key))
    ours = _ours(match["layer"], format, family) if match else None
    return None if ours is None else (ours, match["layer"], match.lastgroup)


@cache
def _pattern(format: Format) -> re.Pattern:
    words = sorted(format.prefixes, key=len, reverse=True), *zip(*format.halves, strict=True)
    prefixes, downs, ups = ("|".join(map(re.escape, group)) for group in words)
    return re.compile(
        rf"(?:{prefixes})(?P<layer>.+?)\.(?:(?:(?P<A>{downs})|(?P<B>{ups}))\.weight|(?P<alpha>alpha))"
    )


@cache
def _ours(theirs: str, format: Format, family: Family) -> str | None:
    for column in format.names:
        names = LAYER_NAMES[family][column]
        if format.flat:
            names = {theirs.replace(".", "_"): ours for theirs, ours in names.items()}
        try:
            return rename(f"{theirs}.weight", names).removesuffix(".weight")
        except KeyError:
            continue
    return None


def _check_parts(path: Path, layer: str, parts: dict[str, Tensor]) -> None:
    if not {"A", "B"} <= parts.keys():
        raise ValueError(f"{path}: {layer} has only one of lora_A, lora_B: cut out of a larger file?")
    a, b = parts["A"], parts["B"]
    if a.ndim != b.ndim or a.ndim < 2 or a.shape[0] != b.shape[1] or a.shape[0] == 0:
        raise ValueError(f"{path}: {layer} has A of shape {list(a.shape)} and B of shape {list(b.shape)}")
    for half, tensor in (("A", a), ("B", b)):
        if tensor.dtype not in STORED:
            raise ValueError(
                f"{path}: {layer} is stored as {tensor.dtype}: quantised, and without its scales"
            )
        if not is_finite(tensor):
            raise ValueError(
                f"{path}: lora_{half} of {layer} has NaN or infinity: the training that wrote it broke; take "
                "an earlier save"
            )
    alpha = parts.get("alpha", a.new_ones(()))
    if alpha.numel() != 1 or alpha.is_complex() or not is_finite(alpha):
        raise ValueError(f"{path}: the alpha of {layer} is not one number")


# ------------------------------------------------------------------------------------------------ writing
def require_target(path: Path, name: str) -> None:
    """ValueError if this path cannot be a LoRA in the format: some are a file, "peft" is a folder."""
    if name not in FORMATS:
        raise ValueError(f"format {name!r}: known are {', '.join(FORMATS)}")
    format = FORMATS[name]
    if format.alpha == "config" and (path.suffix == ".safetensors" or path.is_file()):
        raise ValueError(f"{path}: {name} is a folder with {PEFT_CONFIG} in it; name a folder")
    if format.alpha != "config" and path.is_dir():
        raise ValueError(f"{path}: a folder; {name} is one file")
    if format.alpha != "config" and len(adapter_files(path)) > 1:
        raise ValueError(f"{path}: would be read by the {PEFT_CONFIG} beside it; name another file")


def write(adapter: Adapter, path: Path, name: str) -> None:
    """Write a LoRA in a format: a file, or for "peft" a folder. ValueError for layers that it cannot hold."""
    require_target(path, name)
    format = FORMATS[name]
    down, up = format.halves[0]
    tensors, updates = {}, {}
    for ours, update in adapter.known.updates.items():
        if format.folded:
            update = Update(update.A, _scaled(update.B, update.scale), float(update.rank))
            if not is_finite(update.B):
                raise ValueError(
                    f"{path}: lora_B of {ours} is infinite once alpha / rank is folded into it, as {name} "
                    "does; choose another format"
                )
        layer = _theirs(path, ours, name, adapter.family)
        key = format.prefixes[0] + layer
        tensors |= {f"{key}.{down}.weight": update.A, f"{key}.{up}.weight": update.B}
        if format.alpha == "key":
            tensors[f"{key}.alpha"] = torch.tensor(update.alpha)
        updates[layer] = update
    metadata = {"format": "pt", **adapter.notes}
    settings = settings_of(updates)
    if format.alpha == "metadata":
        prefixed = {f"transformer.{field}": value for field, value in settings.items()}
        metadata[METADATA] = json.dumps(prefixed, sort_keys=True)
    if format.alpha != "config":
        return save_tensors(path, tensors, metadata)
    # Old settings must not meet new weights, whenever this is stopped: they would have another strength.
    save_tensors(path / PEFT_WEIGHTS, tensors, metadata, outdated=path / PEFT_CONFIG)
    text = json.dumps({"peft_type": "LORA", "bias": "none", **settings}, indent=2, sort_keys=True)
    write_text(path / PEFT_CONFIG, text + "\n")


def _theirs(path: Path, ours: str, name: str, family: Family) -> str:
    format = FORMATS[name]
    try:
        names = reverse(LAYER_NAMES[family][format.names[0]])
        theirs = rename(f"{ours}.weight", names).removesuffix(".weight")
    except KeyError:
        raise ValueError(
            f"{path}: {name} has no place for the LoRA of {ours} in {label(family)}; choose another format, "
            "or train without it (--targets)"
        ) from None
    return theirs.replace(".", "_") if format.flat else theirs


def _scaled(tensor: Tensor, scale: float) -> Tensor:
    """tensor * scale, in its own dtype where that is exact, else in float32."""
    product = tensor.float() * scale
    narrow = product.to(tensor.dtype)
    return narrow if torch.equal(narrow.float(), product) else product
