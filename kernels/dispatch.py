"""Who runs a kernel, Triton or plain torch, and the one place from which kernels are launched.

SDV_KERNELS=triton | reference forces one side. Left unset, CUDA tensors (and, under Triton's interpreter,
TRITON_INTERPRET=1, all tensors) go to Triton; the rest, float64 included, to the torch reference.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # there is no Triton for macOS or Windows: the references run, kernels are only defined

    class Absent:
        def __getattr__(self, name: str):
            return self

        def __call__(self, thing=None):
            return thing

    triton = tl = TensorDescriptor = Absent()

MODE = os.environ.get("SDV_KERNELS") or "auto"
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ARCHS = (80, 89, 90, 100, 120)  # compute capabilities for which tiles are chosen and linted

if MODE not in ("auto", "triton", "reference"):
    raise ValueError(f"SDV_KERNELS={MODE!r} is unknown: use triton, reference, or leave it unset")

_arch = 90  # what the interpreter and the lint pretend to run on; see `pretend`
_recorder: Callable | None = None


def require(ok: bool, message: str):
    """One clear error, before anything is launched."""
    if not ok:
        raise ValueError(message)


def use_triton(x: Tensor) -> bool:
    """Whether x goes to Triton. Raises if SDV_KERNELS=triton asks for what cannot be."""
    runnable = (x.is_cuda or INTERPRET) and x.dtype in DTYPES and triton is not tl
    if MODE == "triton" and not runnable:
        raise ValueError(
            f"SDV_KERNELS=triton, but Triton cannot run {x.dtype} on {x.device}: it takes fp32, bf16 or fp16 "
            "on CUDA, or TRITON_INTERPRET=1 set before Python starts. Unset SDV_KERNELS to let torch run it"
        )
    return runnable and MODE != "reference"


def run(op: Callable, *args):
    """op(*args), with vectors (the weights of a norm) made dense.

    The interpreter's bf16 arithmetic is wrong: there, bf16 goes in and out as fp32.
    """
    args = [a.contiguous() if isinstance(a, Tensor) and a.ndim == 1 else a for a in args]
    if not INTERPRET:
        return op(*args)
    dtype = args[0].dtype
    args = [a.float() if isinstance(a, Tensor) and a.dtype == torch.bfloat16 else a for a in args]
    out = op(*args)
    return out.to(dtype) if isinstance(out, Tensor) else tuple(o.to(dtype) for o in out)


def arch(x: Tensor) -> int:
    """The newest architecture of ARCHS that x's GPU can run."""
    if not x.is_cuda:
        return _arch
    major, minor = torch.cuda.get_device_capability(x.device)
    return max((a for a in ARCHS if a <= 10 * major + minor), default=ARCHS[0])


def processors(x: Tensor) -> int:
    """Multiprocessors of x's GPU; 4 without one, so that a program of a small test still has several rows."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 4


def token_major(x: Tensor) -> Tensor:
    """An empty tensor like x (B, H, L, K), but laid out as (B, L, H, K): what a linear writes and reads."""
    B, H, L, K = x.shape
    return x.new_empty(B, L, H, K).transpose(1, 2)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a reference computes: fp32, or float64 if the input is that already."""
    return torch.promote_types(dtype, torch.float32)


def launch(kernel, grid: tuple[int, ...], *args, **meta):
    """kernel[grid](*args, **meta) on the first tensor's device: autograd's backward has its own thread."""
    if _recorder is not None:
        _recorder(kernel, args, meta)
        return
    with torch.cuda.device_of(next(a for a in args if isinstance(a, Tensor))):
        kernel[grid](*args, **meta)


@contextmanager
def pretend(arch: int, recorder: Callable | None = None) -> Iterator[None]:
    """Choose tiles as if on `arch`; with a recorder, hand it (kernel, args, meta) instead of launching."""
    global _arch, _recorder
    before = _arch, _recorder
    _arch, _recorder = arch, recorder
    try:
        yield
    finally:
        _arch, _recorder = before
