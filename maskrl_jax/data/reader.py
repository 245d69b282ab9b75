"""Batches read ahead by worker processes, for sets whose pictures one process cannot decode fast enough."""

import dataclasses
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import grain
import numpy as np
from absl import flags

from maskrl_jax.data.batches import batch_at
from maskrl_jax.data.dataset import Dataset
from maskrl_jax.data.images import StoredColumn
from maskrl_jax.errors import UserError

PART = 32  # samples that a worker reads at a time: a part, not a batch, so that few batches are in memory
AHEAD = 4  # parts that a worker may be ahead
FAR = 2**40  # beyond any step


class InOrder:
    """A pure function of a number, computed ahead by worker processes (grain) for numbers that follow each other.

    A jump, as of a run that resumes, starts the workers anew, so that what is returned depends on the number alone.
    """

    def __init__(self, make: Callable[[int], Any], workers: int, stop: int = FAR):
        self._make, self._workers, self._stop = make, workers, stop
        self._next, self._ahead = -1, None

    def __call__(self, number: int) -> Any:
        """Return make(number)."""
        if number != self._next:
            self.close()
            self._ahead = self._begin(number)
        self._next = number + 1
        return next(self._ahead)

    def _begin(self, number: int) -> Iterator:
        if not flags.FLAGS.is_parsed():  # grain reads its own flags, also where no command has parsed any
            flags.FLAGS.mark_as_parsed()
        numbers = grain.MapDataset.range(number, self._stop).map(self._make)
        one_thread = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
        options = grain.MultiprocessingOptions(num_workers=self._workers, per_worker_buffer_size=AHEAD)
        return iter(numbers.to_iter_dataset(one_thread).mp_prefetch(options, worker_init_fn=_follow_parent))

    def close(self) -> None:
        """End the workers."""
        if self._ahead is not None:
            self._ahead.close()
        self._next, self._ahead = -1, None


def _follow_parent(*_) -> None:
    """Leave signals that reach all processes to the parent, who saves and ends its workers; end when it is killed."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)

    def watch():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@dataclasses.dataclass(frozen=True)
class _Parts:
    """Part `number` of all batches, PART samples each; what a worker gets, so only what it needs."""

    columns: dict
    batch_size: int
    rows: slice
    seed: int

    @property
    def each(self) -> int:
        return -(-(self.rows.stop - self.rows.start) // PART)

    def __call__(self, number: int) -> dict[str, np.ndarray]:
        step, part = divmod(int(number), self.each)
        first = self.rows.start + part * PART
        rows = slice(first, min(first + PART, self.rows.stop))
        return batch_at(Dataset("", self.columns, None, None, None), step, self.batch_size, rows, self.seed)


def is_on_disk(dataset: Dataset) -> bool:
    """Say if a set's pictures are decoded when asked for."""
    return any(isinstance(column, StoredColumn) for column in dataset.columns.values())


def reader(
    dataset: Dataset, batch_size: int, rows: slice, seed: int, workers: int = 0
) -> Callable[[int], dict[str, np.ndarray]]:
    """Return `batch_at` as a function of the step; with workers, processes read ahead where pictures are on disk.

    Without any, and for what is in memory or encoded, the calling process reads by itself (pictures in threads).
    """
    if workers < 0:
        raise UserError(f"data.workers {workers} must be at least 0")
    if not workers or not is_on_disk(dataset):
        return lambda step: batch_at(dataset, step, batch_size, rows, seed)
    parts = _Parts(dataset.columns, batch_size, rows, seed)
    ahead = InOrder(parts, workers)

    def batch(step: int) -> dict[str, np.ndarray]:
        found = [ahead(step * parts.each + i) for i in range(parts.each)]
        return {name: np.concatenate([np.asarray(part[name]) for part in found]) for name in found[0]}

    return batch
