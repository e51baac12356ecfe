"""The plain causal convolution and the fast one beside torch's conv3d of a whole clip in float64."""

import pytest
import torch
import torch.nn.functional as F

from helpers import relative_error
from microworld.pretrain import learn_newest_taps
from sdv.models import fast_conv
from sdv.models.causal_conv import CausalConv, Stream
from sdv.models.cogvideox_vae import Norm, SpatialNorm
from sdv.models.wan_vae import ZeroStartConv

CUTS = [(1,), (9,), (1, 4, 4), (3, 2, 1, 5)]  # chunks of frames


class Silu:
    """An activation that knows nothing of its neighbours."""

    def activate(self, x, rows=slice(None)):
        return F.silu(x[:, :, rows].float() if x.dtype == torch.bfloat16 else x[:, :, rows])


def make(kind, dtype=torch.float32):
    torch.manual_seed(0)
    return kind(24, 16).to(dtype).requires_grad_(False)


def streamed(conv, x, cuts, lean, residual=None, overwrite=False):
    stream, done, out = Stream(lean=lean), 0, []
    for size in cuts:
        now = slice(done, done + size)
        stream.last = now.stop == len(x)
        out.append(conv(x[now], stream, Silu(), None if residual is None else residual[now], overwrite))
        done += size
    assert not stream.past
    return torch.cat(out)


def whole(conv, x, residual):
    """All frames in one conv3d, in float64."""
    x = F.silu(x.double()).permute(1, 4, 0, 2, 3)
    start = torch.zeros_like(x[:, :, :1]) if conv.zero_start else x[:, :, :1]
    x = torch.cat([start, start, x], dim=2)
    y = F.conv3d(x, conv.weight.double(), conv.bias.double(), padding=(0, 1, 1))
    return y.permute(2, 0, 3, 4, 1) + residual.double()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("kind", [CausalConv, ZeroStartConv])
def test_both_convolutions_are_torchs_however_time_and_rows_are_cut(
    kind, cuts, dtype, tolerance, monkeypatch
):
    conv = make(kind, dtype)
    x, residual = (torch.randn(sum(cuts), 2, 20, 9, n).to(dtype) for n in (24, 16))
    want = whole(conv, x, residual)
    plain = streamed(conv, x, cuts, False, residual)
    assert relative_error(plain, want) <= tolerance
    for bytes_, small in ((2**24, 2**15), (1, 2**15), (1, 0)):  # the last: runs of two in bfloat16 too
        monkeypatch.setattr(fast_conv, "BAND_BYTES", bytes_)
        monkeypatch.setattr(fast_conv, "SMALL", small)
        fast = streamed(conv, x, cuts, True, residual)
        assert relative_error(fast, want) <= tolerance
        assert relative_error(fast, plain) <= 2 * tolerance


@pytest.mark.parametrize("lean", [False, True])
def test_a_residual_is_overwritten_only_when_told_and_without_gradients(lean):
    conv = make(CausalConv)
    x, residual = torch.randn(5, 1, 8, 8, 24), torch.randn(5, 1, 8, 8, 16)
    kept = x.clone(), residual.clone()
    y = streamed(conv, x, (5,), lean, residual)
    assert torch.equal(x, kept[0]) and torch.equal(residual, kept[1])
    again = conv(x, Stream(lean=lean, last=True), Silu(), residual, overwrite=True)
    assert torch.equal(x, kept[0]) and torch.equal(again, y)
    assert (again is residual) == lean


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spatial", [False, True])
def test_rows_of_an_activation_are_rows_of_the_whole(spatial, dtype):
    norm = SpatialNorm(4, 24, 6) if spatial else Norm(4, 24)
    x, z = torch.randn(4, 2, 16, 8, 24).to(dtype), torch.randn(2, 2, 4, 2, 6).to(dtype)
    act = norm.to(dtype)(x, z)
    assert torch.equal(act.activate(x, slice(5, 11)), act.activate(x)[:, :, 5:11])


def test_the_micro_worlds_vae_learns_by_the_newest_tap_alone():
    conv = make(CausalConv)
    conv.weight[:, :, :2] = 0
    x = torch.randn(1, 3, 8, 8, 24)
    conv.requires_grad_(True)
    learn_newest_taps(conv)
    conv(x, Stream(lean=False, last=True)).square().sum().backward()
    newest = conv.weight.detach()[:, :, 2].clone().requires_grad_()
    F.conv2d(x[0].permute(0, 3, 1, 2), newest, conv.bias, padding=1).square().sum().backward()
    assert not conv.weight.grad[:, :, :2].any()
    assert relative_error(conv.weight.grad[:, :, 2], newest.grad) <= 1e-6
