"""How much better a tuned model is than its base at the same number of calls, by a measure that it never saw."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from maskrl_jax.evaluate import bootstrap, curve
from maskrl_jax.evaluate.bootstrap import Interval
from maskrl_jax.evaluate.measure import Point


@dataclasses.dataclass(frozen=True)
class Goal:
    """What a run is to reach, fixed before anything is measured (our choice).

    metric: a measure in [0, 1] whose gap to 1 is to be closed; of a CLIP's score, which has no best value, any gain
      beyond its bounds is asked for.
    closed: share of the gap; closed_low: its lower 95 % bound.
    diversity: smallest within-prompt diversity allowed, over the base's; point value; 0: no condition.
    """

    metric: str = "graded"
    closed: float = 0.40
    closed_low: float = 0.20
    diversity: float = 0.85

    def __post_init__(self):
        if not 0 <= self.closed_low <= self.closed <= 1:
            raise ValueError(f"aim.closed_low {self.closed_low} and closed {self.closed} must rise within [0, 1]")
        if self.diversity < 0:
            raise ValueError(f"aim.diversity {self.diversity} must be at least 0")

    @property
    def unbounded(self) -> bool:
        """Whether the metric has no best value."""
        return self.metric in curve.CLIP


@dataclasses.dataclass(frozen=True)
class Gain:
    """The tuned model at the base's number of calls."""

    goal: Goal
    base: Interval  # the metric
    tuned: Interval
    comparison: curve.Comparison
    closed: Interval | None  # (tuned - base) / (1 - base); None where the base leaves no gap, or none is known
    failed: tuple[str, ...]  # what of the goal was not reached, in words

    def to_json(self) -> dict:
        return dataclasses.asdict(self)


def gain(tuned: Sequence[Point], base: Sequence[Point], goal: Goal) -> Gain:
    """Compare points of one setting, one of each training seed, with the base on the same prompts and keys.

    Bounds are those of the paired bootstrap over prompts and seeds.
    """
    row = curve.compare(tuned, base, curve.Criteria(margins={goal.metric: 0.0}, frechet_ratio=0, diversity_ratio=0))
    closed, failed = None if goal.unbounded else _closed(tuned, base, goal.metric), []
    if goal.unbounded:
        if row.differences[goal.metric].low <= 0:
            failed.append(f"no gain in {goal.metric} beyond its bounds")
    elif closed is None or closed.mean < goal.closed or closed.low < goal.closed_low:
        failed.append(f"less than {goal.closed:.0%} of the gap closed, or its lower bound below {goal.closed_low:.0%}")
    if goal.diversity and (row.diversity_ratio is None or row.diversity_ratio.mean < goal.diversity):
        failed.append(f"diversity below ×{goal.diversity:.2f}")
    return Gain(
        goal=goal,
        base=curve.interval_over_seeds(base, goal.metric),
        tuned=curve.interval_over_seeds(tuned, goal.metric),
        comparison=row,
        closed=closed,
        failed=tuple(failed),
    )


def _closed(tuned: Sequence[Point], base: Sequence[Point], metric: str) -> Interval | None:
    """Share of the base's gap to 1 that is closed."""
    paired = curve.references_of(tuned, base)
    left = [1 - np.stack([p.per_prompt(metric) for p in side]) for side in (tuned, paired)]
    ratio = bootstrap.paired_ratio(*left)
    return None if ratio is None else Interval(1 - ratio.mean, 1 - ratio.high, 1 - ratio.low)


def verdict(found: Gain) -> str:
    """Say what was found, and whether the goal was reached."""
    row, goal = found.comparison, found.goal
    closed, wanted = ": the base leaves no gap to close", f"{goal.closed:.0%} of the base's {goal.metric} gap closed"
    if goal.unbounded:
        closed, wanted = "", f"a gain in {goal.metric}"
    elif found.closed is not None:
        low, mean, high = (f"{100 * x:.0f}" for x in (found.closed.low, found.closed.mean, found.closed.high))
        closed = f": {mean} % [{low}, {high}] of the gap to 1 is closed"
    outcome = "Reached" if not found.failed else "Not reached"
    missed = f" Missed: {'; '.join(found.failed)}." if found.failed else ""
    return (
        f"{outcome}: {wanted} at {row.calls_mean:.0f} calls. "
        f"{row.label} scores {found.tuned} where the base scores {found.base}{closed} "
        f"(differences with 95 % bounds: {curve.evidence(row, {goal.metric: 0.0})}).{missed}"
    )
