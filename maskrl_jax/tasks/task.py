"""The contract between a stage and the loop that trains it."""

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from maskrl_jax import paths
from maskrl_jax.parallel import Parallel
from maskrl_jax.state import TrainState

CACHE = "~/.cache/maskrl_jax"


@dataclasses.dataclass(frozen=True)
class Parent:
    """A trained stage that another stage builds on: its config and the EMA of its parameters."""

    config: ConfigDict
    params: Any
    extra: Any
    workdir: str


@dataclasses.dataclass(frozen=True)
class Context:
    """Everything a stage is built from."""

    config: ConfigDict
    parents: dict[str, Parent]
    parallel: Parallel
    store: str  # trained parents, data sets, and what was measured of them
    workdir: str
    out: str = ""  # where a report goes, if not into workdir

    @property
    def data_dir(self) -> str:
        """Where data sets are prepared: on this machine, since they are read at random."""
        return os.path.join(os.path.expanduser(CACHE) if paths.is_remote(self.store) else self.store, "data")

    @property
    def measured_dir(self) -> str:
        """Where measurements of parents are kept (evaluate/measured.py)."""
        return os.path.join(self.store, "measured")


@dataclasses.dataclass(frozen=True)
class Task:
    """One trainable stage as plain functions; `step` calls compiled phases, `batch` is pure in the step."""

    init: Callable[[Any], TrainState]
    batch: Callable[[int], Any]
    step: Callable[[TrainState, Any], tuple[TrainState, dict]]
    evaluate: Callable[[TrainState, int], tuple[dict[str, float], dict[str, np.ndarray]]]
    report: Callable[[Any], None] | None = None  # from the moving average of the parameters
    peak_seconds: float | None = None  # a step at the devices' published peak rate; set by the runner
