"""Public checkpoints in and out: folders in the diffusers layout or in Wan's original one, and LoRA adapters.

backbone = load_backbone("CogVideoX-5b", "cuda", torch.bfloat16)     # dit, vae, text, schedule
load_adapter(backbone.dit, "adapter.safetensors")                    # says what it read, and its scale
"""

from weights.adapter_io import load_adapter, save_adapter
from weights.backbone import (
    PARTS,
    Backbone,
    check_weights,
    load_backbone,
    open_backbone,
    sources,
    token_counter,
)
from weights.formats import adapter_files
from weights.layout import Layout

__all__ = [
    "PARTS",
    "Backbone",
    "Layout",
    "adapter_files",
    "check_weights",
    "load_adapter",
    "load_backbone",
    "open_backbone",
    "save_adapter",
    "sources",
    "token_counter",
]
