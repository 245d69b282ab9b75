"""Wall-clock time of several sampling loops beside each other."""

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from maskrl_jax.evaluate.timing import Spread

WARM_UP, REPEATS = 3, 20  # specs/shortcut.md section 10


@dataclasses.dataclass(frozen=True)
class Latency:
    """Time of one system's sampling loop at one setting, without decoding; seconds are of one whole batch."""

    system: str
    label: str
    setting: float
    batch_size: int
    seconds: Spread

    @property
    def milliseconds(self) -> Spread:
        """Of one image."""
        return Spread(*(1000 * x / self.batch_size for x in dataclasses.astuple(self.seconds)))

    def to_json(self) -> dict:
        return dataclasses.asdict(self)


def measure(
    runs: Mapping[Any, Callable[[int], Any]], *, warm_up: int = WARM_UP, repeats: int = REPEATS
) -> dict[Any, Spread]:
    """Time closures in turn: name -> seconds of one run, median with quartiles.

    `run(repeat)` returns arrays, which are waited for; the repeat must not change shapes. Each round runs all of them,
    beginning one further, so that all meet the same disturbances of a shared machine.

    Raises:
      ValueError: with fewer than one repeat or warm-up run.
    """
    if repeats < 1 or warm_up < 1:
        raise ValueError("repeats and warm_up must be at least 1")
    names, seconds = list(runs), {name: [] for name in runs}
    for repeat in range(warm_up + repeats):
        turn = repeat % len(names)
        for name in names[turn:] + names[:turn]:
            began = time.perf_counter()
            jax.block_until_ready(runs[name](repeat))
            seconds[name].append(time.perf_counter() - began)
    return {name: Spread.of(np.asarray(values[warm_up:])) for name, values in seconds.items()}
