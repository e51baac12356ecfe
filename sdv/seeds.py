"""Randomness without state: every draw comes from a generator made of the numbers that name it."""

import numpy as np
import torch


def generator(*key: int) -> torch.Generator:
    """A CPU generator that depends on the key alone, e.g. (seed, step, micro-batch); keys do not overlap."""
    seed = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(seed))
