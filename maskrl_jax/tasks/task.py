"""The contract between a stage and the loop that trains it."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from maskrl_jax.parallel import Parallel
from maskrl_jax.state import TrainState


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
    data_dir: str
    workdir: str


@dataclasses.dataclass(frozen=True)
class Task:
    """One trainable stage as plain functions; `step` calls compiled phases, `batch` is pure in the step."""

    init: Callable[[Any], TrainState]
    batch: Callable[[int], Any]
    step: Callable[[TrainState, Any], tuple[TrainState, dict]]
    evaluate: Callable[[TrainState, int], tuple[dict[str, float], dict[str, np.ndarray]]]
    report: Callable[[Any], None] | None = None  # from the moving average of the parameters
    peak_seconds: float | None = None  # a step at the devices' published peak rate; set by the runner
