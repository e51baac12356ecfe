"""Randomness without state: every draw comes from a generator seeded with the numbers that name it.

The second number of a training run's key is its stream, which says what is drawn:

    (seed, COIN, step [, micro])          which task: one coin a step, or one a micro-batch
    (seed, DROPOUT, step, task)           which tokens of the reference stay visible in this step
    (seed, SAMPLE, task, k)               frame, shift, caption dropout, time, noise of a task's k-th sample
    (seed, LORA, step, micro, rank)       dropout of the LoRA's input
    (seed, ORDER, epoch)                  the order of the rows
    (seed, VIEW, k)                       crop or window of the k-th sample
    (0, PROBE, task, micro [, sample])    the same draws for held-out data, whatever the run's seed
    (0, PROBE_PAIR, task, micro [, sample])    of the frame that a held-out micro-batch looks at
    (seed, SUBSET)                        which candidates an import keeps

Only LORA and a coin a micro-batch depend on how a step is cut into micro-batches and processes.
Keys of one number are the noise of a film (its seed) and the view of a single row (its index).
"""

from collections.abc import Sequence

import numpy as np
import torch

COIN, SAMPLE, ORDER, VIEW, PROBE, DROPOUT, SUBSET, LORA, PROBE_PAIR = range(9)


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
