"""Where every visual token sits: 3-D rotary tables, and the place of the reference.

CogVideoX turns each pair of channels of a query or key by (position x frequency); of a head's channels a
quarter carry the frame, three eighths the row, three eighths the column. Text is not turned at all.

            frame 0      frame 1      frame 2   ...   frame T
          +---------+  +---------+  +---------+     +---------+
          |   ref   |  | video 0 |  | video 1 | ... | video   |      rows and columns: the same grid for all
          |  clean  |  |  noisy  |  |  noisy  |     |   T-1   |
          +---------+  +---------+  +---------+     +---------+

The reference is one more frame, before the first. Dropping some or all of its tokens moves nobody else.
Plain text-to-video, without a reference, starts the video at frame 0.
"""

import torch
from torch import Tensor, nn

THETA = 10_000.0


def place_reference(dit: nn.Module, place: str) -> None:
    """Choose one of a backbone's places for the reference. ValueError for one that it does not know."""
    if place not in dit.ref_positions:
        raise ValueError(f"reference position {place!r}: this model knows {', '.join(dit.ref_positions)}")
    dit.ref_position = place


def rope_angles(positions: Tensor, channels: int) -> Tensor:
    """Positions (n,) -> angles (n, channels // 2) of the interleaved pairs, in float64."""
    exponents = torch.arange(0, channels, 2, dtype=torch.float64, device=positions.device) / channels
    return torch.outer(positions.double(), THETA**-exponents)


def rope_table(
    frames: Tensor, rows: Tensor, columns: Tensor, split: tuple[int, int, int]
) -> tuple[Tensor, Tensor]:
    """Positions on three axes -> cos, sin (T * H * W, K // 2) in fp32; split: channels of K for each axis."""
    shape = (len(frames), len(rows), len(columns), -1)
    angles = torch.cat(
        [
            rope_angles(frames, split[0])[:, None, None, :].expand(shape),
            rope_angles(rows, split[1])[None, :, None, :].expand(shape),
            rope_angles(columns, split[2])[None, None, :, :].expand(shape),
        ],
        dim=-1,
    ).flatten(0, 2)
    return angles.cos().float(), angles.sin().float()


def centred_grid(grid: tuple[int, int], base: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """Fit a grid of (height, width) patches into the base grid, keeping its shape and centring it.

    Returns (start, stop) for rows and for columns: other sizes reuse the positions the model was trained on.
    """
    (height, width), (base_height, base_width) = grid, base
    if height / width > base_height / base_width:
        size = base_height, round(base_height / height * width)
    else:
        size = round(base_width / width * height), base_width
    top = round((base_height - size[0]) / 2)
    left = round((base_width - size[1]) / 2)
    return (top, top + size[0]), (left, left + size[1])


def spread(start: int, stop: int, n: int, device: torch.device) -> Tensor:
    """n positions from start to stop * (n - 1) / n: stop excluded, as the released model was trained."""
    return torch.linspace(start, stop * (n - 1) / n, n, dtype=torch.float64, device=device)
