"""Randomness without state: every draw comes from a generator made of the numbers that name it."""

from collections.abc import Sequence

import numpy as np
import torch


def generator(*key: int) -> torch.Generator:
    """A CPU generator that depends on the key alone, e.g. (seed, step, micro-batch)."""
    # numpy pads a key with zeros; with its length in front, (1, 2) and (1, 2, 0) are different streams.
    seed = np.random.SeedSequence((len(key), *key)).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(seed))


def normal(shape: Sequence[int], rngs: Sequence[torch.Generator]) -> torch.Tensor:
    """Gaussian noise (B, ...) on the CPU: each of B draws from its own generator, whatever batch it is in."""
    noise = [torch.randn(shape[1:], generator=rng) for rng in rngs]
    if len(noise) != shape[0]:
        raise ValueError(f"{len(noise)} generators for noise of shape {tuple(shape)}: give one a sample")
    return torch.stack(noise)
