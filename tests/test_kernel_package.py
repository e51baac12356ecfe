"""The kernels as a package: what is refused, their machine code, and what is left without Triton."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kernels

ROOT = Path(__file__).parent.parent


def python(*command: str) -> None:
    """Another Python, in which Triton compiles instead of interpreting; it has to succeed."""
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


def test_mistakes_are_named():
    q, x, m = torch.randn(1, 2, 8, 32), torch.randn(1, 8, 64), torch.randn(1, 2, 64)
    cos, sin = torch.randn(2, 9, 16)
    for message, call in {
        "k and v differ": lambda: kernels.attention(q, q, q[:, :, :4]),
        "dtypes differ": lambda: kernels.attention(q, q.half(), q.half()),
        "want the same B, H, K": lambda: kernels.attention(q, q[:, :1], q[:, :1]),
        "not positive: negate q": lambda: kernels.attention(q, q, q, -1.0),
        "turn more tokens": lambda: kernels.rope(q, cos, sin),
        r"weight \(64,\): want \(32,\)": lambda: kernels.layernorm_rope(q, x[0, 0], x[0, 0], cos, sin),
        "both cos and sin": lambda: kernels.rmsnorm_rope(q, x[0, 0], cos[:8]),
        "2 modulations for 8 tokens": lambda: kernels.adaln(x, m, m),
        "do not sum to the 8": lambda: kernels.adaln(x, m, m, segments=(3, 4)),
        r"scale \(1, 2, 64\): want": lambda: kernels.adaln(x, m, m, segments=(3, 3, 2)),
        "and y .* differ": lambda: kernels.gated_residual(x, x.half(), m, segments=(4, 4)),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()


def test_machine_code():
    """A sample of the lint: bf16, all kernels for sm_90, attention for the other chips. Needs no GPU."""
    python("-m", "kernels.bench", "--lint", "--sample")


def test_without_triton():
    python(
        "-c",
        """import sys; sys.modules["triton"] = None
import kernels, torch
q = torch.randn(1, 1, 4, 16); assert kernels.attention(q, q, q).shape == q.shape""",
    )
