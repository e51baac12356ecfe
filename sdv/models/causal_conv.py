"""Causal 3x3x3 convolutions of a stream of chunks of frames.

Activations are time first and channels last, (T, B, H, W, C).
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from sdv.models import fast_conv
from sdv.models.fast_conv import Activation, conv3d


@dataclass
class Stream:
    """What a chunk of frames remembers of the one before it: two input frames of every convolution."""

    lean: bool  # no gradients: by the fast path, which may overwrite what it is told to
    last: bool = False  # nothing follows, so nothing needs to be remembered
    past: dict[nn.Module, Tensor] = field(default_factory=dict)


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    past: Tensor | None,
    act: Activation | None = None,
    residual: Tensor | None = None,
    overwrite: bool = False,
) -> tuple[Tensor, Tensor]:
    """Convolve frames x (T, B, H, W, C), activated if act is given, and add the residual (T, B, H, W, O).

    past: the activated frames (taps - 1, B, H, W, C) before x; None for copies of the first.
    Returns (T, B, H, W, O) and the last two frames of the input, activated. Never overwrites anything.
    """
    x = x if act is None else act.activate(x).to(x.dtype)
    past = x[:1].expand(weight.shape[2] - 1, -1, -1, -1, -1) if past is None else past
    window = torch.cat([past, x])  # (T + taps - 1, B, H, W, C)
    y = conv3d(window, weight, bias, padding=(1, 1))
    return y if residual is None else y + residual, window[-2:]


class CausalConv(nn.Conv3d):
    """3x3x3 convolution of a frame and the two before it; before a clip lie copies of its first frame."""

    zero_start = False  # whether zeros lie there instead

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(in_channels, out_channels, 3)

    def forward(
        self,
        x: Tensor,
        stream: Stream,
        act: Activation | None = None,
        residual: Tensor | None = None,
        overwrite: bool = False,
    ) -> Tensor:
        """Convolve x (T, B, H, W, C), activated if act is given, and add the residual (T, B, H, W, O).

        overwrite: without gradients the sum is written into the residual.
        """
        past, weight = stream.past.pop(self, None), self.weight
        if past is None and len(x) == 1:
            past, weight = x[:0], self.picture_filter()
        elif past is None and self.zero_start:
            past = x.new_zeros(2, *x.shape[1:])
        way = fast_conv.convolve if stream.lean else convolve
        y, ends = way(x, weight, self.bias, past, act, residual, overwrite)
        if not stream.last:
            before = torch.zeros_like(ends) if self.zero_start else ends
            stream.past[self] = torch.cat([before, ends])[-2:] if len(ends) == 1 else ends
        return y

    def picture_filter(self) -> Tensor:
        """(O, C, 1, 3, 3): what a first frame that is alone meets, at a third of the work."""
        if self.zero_start:
            return self.weight[:, :, 2:]
        taps = self.weight.to(torch.promote_types(self.weight.dtype, torch.float32)).unbind(2)
        return sum(taps).to(self.weight.dtype)[:, :, None]  # .sum(2) is three times slower
