"""The kernels against float64: outputs, every gradient, every layout, and what mathematics promises.

    pytest test_kernels.py                      without CUDA in Triton's interpreter, and in a process of its
                                                own, because it has to be on before Triton is imported
    TRITON_INTERPRET=1 pytest test_kernels.py   the same, in this process
    make test-triton TRITON=3.6.0               with another Triton: 3.6, 3.7 and 3.9 are held to pass

With CUDA the GPU runs them. The interpreter checks numbers and indexing, not the machine code, which
tests/test_kernel_package.py reads, and its bf16 is wrong: there kernels get bf16 as fp32, and only the result
is rounded.
"""

import importlib
import math
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

import kernels
from kernels import dispatch, hopper

attention = importlib.import_module("kernels.attention")  # which the package hides behind its function
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
ARCHS = (90,) if CUDA else (90, 80)  # in the interpreter: the kernels with TMA, and those with pointers
OWN_PROCESS = not CUDA and not dispatch.INTERPRET
ROOT = Path(__file__).parent
NEEDS_HOPPER = pytest.mark.skipif(
    not CUDA or torch.cuda.get_device_capability() != (9, 0),
    reason="no Hopper: tests/test_hopper.py plays its kernel",
)


@pytest.fixture(autouse=True)
def poisoned(request):
    """Fresh memory is NaN: whoever reads what nobody wrote is found out."""
    if OWN_PROCESS and request.function.__name__ != "test_in_a_process_of_its_own":
        pytest.skip("runs in test_in_a_process_of_its_own")
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def child(interpret, *command):
    """Another Python with Triton's interpreter on ("1") or off ("0"); it has to succeed."""
    environment = os.environ | {"TRITON_INTERPRET": interpret}
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True)
    assert done.returncode == 0, done.stdout.decode()[-4000:] + done.stderr.decode()[-2000:]


@pytest.mark.skipif(not OWN_PROCESS, reason="this process runs the kernels itself")
def test_in_a_process_of_its_own():
    child("1", "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__)


# ---- the oracle: formulas in float64 ---------------------------------------------------------------------


def softmax_attention(q, k, v, scale=None):
    return torch.softmax(q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale), -1) @ v


def exact_attention(q, k, v):
    """(output, scores) in float64"""
    q, k, v = (x.double() for x in (q, k, v))
    return softmax_attention(q, k, v), q @ k.mT * q.shape[-1] ** -0.5


def turn(x, cos, sin):
    """Multiplication by e^(i angle), with the pairs as complex numbers."""
    x, text = x.to(cos.dtype), x.shape[2] - len(cos)
    pairs = torch.view_as_complex(x[:, :, text:].unflatten(-1, (-1, 2)).contiguous()) * torch.complex(
        cos, sin
    )
    return torch.cat((x[:, :, :text], torch.view_as_real(pairs).flatten(-2)), 2)


def head_norm(x, weight, bias, cos, sin, eps=1e-6):
    centred = x - x.mean(-1, keepdim=True)
    return turn(centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * weight + bias, cos, sin)


def token_norm(x, weight, cos=None, sin=None, eps=1e-6):
    normed = x / (x.square().mean((1, 3), keepdim=True) + eps).sqrt() * weight.view(x.shape[1], 1, -1)
    return normed if cos is None else turn(normed, cos, sin)


def per_token(m, x, segments):
    lengths = (x.shape[1] // m.shape[1],) * m.shape[1] if segments is None else segments
    return torch.cat([m[:, s : s + 1].expand(-1, n, -1) for s, n in enumerate(lengths)], 1)


def modulated(x, scale, shift, weight=None, bias=None, eps=1e-5, segments=None):
    centred = x - x.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    normed = normed * (1 if weight is None else weight) + (0 if bias is None else bias)
    return normed * (1 + per_token(scale, x, segments)) + per_token(shift, x, segments)


def gated(x, y, gate, segments=None):
    return x + per_token(gate, x, segments) * y


def gated_modulated(x, y, gate, scale, shift, weight=None, bias=None, eps=1e-5, segments=None):
    h = gated(x, y, gate, segments)
    return h, modulated(h, scale, shift, weight, bias, eps, segments)


# ---- how they are compared -------------------------------------------------------------------------------


def rel(a, b):
    """||a - b|| / ||b||, and absolute where b all but vanishes (the gradient of a softmax over one key)."""
    return ((a.double() - b.double()).norm() / b.double().norm().clamp_min(0.1)).item()


def numbers(*shape, dtype=torch.float32):
    return torch.randn(shape, device=DEVICE).to(dtype)


def ones(*shape):
    """The gradient that .sum().backward() sends: every stride is 0."""
    return torch.ones((), device=DEVICE).expand(shape)


def results(f, inputs, weights, wide=False):
    """f's outputs, and the gradients of sum(output * weight) to every input that learns."""
    mine = [(x.detach().double() if wide else x.detach()).requires_grad_(x.requires_grad) for x in inputs]
    leaves = [x for x in mine if x.requires_grad]
    out = f(*mine)
    out = out if isinstance(out, tuple) else (out,)
    weights = weights or [torch.randn_like(o) for o in out]
    grads = torch.autograd.grad(out, leaves, [w.to(o.dtype) for w, o in zip(weights, out, strict=True)])
    return out, grads, weights


def widened(kernel):
    """The kernel itself; in the interpreter, whose bf16 arithmetic is wrong, bf16 goes in and out as fp32."""

    def call(*inputs):
        out = kernel(*(x.float() if x.dtype == torch.bfloat16 else x for x in inputs))
        dtype = inputs[0].dtype
        return out.to(dtype) if isinstance(out, torch.Tensor) else tuple(o.to(dtype) for o in out)

    return call if dispatch.INTERPRET else kernel


def agree(kernel, oracle, inputs, forward=1e-5, backward=1e-4, weights=None, terms=0.0):
    """Kernel and oracle agree, output by output and gradient by gradient, and nothing is NaN.

    A gradient that vanishes because its terms cancel may be off by what fp32 keeps of them, given their size.
    """
    out, grads, weights = results(widened(kernel), inputs, weights)
    true_out, true_grads, _ = results(oracle, inputs, weights, wide=True)
    learn = [x for x in inputs if x.requires_grad]
    for a, b, x in zip(grads, true_grads, learn, strict=True):
        assert a.shape == b.shape and a.dtype == x.dtype
        assert rel(a, b) <= backward or (b.norm() < 0.1 and (a - b).norm() <= 1e-6 * terms)
    for a, b in zip(out, true_out, strict=True):
        assert a.shape == b.shape and rel(a, b) <= forward


def no_worse_than_torch(kernel, oracle, inputs):
    """In half precision: at most twice the error of the plain formula in the same precision."""
    out, grads, weights = results(widened(kernel), inputs, None)
    plain_out, plain_grads, _ = results(oracle, inputs, weights)
    true_out, true_grads, _ = results(oracle, inputs, weights, wide=True)
    for a, b, true in zip((*out, *grads), (*plain_out, *plain_grads), (*true_out, *true_grads), strict=True):
        assert rel(a, true) <= 2 * rel(b, true) + 1e-6


def heads(B, H, L, K, dtype=torch.float32, layout="linear"):
    """x (B, H, L, K) as callers may hold it."""
    x = numbers(B, L, H * K, dtype=dtype).unflatten(-1, (H, K)).transpose(1, 2)
    if layout == "contiguous":
        x = x.contiguous()
    elif layout == "fused":  # one of q, k, v of a single linear
        x = numbers(B, L, 3 * H * K, dtype=dtype).chunk(3, -1)[1].unflatten(-1, (H, K)).transpose(1, 2)
    elif layout == "odd":  # neither rows nor base lie at multiples of 16 bytes
        x = numbers(B, H, L, K + 1, dtype=dtype)[..., 1:]
    elif layout == "expanded":  # one head for all
        x = numbers(B, 1, L, K, dtype=dtype).expand(B, H, L, K)
    elif layout == "guarded":  # NaN behind the end of every sample
        x = torch.full((B, L + 200, H, K), torch.nan, dtype=dtype, device=DEVICE)[:, :L].transpose(1, 2)
        x = x.copy_(numbers(B, H, L, K))
    return x.requires_grad_()


def tables(R, K):
    angle = torch.rand(R, K // 2, device=DEVICE) * 6.28
    return angle.cos(), angle.sin()


# ---- attention -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("K", (16, 32, 64, 128))
@pytest.mark.parametrize(("Lq", "Lk"), ((1, 1), (17, 300), (300, 77), (130, 130)))
def test_attention(Lq, Lk, K, arch):
    q, k, v = (heads(1, 2, L, K) for L in (Lq, Lk, Lk))
    do = numbers(1, Lq, 2, K).transpose(1, 2)
    # Of one key the weight is 1, whatever its score: in dQ and dK, dP and delta cancel.
    do_size, k_size, v_size = (x.norm(dim=3, keepdim=True) for x in (do, k, v))
    terms = (do_size * k_size * v_size).norm() * K**-0.5 if Lk == 1 else 0.0
    with dispatch.pretend(arch):
        agree(kernels.attention, softmax_attention, [q, k, v], weights=[do], terms=terms)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("layout", ("contiguous", "fused", "odd", "expanded", "guarded"))
def test_attention_layouts(layout, arch):
    inputs = [heads(2, 2, 40, 32, layout=layout) for _ in range(3)]
    with dispatch.pretend(arch):
        for weight in (numbers(2, 40, 2, 32).transpose(1, 2), ones(2, 2, 40, 32)):
            agree(kernels.attention, softmax_attention, inputs, weights=[weight])


def test_attention_scale_and_large_scores():
    q, k, v = (heads(1, 1, 70, 64) for _ in range(3))
    for scale in (0.03, 4.0):  # 4: scores of a hundred and more, far past what exp alone could take
        agree(partial(kernels.attention, scale=scale), partial(softmax_attention, scale=scale), [q, k, v])


def test_attention_theorems():
    q, k, v = (heads(1, 2, 77, 64).detach() for _ in range(3))
    out = kernels.attention(q, k, v)
    order = torch.randperm(77, device=DEVICE)
    assert rel(kernels.attention(q, k[:, :, order], v[:, :, order]), out) < 1e-6  # keys are a set
    assert rel(kernels.attention(q, k, torch.ones_like(v)), torch.ones_like(v)) < 1e-6  # weights add up to 1
    assert rel(kernels.attention(q, k + 3.0, v), out) < 1e-5  # softmax does not see a shift
    assert out.transpose(1, 2).is_contiguous()  # the next linear needs no copy


@NEEDS_HOPPER
@pytest.mark.parametrize("layout", ("linear", "contiguous", "fused", "odd", "expanded", "guarded"))
@pytest.mark.parametrize("K", hopper.WIDTHS)
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
@pytest.mark.parametrize(
    ("B", "Lq", "Lk"), ((1, 1, 1), (1, 17, 300), (1, 300, 77), (2, 333, 1101), (2, 70, 5))
)
def test_hopper_attention(B, Lq, Lk, dtype, K, layout, monkeypatch):
    """Its output and lse against float64, twice with the same bits, and the lse of the portable kernel."""
    q, k, v = (heads(B, 2, L, K, dtype, layout).detach() for L in (Lq, Lk, Lk))
    paper = torch.full((B, Lq + 200, 2, K), torch.nan, dtype=dtype, device=DEVICE)  # o is a part of it
    monkeypatch.setattr(hopper, "token_major", lambda _: paper[:, :Lq].transpose(1, 2))
    assert hopper.fits(q)
    (o, lse), (true, s) = attention._forward(q, k, v, K**-0.5), exact_attention(q, k, v)
    assert rel(o, true) <= 2 * rel(softmax_attention(q, k, v), true) + 1e-6
    assert rel(lse, torch.logsumexp(s, -1) / math.log(2)) <= 1e-6
    portable, portable_lse = attention._portable_forward(*map(attention._aligned, (q, k, v)), K**-0.5)
    assert rel(lse, portable_lse) <= 1e-6 and rel(portable, true) <= 2 * rel(o, true) + 1e-6
    assert paper[:, Lq:].isnan().all()  # nothing crosses the end of a sample
    first = o.clone()
    again = attention._forward(q, k, v, K**-0.5)
    assert torch.equal(again[0], first) and torch.equal(again[1], lse)


@NEEDS_HOPPER
@pytest.mark.parametrize("layout", ("fused", "guarded"))
@pytest.mark.parametrize("K", hopper.WIDTHS)
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_gradients_after_the_hopper_forward(dtype, K, layout):
    inputs = [heads(2, 2, L, K, dtype, layout) for L in (333, 130, 130)]
    no_worse_than_torch(kernels.attention, softmax_attention, inputs)


# ---- rotation and the norms before it --------------------------------------------------------------------


@pytest.mark.parametrize("shape", ((1, 1, 64), (17, 17, 128), (77, 60, 64), (130, 0, 32), (300, 299, 16)))
def test_rope_and_norms(shape):
    L, R, K = shape
    H, table = 3, tables(R, K)
    x = heads(2, H, L, K)
    weight, bias, wide = (numbers(n).requires_grad_() for n in (K, K, H * K))
    agree(kernels.rope, turn, [x, *table])
    agree(kernels.layernorm_rope, head_norm, [x, weight, bias, *table])
    agree(kernels.rmsnorm_rope, token_norm, [x, wide, *table])
    agree(kernels.rmsnorm_rope, token_norm, [x, wide])


@pytest.mark.parametrize("layout", ("contiguous", "fused", "odd", "expanded"))
def test_rope_layouts(layout):
    x, table = heads(2, 20, 9, 32, layout=layout), tables(7, 32)  # 20 heads: more than one tile holds
    weight, bias, wide = (numbers(2 * n)[::2].requires_grad_() for n in (32, 32, 640))
    for weights in ([numbers(2, 9, 20, 32).transpose(1, 2)], [ones(2, 20, 9, 32)]):
        agree(kernels.rope, turn, [x, *table], weights=weights)
        agree(kernels.layernorm_rope, head_norm, [x, weight, bias, *table], weights=weights)
        agree(kernels.rmsnorm_rope, token_norm, [x, wide, *table], weights=weights)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_half_precision(dtype):
    inputs = [heads(1, 2, L, 64, dtype=dtype) for L in (77, 130, 130)]
    no_worse_than_torch(kernels.attention, softmax_attention, inputs)
    x, table = heads(1, 4, 33, 64, dtype=dtype), tables(30, 64)
    weight, bias, wide = (numbers(n, dtype=dtype).requires_grad_() for n in (64, 64, 256))

    def rounded(norm):  # the norm in half precision, the turn in fp32: as models without fused kernels do it
        return lambda x, *rest: norm(x, *rest).to(x.dtype)

    no_worse_than_torch(kernels.layernorm_rope, rounded(head_norm), [x, weight, bias, *table])
    no_worse_than_torch(kernels.rmsnorm_rope, rounded(token_norm), [x, wide, *table])


def test_rope_theorems():
    x, (cos, sin) = heads(1, 2, 24, 32).detach(), tables(24, 32)
    turned = kernels.rope(x, cos, sin)
    assert rel(turned.norm(dim=-1), x.norm(dim=-1)) < 1e-6  # a turn keeps lengths
    assert rel(kernels.rope(turned, cos, -sin), x) < 1e-6  # and can be undone
    angle = torch.arange(24, device=DEVICE)[:, None] * torch.rand(1, 16, device=DEVICE)
    q, k = (kernels.rope(x[:, :, :1].expand_as(x), angle.cos(), angle.sin()) for _ in range(2))
    scores = q @ k.mT  # same token everywhere: scores depend on the distance alone
    assert rel(scores[0, 0, 5:], scores[0, 0, :-5].roll(5, -1)) > 0.1
    assert rel(scores[0, 0, 5:, 5:], scores[0, 0, :-5, :-5]) < 1e-5


# ---- adaptive norm and gated residual --------------------------------------------------------------------

# (number of modulations, lengths of their segments; a negative one counts from the end)
CUTS = {"whole": (1, None), "token": (None, None), "two": (2, (9, -9)), "hole": (4, (5, 0, 1, -6))}


BOTH = kernels.gated_residual_adaln, gated_modulated  # kernel and oracle of the two in one


def blocks(B, L, D, cut, dtype=torch.float32, modulation=torch.float32):
    """(x, y), (gate, scale, shift) as strided chunks of one linear, (weight, bias), segments"""
    S, segments = CUTS[cut]
    S = S or L
    segments = segments and tuple(n if n >= 0 else L + n for n in segments)
    rows = [numbers(B, L, D, dtype=dtype).requires_grad_() for _ in range(2)]
    three = [m.requires_grad_() for m in numbers(B, S, 3 * D, dtype=modulation).chunk(3, -1)]
    return rows, three, [numbers(D, dtype=modulation).requires_grad_() for _ in range(2)], segments


def three_ways(compare, B, L, D, cut, **dtypes):
    (x, y), (gate, scale, shift), affine, segments = blocks(B, L, D, cut, **dtypes)
    for f, g, inputs in (
        (kernels.adaln, modulated, [x, scale, shift]),
        (kernels.adaln, modulated, [x, scale, shift, *affine]),
        (kernels.gated_residual, gated, [x, y, gate]),
        (*BOTH, [x, y, gate, scale, shift, *affine]),
    ):
        compare(partial(f, segments=segments), partial(g, segments=segments), inputs)


@pytest.mark.parametrize("cut", CUTS)
def test_adaln(cut):
    three_ways(agree, 2, 17, 96, cut)


@pytest.mark.parametrize(("L", "D"), ((1, 64), (77, 40), (300, 8)))
def test_adaln_ragged(L, D):
    rows, three, affine, _ = blocks(1, L, D, "whole")
    agree(*BOTH, [*rows, *three, *affine])


@pytest.mark.parametrize("modulation", (torch.float32, torch.bfloat16, torch.float16))
def test_adaln_in_half_precision(modulation):
    """Wan keeps modulation in fp32 beside a bf16 stream: gradients come in the dtype of their input."""
    dtype = torch.float16 if modulation == torch.float16 else torch.bfloat16
    close = partial(agree, forward=6e-3, backward=1.2e-2)
    three_ways(close, 1, 33, 96, "two", dtype=dtype, modulation=modulation)


def test_adaln_layouts():
    x = numbers(2, 11, 3 * 48).chunk(3, -1)[1].requires_grad_()
    scale, shift = (numbers(1, 1, 48).expand(2, 1, 48).requires_grad_() for _ in range(2))
    for weight in (numbers(2, 48, 11).mT, ones(2, 11, 48)):
        agree(kernels.adaln, modulated, [x, scale, shift], weights=[weight])
        agree(
            kernels.gated_residual, gated, [x, x.detach().flip(1).requires_grad_(), shift], weights=[weight]
        )
    agree(kernels.adaln, modulated, [numbers(2, 48, 11).mT.requires_grad_(), scale, shift])


def test_adaln_theorems():
    (x, y), (gate, *_), (weight, bias), _ = blocks(2, 30, 64, "whole")
    zero = torch.zeros_like(gate)
    plain = torch.nn.functional.layer_norm(x, (64,), weight, bias, 1e-5)
    assert rel(kernels.adaln(x, zero, zero, weight, bias), plain) < 1e-6  # no modulation: LayerNorm
    scaled = kernels.adaln(3 * x + 1, zero, zero)
    assert rel(scaled, kernels.adaln(x, zero, zero)) < 1e-4  # sees neither 3 nor 1
    assert torch.equal(kernels.gated_residual(x, y, zero), x)  # a closed gate
    h, out = kernels.gated_residual_adaln(x, y, gate, gate, gate)
    assert torch.equal(h, kernels.gated_residual(x, y, gate))
    assert rel(out, kernels.adaln(h, gate, gate)) < 1e-6


def test_one_of_two_outputs():
    rows, (gate, *modulation), affine, segments = blocks(1, 20, 32, "two")
    norm = modulation + affine
    for used, inputs in ((0, [*rows, gate, *(m.detach() for m in norm)]), (1, [*rows, gate, *norm])):
        agree(*(lambda *a, f=f, i=used: f(*a, segments=segments)[i] for f in BOTH), inputs)


def test_frozen_modulation():
    """What LoRA runs: gradients to x and y alone are the same, and y is not kept for backward."""
    (x, y), three, affine, segments = blocks(1, 20, 32, "two")
    frozen = [m.detach() for m in (*three, *affine)]
    agree(*(partial(f, segments=segments) for f in BOTH), [x, y, *frozen])
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        kernels.gated_residual_adaln(x, y, *frozen, segments=segments)
    assert saved and y.data_ptr() not in saved
    z = heads(1, 2, 9, 32)
    agree(kernels.layernorm_rope, head_norm, [z, numbers(32), numbers(32), *tables(9, 32)])


# ---- for every kernel ------------------------------------------------------------------------------------


def everything():
    """One call of each public function, for what is asked of all."""
    q, k, table = heads(1, 2, 40, 32), heads(1, 2, 40, 32), tables(33, 32)
    (x, y), (gate, *modulation), affine, segments = blocks(1, 40, 64, "two")
    head, token = numbers(32).requires_grad_(), numbers(64).requires_grad_()
    inputs = {"attention": [q, k, k], "rope": [q, *table], "layernorm_rope": [q, head, head, *table],
              "rmsnorm_rope": [q, token, *table], "adaln": [x, *modulation, *affine],
              "gated_residual": [x, y, gate],
              "gated_residual_adaln": [x, y, gate, *modulation, *affine]}  # fmt: skip
    more = dict.fromkeys(("adaln", "gated_residual", "gated_residual_adaln"), {"segments": segments})
    return {k: (partial(getattr(kernels, k), **more.get(k, {})), given) for k, given in inputs.items()}


EVERY = pytest.mark.parametrize("name", kernels.__all__)


@EVERY
def test_same_bits_twice_and_as_the_reference(name):
    f, inputs = everything()[name]
    out, grads, weights = results(f, inputs, None)
    again, grads_again, _ = results(f, inputs, weights)
    assert all(torch.equal(a, b) for a, b in zip((*out, *grads), (*again, *grads_again), strict=True))
    agree(f, f, inputs)  # in float64, which always goes to the reference: it too is held against the formulas


@EVERY
def test_an_empty_batch_gives_an_empty_batch(name):
    f, inputs = everything()[name]
    whole, out = f(*inputs), f(*(x[:0] if x.ndim > 2 else x for x in inputs))
    pairs = zip(whole, out, strict=True) if isinstance(whole, tuple) else [(whole, out)]
    assert all(o.shape == (0, *w.shape[1:]) for w, o in pairs)


@EVERY
def test_compiles_into_one_graph(name):
    f, inputs = everything()[name]
    seen = []

    def keep(graph, _):
        seen.extend(str(n.target) for n in graph.graph.nodes)
        return make_boxed_func(graph.forward)

    out, grads, weights = results(f, inputs, None)
    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep)  # both passes, through the fake tensors
    out_c, grads_c, _ = results(torch.compile(f, fullgraph=True, backend=backend), inputs, weights)
    assert sum("sdv" in target for target in seen) >= 2
    assert all(rel(a, b) < 1e-6 for a, b in zip((*out, *grads), (*out_c, *grads_c), strict=True))


def test_operators_are_well_formed():
    sdv = torch.ops.sdv
    q, table = heads(1, 2, 20, 32), tables(15, 32)
    (x, y), (gate, scale, shift), (weight, bias), segments = blocks(1, 20, 64, "two")
    head, segments = numbers(32).requires_grad_(), list(segments)
    torch.library.opcheck(sdv.attention.default, (q, q, q, 0.2))
    torch.library.opcheck(sdv.rope.default, (q, None, None, *table, 0.0, "none", 1.0))
    torch.library.opcheck(sdv.rope.default, (q, head, head, *table, 1e-6, "layer", 1.0))
    torch.library.opcheck(sdv.adaln.default, (x, y, gate, scale, shift, weight, bias, 1e-5, segments))
    torch.library.opcheck(sdv.adaln.default, (x, None, None, scale, shift, None, None, 1e-5, segments))
    torch.library.opcheck(sdv.adaln.default, (x, y, gate, None, None, None, None, 0.0, segments))
    x, y, gate, scale, stats = (t.detach() for t in (x, y, gate, scale, numbers(1, 20, 2)))
    for kept, learns in ((None, False), (None, True), (y, False), (y, True)):
        tensors = (x, x, x, kept, gate, scale, None, stats)
        torch.library.opcheck(sdv.adaln_backward.default, (*tensors, segments, learns))


def test_offsets_past_two_to_the_31():
    """Three tokens, or heads, 2^30 numbers apart: the last lies past what 32 bits can count."""
    torch.use_deterministic_algorithms(False)  # or all of it were filled with NaN
    far = torch.empty(2**31 + 4096, dtype=torch.float16, device=DEVICE)  # touched at three places only
    x = far.as_strided((1, 3, 64), (0, 2**30, 1)).copy_(numbers(1, 3, 64))
    near, scale = x.clone(), numbers(1, 1, 64)
    assert torch.equal(kernels.adaln(x, scale, scale), kernels.adaln(near, scale, scale))
    tokens, beside = (t.unflatten(-1, (2, 32)).transpose(1, 2) for t in (x, near))
    across, close = (t.unflatten(-1, (2, 32)) for t in (x, near))  # the same numbers as three heads
    for x, near in ((tokens, beside), (across, close)):
        table = tables(x.shape[2], 32)
        assert torch.equal(kernels.rope(x, *table), kernels.rope(near, *table))
        for arch in ARCHS:
            with dispatch.pretend(arch):
                assert torch.equal(kernels.attention(x, x, x), kernels.attention(near, near, near))


# ---- who runs what ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "number", "hip"), [("Tesla T4", (7, 5), None), ("MI300X", (9, 4), "7.0")])
def test_a_gpu_that_no_tile_fits_is_refused(monkeypatch, name, number, hip):
    chip = SimpleNamespace(name=name, major=number[0], minor=number[1], multi_processor_count=40)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: chip)
    monkeypatch.setattr(torch.version, "hip", hip)
    with pytest.raises(ValueError, match=f"{name}: .*Ampere.*set SDV_KERNELS=reference"):
        dispatch.require_chip(torch.device("cuda:9"))
    monkeypatch.setattr(dispatch, "MODE", "reference")
    dispatch.require_chip(torch.device("cuda:9"))


def test_who_runs_what(monkeypatch):
    q = numbers(1, 1, 4, 16)
    assert dispatch.use_triton(q) and not dispatch.use_triton(q.double())
    with pytest.raises(ValueError, match=r"K in \(16, 32, 64, 128\), not 24"):
        kernels.attention(*[numbers(1, 1, 4, 24)] * 3)
    monkeypatch.setattr(dispatch, "MODE", "reference")
    assert not dispatch.use_triton(q)
    monkeypatch.setattr(dispatch, "MODE", "triton")
    monkeypatch.setattr(dispatch, "INTERPRET", False)
    with pytest.raises(ValueError, match="cos and sin get no gradient"):
        kernels.rope(heads(1, 1, 4, 16), *(table.requires_grad_() for table in tables(4, 16)))
    with pytest.raises(ValueError, match=r"want modulations \(B, S, D\), got \(16,\)"):
        kernels.adaln(torch.ones(1, 4, 16), torch.ones(16), torch.ones(16))
    with pytest.raises(ValueError, match=r"want x \(B, H, L, K\).*got \(16,\)"):
        kernels.rmsnorm_rope(torch.ones(16), torch.ones(16))
    with pytest.raises(ValueError, match="SDV_KERNELS=triton, but Triton cannot run torch.float32 on cpu"):
        kernels.attention(*[q.cpu()] * 3)
    monkeypatch.setattr(dispatch, "MODE", "auto")
    assert not dispatch.use_triton(q.cpu())
