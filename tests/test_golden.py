"""The paper's released inference code, in numbers: a tiny random model, its inputs, its outputs.

Its third residual stream and our extra clean frame are the same thing, with and without a LoRA.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import weights
from helpers import relative_error
from sdv.lora import lora_modules
from sdv.models.cogvideox_dit import CogVideoXDiT
from weights.cogvideox import DIT_NAMES, dit_config
from weights.tensors import load_into

GOLDEN = Path(__file__).parent / "data" / "cogvideox_reference_stream.safetensors"


def group(prefix: str) -> dict[str, torch.Tensor]:
    with safe_open(GOLDEN, "pt") as file:
        return {
            key.removeprefix(prefix): file.get_tensor(key) for key in file.keys() if key.startswith(prefix)
        }


@pytest.fixture
def golden(tmp_path):
    with safe_open(GOLDEN, "pt") as file:
        metadata = file.metadata()
    save_file(group("base."), tmp_path / "model.safetensors")
    save_file(group("lora."), tmp_path / "adapter.safetensors")
    with torch.device("meta"):
        dit = CogVideoXDiT(dit_config(json.loads(metadata["config"])))
    load_into(dit, DIT_NAMES, tmp_path, "cpu", torch.float32)
    inputs = group("in.")
    video, ref = inputs["video"].transpose(1, 2), inputs["ref"].transpose(1, 2)
    return dit, (video, inputs["timestep"], inputs["text"], ref), tmp_path, float(metadata["lora_alpha"])


@torch.no_grad()
def test_reference_as_a_frame_equals_the_released_third_stream(golden):
    dit, inputs, _, _ = golden
    assert relative_error(dit(*inputs), group("out.")["base"].transpose(1, 2)) <= 1e-5


@torch.no_grad()
def test_lora_equals_the_released_one_but_only_at_its_own_alpha(golden):
    dit, inputs, folder, alpha = golden
    path = folder / "adapter.safetensors"
    with pytest.raises(ValueError, match="alpha"):  # the released file does not carry it
        weights.load_adapter(dit, path)
    weights.load_adapter(dit, path, alpha=alpha)
    wanted = group("out.")["lora"].transpose(1, 2)
    assert relative_error(dit(*inputs), wanted) <= 1e-5
    for module in lora_modules(dit).values():
        module.alpha = module.rank  # what a reader does that assumes alpha = rank
    assert relative_error(dit(*inputs), wanted) > 1e-3
