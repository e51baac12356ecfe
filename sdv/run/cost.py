"""A training step run on tensors that have a shape and no numbers: its bytes, and its FLOPs, counted.

Every operation of the step is seen: the bytes it makes, until they are let go, and its multiplications and
additions. For a GPU the Triton kernels are counted, on any machine. Nothing is fitted, and no formula repeats
the model. Of real steps torch's CPU allocator and its FLOP counter say the same (tests/test_plan.py), to the
byte and to the FLOP, but for 5 kB of generator state that torch keeps for every recomputed block and while
one runs again, and for what a CPU's products take for themselves.
"""

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import get_gradient_edge
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from kernels.dispatch import use_triton
from sdv.lora import adapt, lora_parameters
from sdv.models.layers import stays_float32
from sdv.run.base_storage import Storage, hold, nbytes

Task = Literal["identity", "motion"]
IN_PLACE = {torch.ops.aten.addmm_: torch.ops.aten.addmm}  # torch's counter knows only the second


@dataclass(frozen=True)
class Settings:
    """What memory and time depend on; defaults are one micro-batch of the paper's recipe, from a cache.

    train.py's Config, which has these fields too, is taken in its place.
    """

    frames: int
    height: int
    width: int
    device: str
    rank: int = 128
    alpha: float = 64.0
    identity_batch: int = 8
    motion_batch: int = 1
    keep_attention: bool = False
    base_storage: Storage = "device"
    recompute: float = 1.0
    p_video: float = 0.2
    pcgrad: str = "none"
    cache: str = "there"
    lora_dropout: float = 0.0
    targets: tuple[str, ...] = ()
    lora_tokens: str = "all"
    steps: int = 1
    accumulate: int = 1
    dtype: str = "bfloat16"
    shard: bool = False


class Layout(Protocol):
    """Of weights.layout.Layout; a part's `build` makes its module."""

    parts: dict
    text_tokens: int

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]: ...


# ------------------------------------------------------------------------------------------------ counting
# Products of a query-by-key matrix in fused attention, and the place of q and k among the arguments. Backward
# makes the scores again; the Triton kernels do it twice (kernels/attention.py).
FORWARD = 2
ATTENTION_PRODUCTS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: (FORWARD, 0),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (5, 1),
    torch.ops.sdv.attention: (FORWARD, 0),
    torch.ops.sdv.attention_backward: (7, 1),
}


class Meter(TorchDispatchMode):
    """Bytes alive, now and at most, of the tensors made while it is on, and FLOPs by (stage, kind)."""

    def __init__(self):
        super().__init__()
        self.live: dict[int, int] = {}  # bytes of each storage; 0 for those that were there before
        self.now = self.peak = 0
        self.stage, self.flops = "forward", Counter()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        self.see((args, kwargs), new=False)
        out = op(*args, **kwargs)
        self.see(out, new=True)
        self.add_flops(op.overloadpacket, args, kwargs, out)
        return out

    def see(self, tree: object, new: bool) -> None:
        """Note the storages of all tensors in a tree, until they die; addresses are used again after that."""
        for leaf in tree_leaves(tree):
            if isinstance(leaf, Tensor) and (storage := leaf.untyped_storage())._cdata not in self.live:
                self.live[storage._cdata] = storage.nbytes() if new else 0
                self.now += self.live[storage._cdata]
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.let_go, storage._cdata)

    def let_go(self, address: int) -> None:
        self.now -= self.live.pop(address)

    def add_flops(self, op, args: tuple, kwargs: dict, out: object) -> None:
        products, first = ATTENTION_PRODUCTS.get(op, (0, 0))
        # What backward runs with gradients on, or forward, is a checkpointed block that runs again.
        again = self.stage == "backward" and (torch.is_grad_enabled() or products == FORWARD)
        stage = "recompute" if again else self.stage
        if products:
            q, k = args[first : first + 2]
            self.flops[stage, "attention"] += 2 * products * q.numel() * k.shape[2]
        elif count := flop_registry.get(IN_PLACE.get(op, op)):
            self.flops[stage, "matrices"] += count(*args, **kwargs, out_val=out)


class ClaimGPU(TorchFunctionMode):
    """Tensors say that they are on a GPU, so that kernels.dispatch chooses what would run there."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return True if function == Tensor.is_cuda.__get__ else function(*args, **(kwargs or {}))


@contextmanager
def without_numbers(device: str) -> Iterator[str]:
    """In it, tensors on the device that it gives are shapes alone, and take the paths of those on `device`.

    ValueError for a GPU without Triton: the meta device has no fused attention of torch's own.
    """
    if not device.startswith("cuda"):
        with FakeTensorMode():
            yield "cpu"
        return
    with ClaimGPU():
        if not use_triton(torch.empty(1, device="meta")):
            raise ValueError("--plan counts a GPU's Triton kernels: install triton and unset SDV_KERNELS")
        yield "meta"


# ----------------------------------------------------------------------------------------------- rehearsal
class Cost(NamedTuple):
    """Of one micro-batch. kept: bytes that forward leaves for backward; peak: most bytes at any time."""

    kept: int
    peak: int
    flops: Counter


def load_nothing(module: nn.Module, dtype: torch.dtype, device: str) -> nn.Module:
    """Give a meta module the parameters that weights.load_backbone would: dtype, but what must be fp32."""
    for path, old in list(module.named_parameters()):
        owner, _, leaf = path.rpartition(".")
        wide = old.requires_grad or stays_float32(module, path)
        new = torch.empty(old.shape, dtype=torch.float32 if wide else dtype, device=device)
        setattr(module.get_submodule(owner), leaf, nn.Parameter(new, requires_grad=old.requires_grad))
    return module


def build(cfg: Settings, layout: Layout, layers: int | None = None, device: str = "meta") -> nn.Module:
    """The transformer with its LoRA, or its first blocks, as train.py makes it."""
    with torch.device("meta"):
        dit = layout.parts["dit"].build()
    dit.blocks = dit.blocks[:layers]
    for module in adapt(dit, cfg.rank, cfg.alpha, cfg.targets, cfg.lora_tokens).values():
        module.dropout = cfg.lora_dropout
    dit.recompute, dit.keep_attention = cfg.recompute, cfg.keep_attention
    load_nothing(dit, getattr(torch, cfg.dtype), device)
    hold(dit, cfg.base_storage, device)
    return dit.train()


@torch.enable_grad()
def rehearse(cfg: Settings, layout: Layout, task: Task, layers: int) -> Cost:
    """Forward and backward of the first blocks, all of the reference visible, gradients there already."""
    shape = layout.latent_shape(1 if task == "identity" else cfg.frames, cfg.height, cfg.width)
    batch = getattr(cfg, f"{task}_batch")
    with without_numbers(cfg.device) as device:
        dit = build(cfg, layout, layers, device)
        for parameter in lora_parameters(dit).values():
            parameter.grad = torch.empty_like(parameter)
        with Meter() as meter:
            video = torch.empty(batch, *shape, dtype=dit.dtype, device=device)
            ref, target = video[:, :, :1].clone(), video.float()
            text = video.new_empty(batch, layout.text_tokens, dit.cfg.text_dim)
            pred = dit(video, torch.zeros(batch, dtype=torch.long, device=device), text, ref)
            loss = (pred.float() - target).square().mean()
            kept, meter.stage = meter.now, "backward"
            # Given a tensor, backward would be a torch function, inside which no ClaimGPU is asked.
            torch.autograd.backward(get_gradient_edge(loss), torch.ones_like(loss))
    return Cost(kept, meter.peak, meter.flops)


def count(cfg: Settings, layout: Layout, task: Task, layers: int) -> Cost:
    """Of many blocks: what a few need, and one more of each kind, continued. Exact: blocks are alike."""

    def cost(again: int, once: int) -> Cost:
        then = replace(cfg, recompute=again / (again + once))
        return rehearse(then, layout, task, again + once)

    again = round(cfg.recompute * layers)  # blocks that run twice
    # Two of a kind: the first block of all is not like the others, since its input may be frozen.
    few = min(again, 2), min(layers - again, 2)
    base = cost(*few)
    kept, peak, flops = base.kept, base.peak, Counter(base.flops)
    for more, times in (((1, 0), again - few[0]), ((0, 1), layers - again - few[1])):
        if times:
            deeper = cost(few[0] + more[0], few[1] + more[1])
            kept += times * (deeper.kept - base.kept)
            peak += times * (deeper.peak - base.peak)
            flops.update({key: times * (n - base.flops[key]) for key, n in deeper.flops.items()})
    return Cost(kept, peak, flops)


class EncoderCost(NamedTuple):
    """VAE and text encoder: bytes of their weights, most bytes of their work, FLOPs of one sample."""

    held: int
    work: int
    flops: int


def encoding(cfg: Settings, layout: Layout, task: Task) -> EncoderCost:
    """Samples go through one by one. The VAE is counted as on a GPU; a CPU needs half of its FLOPs."""
    dtype, frames = getattr(torch, cfg.dtype), 1 if task == "identity" else cfg.frames
    with torch.device("meta"):
        vae, text = (layout.parts[part].build().requires_grad_(False) for part in ("vae", "text"))
    load_nothing(vae, dtype, "meta")
    with torch.no_grad(), Meter() as seeing:
        for length in (frames, 1):
            vae.encode(torch.empty(1, 3, length, cfg.height, cfg.width, dtype=dtype, device="meta"))
    with torch.no_grad(), FakeTensorMode():
        load_nothing(text, dtype, "cpu")
        with Meter() as reading:
            text.encoder(torch.zeros(1, layout.text_tokens, dtype=torch.long))
    flops = (seeing.flops + reading.flops).total()
    return EncoderCost(nbytes(vae) + nbytes(text), max(seeing.peak, reading.peak), flops)
