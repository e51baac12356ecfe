"""The mean of several LoRAs of one backbone, as one LoRA: a model soup (arXiv 2203.05482).

Runs that begin at the same base but see other data, or learn in another way, err in other ways; what they
agree on is what they were to learn. The mean costs no training, and is sampled like any other adapter.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from weights.formats import PLACE_NOTE, TOKENS_NOTE, Adapter, Update


def mean_adapter(
    adapters: Sequence[Adapter], rank: int | None = None, dtype: torch.dtype = torch.float32
) -> Adapter:
    """Its ranks are the sum of theirs; `rank` keeps only so many directions of an update, the strongest.

    A layer that one of them lacks counts as zero there. ValueError, with the file, for adapters that are not
    of one backbone, or do not agree on what the LoRA acts on and where the reference sits.
    """
    first, notes, updates = adapters[0].known, {}, {}
    for adapter in adapters:
        if adapter.known.family != first.family:
            raise ValueError(f"{adapter.path}: is of another backbone than {first.path}")
        unsaid = {TOKENS_NOTE: "all", PLACE_NOTE: first.family.ref_position}
        for name, note in (unsaid | adapter.notes).items():
            if notes.setdefault(name, note) != note:
                raise ValueError(f"{adapter.path}: has {name} {note}, others {notes[name]}: no mean of these")
    for layer in dict.fromkeys(layer for adapter in adapters for layer in adapter.updates):
        parts = [(adapter, adapter.updates[layer]) for adapter in adapters if layer in adapter.updates]
        (_, like), *_ = parts
        for adapter, part in parts:
            if part.A.shape[1:] != like.A.shape[1:] or len(part.B) != len(like.B):
                raise ValueError(f"{adapter.path}: {layer} is of another size than in {first.path}")
        A = torch.cat([part.A.float() for _, part in parts])
        B = torch.cat([part.scale / len(adapters) * part.B.float() for _, part in parts], 1)
        A, B = (A, B) if rank is None or rank >= len(A) else strongest(A, B, rank)
        updates[layer] = Update(A.to(dtype), B.to(dtype), float(len(A)))
    return replace(first, updates=updates, notes=notes)


def strongest(A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Of A (R, in, ..) and B (out, R, ..) the nearest with a smaller rank: (rank, in, ..), (out, rank, ..).

    By the singular values of B A, found without making it: (out, R) and (R, in) are thin.
    """
    q_in, r_in = torch.linalg.qr(A.double().flatten(1).T)
    q_out, r_out = torch.linalg.qr(B.double().flatten(1))
    U, S, V = torch.linalg.svd(r_out @ r_in.T)
    rank = min(rank, len(S))  # a narrow layer has no more directions
    root = S[:rank].sqrt()
    reads = root[:, None] * (V[:rank] @ q_in.T)
    writes = q_out @ U[:, :rank] * root
    return reads.float().view(rank, *A.shape[1:]), writes.float().view(len(B), rank, *B.shape[2:])
