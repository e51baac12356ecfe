"""Where a transformer's frozen matrices wait for their layer's turn: as they are, in 8 bits, or on the CPU.

A matrix that was brought back stays as long as its layer works, in training until backward. So recompute
every block (--recompute 1): then only one block's are there at a time. They are nearly all of the
11.1 GB of CogVideoX-5B: in bf16, "fp8" halves them, and "cpu" leaves the 0.26 GB of a block.
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sdv.lora import LoRA

Storage = Literal["device", "fp8", "cpu"]
LARGEST = torch.finfo(torch.float8_e4m3fn).max  # 448


class Float8(nn.Module):
    """A matrix as e4m3 numbers and a scale for each row.

    An entry changes by 1/16 of itself at most or, where it is tiny, by 2.2e-6 of the largest in its row.
    """

    def forward(self, numbers: Tensor, scale: Tensor) -> Tensor:
        return numbers.to(scale.dtype) * scale

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        top = weight.abs().amax(1, keepdim=True)
        scale = torch.where(top > 0, top / LARGEST, 1)  # a row of zeros stays one
        # Beyond the largest number there is only NaN, and rounding the scale may lead there.
        numbers = (weight.float() / scale.float()).clamp(-LARGEST, LARGEST)
        return numbers.to(torch.float8_e4m3fn), scale


class Fetched(nn.Module):
    """A matrix on the CPU, copied each time. All of a 5B model takes about a second, a training step many."""

    def __init__(self, device: str):
        super().__init__()
        self.device = device

    def forward(self, weight: Tensor) -> Tensor:
        return weight.to(self.device, non_blocking=True, copy=True)


def hold(dit: nn.Module, storage: Storage, device: str) -> None:
    """Move a transformer to its device; the matrices of its blocks are stored as is said, for good.

    A LoRA in it moves with it and keeps its precision: what learns is neither rounded nor left elsewhere.
    """
    waiting = set()
    for layer in list(dit.blocks.modules()) if storage != "device" else []:
        if isinstance(layer, nn.Linear | LoRA):
            if storage == "cpu":
                waiting.add(layer.weight)
                if device.startswith("cuda") and torch.cuda.is_available():
                    layer.weight.data = layer.weight.data.pin_memory()
            way = Float8() if storage == "fp8" else Fetched(device)
            parametrize.register_parametrization(layer, "weight", way, unsafe=True)
    for tensor in (*dit.parameters(), *dit.buffers()):
        if tensor not in waiting:
            tensor.data = tensor.data.to(device)


def nbytes(module: nn.Module) -> int:
    """What its parameters take on its device. Those called "original" wait on the CPU (hold)."""
    return sum(p.nbytes for name, p in module.named_parameters() if not name.endswith(".original"))
