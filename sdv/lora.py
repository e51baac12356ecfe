"""LoRA for Linear and Conv2d: W x + (alpha / rank) B A x, with W frozen and shared, B = 0 at the start.

A and B stay in fp32 and are cast to the input's dtype where they are used: an AdamW step, 5e-5 at most and
often a tenth of it, is about or below the spacing of bf16 numbers around a typical entry of A (6e-5 at 0.01).
It would be lost, or rounded to a whole spacing.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sdv.models.layers import is_finite


class LoRA(nn.Module):
    """A frozen layer and its low-rank update; holds the very weight and bias of the layer it replaces."""

    def __init__(self, base: nn.Linear | nn.Conv2d, rank: int, alpha: float):
        super().__init__()
        self.weight, self.bias = base.weight, base.bias
        self.rank, self.alpha = rank, alpha
        self.dropout, self.merged = 0.0, False  # dropout of A's input, in train mode only
        self.tokens: Callable[[], slice] | None = None  # which of (B, L, D) the update acts on; None: all
        out_features, *fan_in = base.weight.shape  # a convolution's A has its kernel, its B is 1 x 1
        ones = [1] * (len(fan_in) - 1)
        self.lora_A = nn.Parameter(torch.empty(rank, *fan_in, device=base.weight.device))
        self.lora_B = nn.Parameter(torch.zeros(out_features, rank, *ones, device=base.weight.device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def delta(self) -> Tensor:
        """The update of the weight, in fp32."""
        product = self.lora_B.float().flatten(1) @ self.lora_A.float().flatten(1)
        return self.scale * product.view(self.weight.shape)

    def forward(self, x: Tensor) -> Tensor:
        out = self.apply_weight(x, self.weight, self.bias)
        if self.merged:
            return out
        if self.tokens is None:
            return torch.add(out, self.update(x), alpha=self.scale)
        chosen = self.tokens()
        out[:, chosen] += self.scale * self.update(x[:, chosen])
        return out

    def update(self, x: Tensor) -> Tensor:
        """B A x."""
        low = self.apply_weight(F.dropout(x, self.dropout, self.training), self.lora_A.to(x.dtype))
        return self.widen(low, self.lora_B.to(x.dtype))


class LinearSum(torch.autograd.Function):
    """W x + bias + scale B A x for rows x (n, in), and its gradients.

    Each second product adds to the first in place. Autograd would have tensors of their own, as large as the
    output or x, for the update, the sum, and both parts of the gradient of x.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float):
        low = (x @ a.T).mul_(scale)  # (n, rank)
        ctx.save_for_backward(x, weight if ctx.needs_input_grad[0] else None, a, b, low)
        ctx.scale = scale
        return F.linear(x, weight, bias).addmm_(low, b.T)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b, low = ctx.saved_tensors
        dlow = (grad @ b).mul_(ctx.scale)  # (n, rank)
        dx = (grad @ weight).addmm_(dlow, a) if ctx.needs_input_grad[0] else None
        return dx, None, None, dlow.T @ x, grad.T @ low, None


class LoRALinear(LoRA):
    def forward(self, x: Tensor) -> Tensor:
        if self.merged or self.tokens or (self.dropout and self.training):
            return super().forward(x)
        a, b = self.lora_A.to(x.dtype), self.lora_B.to(x.dtype)
        out = LinearSum.apply(x.flatten(0, -2), self.weight, self.bias, a, b, self.scale)
        return out.unflatten(0, x.shape[:-1])

    def apply_weight(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(x, weight, bias)

    def widen(self, low: Tensor, weight: Tensor) -> Tensor:
        return F.linear(low, weight)


class LoRAConv2d(LoRA):
    def __init__(self, base: nn.Conv2d, rank: int, alpha: float):
        super().__init__(base, rank, alpha)
        self.stride, self.padding = base.stride, base.padding

    def apply_weight(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.conv2d(x, weight, bias, self.stride, self.padding)

    def widen(self, low: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(low, weight)


def add_lora(model: nn.Module, rank: int, alpha: float, targets: tuple[str, ...]) -> dict[str, LoRA]:
    """Freeze the model and replace every Linear and Conv2d whose path ends with one of the targets.

    Returns {path: module} in the model's order. ValueError for a target that fits nothing.
    """
    model.requires_grad_(False)
    unused = set(targets)
    for path, layer in list(model.named_modules()):
        target = next((target for target in targets if f".{path}".endswith(f".{target}")), None)
        if target is None or not isinstance(layer, nn.Linear | nn.Conv2d):
            continue
        owner, _, leaf = path.rpartition(".")
        kind = LoRALinear if isinstance(layer, nn.Linear) else LoRAConv2d
        setattr(model.get_submodule(owner), leaf, kind(layer, rank, alpha))
        unused.discard(target)
    if unused:
        raise ValueError(f"LoRA targets that fit no Linear or Conv2d of it: {', '.join(sorted(unused))}")
    return lora_modules(model)


def strengths(model: nn.Module) -> dict[str, set[float]]:
    """{"rank": ..., "alpha": ...}: the values that its LoRA modules have."""
    modules = lora_modules(model).values()
    return {name: {getattr(module, name) for module in modules} for name in ("rank", "alpha")}


def round_lora(model: nn.Module) -> None:
    """Keep A and B in the dtype of their layer, to which each call casts them anyway: half the memory.

    For sampling alone. Training needs the digits that go, and `merge` adds in fp32.
    """
    for module in lora_modules(model).values():
        for half in (module.lora_A, module.lora_B):
            half.data = half.to(module.weight.dtype)


def act_on_reference(dit: nn.Module) -> None:
    """Let the LoRA change the reference's tokens alone: without a reference, the model is its base.

    ValueError if it is also in layers that see the text, the time or whole frames.
    """
    modules = lora_modules(dit)
    others = [path for path in modules if not path.endswith(dit.visual_targets)]
    if others:
        raise ValueError(f"LoRA on the reference's tokens: {others[0]} does not see these one by one")
    for module in modules.values():
        module.tokens = lambda: dit.ref_tokens


def adapt(
    dit: nn.Module, rank: int, alpha: float, targets: tuple[str, ...] = (), tokens: str = "all"
) -> dict[str, LoRA]:
    """Give a transformer a new LoRA, in its own targets or in those named, on "all" tokens or the "ref"'s."""
    places = dit.lora_targets if tokens == "all" else dit.visual_targets
    modules = add_lora(dit, rank, alpha, targets or places)
    if tokens == "ref":
        act_on_reference(dit)
    return modules


def acts_on(model: nn.Module) -> str:
    """Which tokens its LoRA changes: "all" or "ref", as `adapt` takes it."""
    return "ref" if any(module.tokens for module in lora_modules(model).values()) else "all"


def lora_modules(model: nn.Module) -> dict[str, LoRA]:
    """{path: module} in the model's order."""
    return {path: module for path, module in model.named_modules() if isinstance(module, LoRA)}


def lora_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """{path.lora_A or path.lora_B: parameter} in the model's order: the trainable set."""
    return {
        f"{path}.{leaf}": getattr(module, leaf)
        for path, module in lora_modules(model).items()
        for leaf in ("lora_A", "lora_B")
    }


def require_mergeable(model: nn.Module, name: str) -> None:
    """ValueError, with this name, if the LoRA acts on the reference's tokens alone: weights act on all."""
    if acts_on(model) == "ref":
        raise ValueError(f"{name}: acts on the reference's tokens alone, so it cannot be merged")


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """Fold every update into the shared weights, and drop it: sampling then costs what the base model costs.

    ValueError, with the layer, for an update on some tokens, or one that leaves the range of the weights.
    """
    require_mergeable(model, "the LoRA")
    for path, module in lora_modules(model).items():
        if not module.merged:
            merged = (module.weight.float() + module.delta()).to(module.weight.dtype)
            if not is_finite(merged):
                raise ValueError(f"{path}: with its LoRA, the weight is not finite in {merged.dtype}")
            module.weight.copy_(merged)
            module.merged = True
            del module.lora_A, module.lora_B
