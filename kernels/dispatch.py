"""Decides whether Triton or plain torch runs a kernel, registers it with torch, and alone launches it.

SDV_KERNELS=triton | reference forces one of them. If unset, CUDA tensors (and, under Triton's interpreter,
TRITON_INTERPRET=1, all tensors) go to Triton; the rest, float64 included, to the torch reference.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor
from torch.nn import Parameter


class Absent:
    """Stands where a module is missing, so that decorators and annotations of kernels can still be read."""

    def __getattr__(self, name: str):
        return self

    def __call__(self, thing=None, do_not_specialize=()):
        return self if thing is None else thing


try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor

    HAVE_TRITON = True
except ImportError:  # on macOS, say, there is no Triton: the references run, kernels are only defined
    HAVE_TRITON = False
    triton = tl = TensorDescriptor = Absent()

MODE = os.environ.get("SDV_KERNELS") or "auto"
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TO_TORCH = "set SDV_KERNELS=reference"
ARCHS = (80, 89, 90, 100, 120)  # compute capabilities for which tiles are chosen and linted

if MODE not in ("auto", "triton", "reference"):
    raise ValueError(f"SDV_KERNELS={MODE!r} is unknown: use triton, reference, or leave it unset")

_arch = 90  # what the interpreter and the lint pretend to run on; see `pretend`
_recorder: Callable | None = None


def require(ok: bool, message: Callable[[], str]):
    """One clear error, before anything is launched. A message is only made if somebody reads it."""
    if not ok:
        raise ValueError(message())


def want(name: str, shape: tuple, device: torch.device, tensors: dict[str, Tensor | None]):
    """All that are not None have this shape, on this device."""
    for key, x in tensors.items():
        if x is not None and x.shape != shape:
            raise ValueError(f"{name}: {key} {tuple(x.shape)}: want {tuple(shape)}")
        if x is not None and x.device != device:
            raise ValueError(f"{name}: {key} is on {x.device}, x on {device}")


def use_triton(x: Tensor) -> bool:
    """Whether x goes to Triton. Raises if SDV_KERNELS=triton asks for what cannot be."""
    if x.numel() == 0:  # nothing to launch
        return False
    if MODE == "triton" and not HAVE_TRITON:
        raise ValueError(
            "SDV_KERNELS=triton, but there is no Triton: install it, or unset SDV_KERNELS to let torch run it"
        )
    runnable = HAVE_TRITON and x.dtype in DTYPES and (x.is_cuda or INTERPRET or _recorder is not None)
    if MODE == "triton" and not runnable:
        raise ValueError(
            f"SDV_KERNELS=triton, but Triton cannot run {x.dtype} on {x.device}: it takes fp32, bf16 or fp16 "
            "on CUDA, or TRITON_INTERPRET=1 set before Python starts. Unset SDV_KERNELS to let torch run it"
        )
    return runnable and MODE != "reference"


@cache
def _chip(device: torch.device) -> tuple[int, int]:
    """(the newest of ARCHS that a GPU can run, its multiprocessors)"""
    gpu = torch.cuda.get_device_properties(device)
    fit = [a for a in ARCHS if a <= 10 * gpu.major + gpu.minor and torch.version.hip is None]
    # Those before Ampere have too little shared memory for any tile, and AMD's are numbered otherwise.
    require(fit, lambda: f"{gpu.name}: kernels want an NVIDIA GPU from Ampere (8.0) on; {TO_TORCH}")
    return max(fit), gpu.multi_processor_count


def require_chip(device: torch.device) -> None:
    """ValueError for a GPU that the kernels are to run on and cannot; it also names the way out."""
    if HAVE_TRITON and MODE != "reference" and device.type == "cuda":
        _chip(device)


def arch(x: Tensor) -> int:
    """The newest architecture of ARCHS that x's GPU can run."""
    return _chip(x.device)[0] if x.is_cuda else _arch


def processors(x: Tensor) -> int:
    """Multiprocessors of x's GPU; 4 without one, so that a program of a small test still has several rows."""
    return _chip(x.device)[1] if x.is_cuda else 4


def token_major(x: Tensor) -> Tensor:
    """An empty tensor like x (B, H, L, K), but laid out as (B, L, H, K): what a linear writes and reads."""
    B, H, L, K = x.shape
    return x.new_empty_strided((B, H, L, K), (L * H * K, K, H * K, 1))


def dense(vector: Tensor | None) -> Tensor | None:
    """A norm's weight or bias as a kernel takes it, with nothing between its numbers."""
    return None if vector is None else vector.contiguous()


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a reference computes: fp32, or float64 if the input is that already."""
    return torch.promote_types(dtype, torch.float32)


# ---- how torch sees a kernel: its host side `run`, its shapes `fake`, what it `save`s for its `grads` ------

PLAIN = {Tensor, Parameter, type(None), float, int, bool, str, list, tuple}


def watched(args: tuple) -> bool:
    """Whether somebody wants to see operators: torch.compile, export, fake tensors, FLOP counters, .."""
    tracing = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0
    return tracing or not PLAIN.issuperset(map(type, args))


def operator(
    name: str, run: Callable, fake: Callable, save: Callable | None = None, grads: Callable | None = None
) -> Callable:
    """run as torch sees it: the custom operator sdv::name where it is watched, else a plain call.

    A custom operator takes the host about twice as long, each time (benchmarks/host.csv). Without grads, run
    is a backward: who wants to differentiate it hears from the operator that nobody can.
    """
    custom = torch.library.custom_op(f"sdv::{name}", run, mutates_args=())
    custom.register_fake(fake)
    if grads is None:
        return lambda *args: (custom if watched(args) or torch.is_grad_enabled() else run)(*args)
    custom.register_autograd(grads, setup_context=save)

    class Plain(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *args):
            out = run(*args)
            save(ctx, args, out)
            return out

        backward = staticmethod(grads)

    return lambda *args: (custom if watched(args) else Plain.apply)(*args)


# ---- launches --------------------------------------------------------------------------------------------


def described(x: Tensor, blank: TensorDescriptor) -> TensorDescriptor:
    """x's descriptor, like blank, which was checked when it was made; a new one would be checked again."""
    descriptor = object.__new__(type(blank))
    descriptor.__dict__.update(blank.__dict__, base=x)
    return descriptor


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
