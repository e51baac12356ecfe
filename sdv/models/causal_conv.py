"""A causal 3x3x3 convolution of a stream of chunks of frames (T, B, H, W, C): time first, channels last."""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from sdv.models import fast_conv
from sdv.models.fast_conv import Activation, conv3d


@dataclass
class Stream:
    """What a chunk of frames remembers of the one before it: two input frames of every convolution."""

    lean: bool  # no gradients: work in small pieces, and overwrite what a call says may be overwritten
    last: bool = False  # nothing follows, so nothing needs to be remembered
    past: dict[nn.Module, Tensor] = field(default_factory=dict)


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

        overwrite: in a lean stream the sum is written into the residual, which is returned.
        """
        past, weight = stream.past.pop(self, None), self.weight  # (2, B, H, W, C), activated
        if past is None and len(x) == 1:
            past, weight = x[:0], self.picture_filter()
        elif past is None and self.zero_start:
            past = x.new_zeros(2, *x.shape[1:])
        if stream.lean:  # the same in less memory; the device decides how (fast_conv.py)
            y, window = fast_conv.convolve(x, weight, self.bias, past, act, residual, overwrite)
        else:
            x = x if act is None else act.activate(x).to(x.dtype)
            past = x[:1].expand(2, -1, -1, -1, -1) if past is None else past
            window = torch.cat([past, x]) if len(past) else x  # (T + 2, B, H, W, C)
            y = conv3d(window, weight, self.bias, padding=(1, 1))
            y = y if residual is None else y + residual
        if not stream.last:
            if len(window) == 1:
                window = torch.cat([torch.zeros_like(window) if self.zero_start else window, window])
            stream.past[self] = window[-2:]
        return y  # (T, B, H, W, O)

    def picture_filter(self) -> Tensor:
        """(O, C, 1, 3, 3): what a first frame meets if no other comes with it, a third of the products."""
        if self.zero_start:
            return self.weight[:, :, 2:]
        taps = self.weight.to(torch.promote_types(self.weight.dtype, torch.float32)).unbind(2)
        return sum(taps).to(self.weight.dtype)[:, :, None]  # .sum(2) is three times slower
