"""Wall-clock comparison of two generators, and the speed-up in network calls."""

import dataclasses
import time
from collections.abc import Callable

import jax
import numpy as np


@dataclasses.dataclass(frozen=True)
class Spread:
    """Median with quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values) -> "Spread":
        low, median, high = np.quantile(np.asarray(values, np.float64), [0.25, 0.5, 0.75])
        return cls(float(median), float(low), float(high))


@dataclasses.dataclass(frozen=True)
class Timing:
    """Base beside tuned at one batch size; seconds are of one whole batch."""

    batch_size: int
    repeats: int
    base_seconds: Spread
    tuned_seconds: Spread
    speedup: Spread  # of the ratios base / tuned within each repeat
    base_calls: float  # network calls that the batch costs: the most of its samples, mean over repeats
    tuned_calls: float

    @property
    def call_speedup(self) -> float:
        return self.base_calls / self.tuned_calls

    def to_json(self) -> dict:
        return {**dataclasses.asdict(self), "call_speedup": self.call_speedup}


def _timed(run: Callable[[int], object], repeat: int) -> tuple[float, float]:
    """Return (seconds until all outputs are ready, calls that the batch cost)."""
    start = time.perf_counter()
    _, calls = jax.block_until_ready(run(repeat))
    seconds = time.perf_counter() - start
    return seconds, float(np.max(np.asarray(calls)))


def compare(
    base: Callable[[int], tuple],
    tuned: Callable[[int], tuple],
    *,
    batch_size: int,
    repeats: int,
    warm_up: int = 2,
) -> Timing:
    """Time two closures in turn and compare them repeat by repeat.

    `run(repeat)` makes one batch with the keys and prompts of that repeat, decoding included, and returns
    (images, calls [B]); outputs are waited for. The repeat number must not change shapes. Interleaving, with
    the order swapped every other repeat, exposes both to the same disturbances of a shared machine; `warm_up`
    untimed runs of each keep compilation out.

    Raises:
      ValueError: with fewer than one repeat or warm-up run.
    """
    if repeats < 1 or warm_up < 1:
        raise ValueError("repeats and warm_up must be at least 1")
    for repeat in range(warm_up):
        _timed(base, repeat)
        _timed(tuned, repeat)
    rows = {"base": [], "tuned": []}
    for repeat in range(warm_up, warm_up + repeats):
        turn = [("base", base), ("tuned", tuned)]
        for name, run in turn if repeat % 2 else turn[::-1]:
            rows[name].append(_timed(run, repeat))
    base_rows, tuned_rows = np.asarray(rows["base"]), np.asarray(rows["tuned"])
    return Timing(
        batch_size=batch_size,
        repeats=repeats,
        base_seconds=Spread.of(base_rows[:, 0]),
        tuned_seconds=Spread.of(tuned_rows[:, 0]),
        speedup=Spread.of(base_rows[:, 0] / tuned_rows[:, 0]),
        base_calls=float(base_rows[:, 1].mean()),
        tuned_calls=float(tuned_rows[:, 1].mean()),
    )
