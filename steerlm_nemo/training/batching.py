"""Batches of conversations of similar length: less padding, every conversation still once per epoch.

The order is a function of lengths, batch size, seed and epoch alone, so a resumed run finds its place by the number of
samples consumed, and the number of data-parallel ranks does not matter.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

# Sorted within such pools only: sorting a whole epoch would put the same neighbours together every time.
BATCHES_PER_POOL = 50
FEWEST_POOLS = 4


def grouped_by_length(lengths: Sequence[int], global_batch_size: int, seed: int) -> list[list[int]]:
    """The global batches of one epoch, each of similar lengths, in random order; a rest smaller than a batch is left
    out, another one for every seed.

    A batch is in order of length, so that taking every n-th gives n ranks the same work.
    """
    generator = torch.Generator().manual_seed(seed)
    num_batches = len(lengths) // global_batch_size
    order = torch.randperm(len(lengths), generator=generator).tolist()[: num_batches * global_batch_size]
    pool = global_batch_size * max(1, min(BATCHES_PER_POOL, num_batches // FEWEST_POOLS))
    batches: list[list[int]] = []
    for start in range(0, len(order), pool):
        indices = sorted(order[start : start + pool], key=lengths.__getitem__)
        batches += (indices[i : i + global_batch_size] for i in range(0, len(indices), global_batch_size))
    return [batches[i] for i in torch.randperm(num_batches, generator=generator).tolist()]


def padding_share(batches: Sequence[Sequence[int]], lengths: Sequence[int], pad_to_multiple: int) -> float:
    """Share of the positions of all batches that hold padding; a batch is padded to its longest, rounded up."""
    used = sum(lengths[index] for batch in batches for index in batch)
    longest = (max(lengths[index] for index in batch) for batch in batches)
    held = sum(
        -(-length // pad_to_multiple) * pad_to_multiple * len(batch)
        for length, batch in zip(longest, batches, strict=True)
    )
    return 1 - used / held if held else 0.0
