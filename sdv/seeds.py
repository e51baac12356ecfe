"""Randomness without state: every draw comes from a generator made of the numbers that name it."""

import numpy as np
import torch


def generator(*key: int) -> torch.Generator:
    """A CPU generator that depends on the key alone, e.g. (seed, step, micro-batch)."""
    # numpy pads a key with zeros; with its length in front, (1, 2) and (1, 2, 0) are different streams.
    seed = np.random.SeedSequence((len(key), *key)).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(seed))
