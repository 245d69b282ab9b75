"""Batches as a pure function of the step, so that the place in the data is the step and nothing else."""

import functools

import grain
import numpy as np

from maskrl_jax.data.dataset import Dataset


def batch_at(dataset: Dataset, step: int, batch_size: int, rows: slice, seed: int) -> dict[str, np.ndarray]:
    """Return rows of the batch of a step: each column of the set stacked to [b, ...], and `index` int32 [b].

    Args:
      dataset: the set to draw from, shuffled anew in every epoch.
      step: number of the batch, from 0.
      batch_size: size of the global batch.
      rows: the part of the global batch to return (one process' share); any split gives the same samples.
      seed: seed of the order.

    `index` is the global sample number, step * batch_size + row, modulo 2^31: what random keys are folded
    with.
    """
    positions, samples = positions_at(len(dataset), step, batch_size, rows, seed)
    return dataset.take(positions) | {"index": (samples % 2**31).astype(np.int32)}


def positions_at(length: int, step: int, batch_size: int, rows: slice, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return where the batch of a step lies in a set of `length` samples, and its global sample numbers; int64 [b]."""
    samples = step * batch_size + np.arange(batch_size, dtype=np.int64)[rows]
    order = _order(length, seed)
    return np.array([order[int(sample)] for sample in samples], np.int64), samples


@functools.lru_cache(maxsize=16)
def _order(length: int, seed: int) -> grain.MapDataset:
    """Return the endless shuffled order of `length` positions, with random access."""
    return grain.MapDataset.source(range(length)).seed(seed).shuffle().repeat()
