"""Quality against network calls: paired comparisons with a reference, and the fewest calls at equal quality.

A curve is a flat sequence of points of one system; several points with the same setting are seeds of it. A
point is compared with the reference point of its own seed, or with the only one there is.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from maskrl_jax.evaluate import bootstrap
from maskrl_jax.evaluate.bootstrap import Interval
from maskrl_jax.evaluate.measure import Point

CLIP = ("clip_score", "pick_score", "hps", "aesthetic")  # of a judge that is a CLIP, each in units of its own
HEADLINE = ("graded", "strict", "judge", *CLIP)  # always stated together, whichever of them decide


@dataclasses.dataclass(frozen=True)
class Criteria:
    """What counts as equal quality, fixed before anything is measured (spec speed_rl.md, section 7.3).

    margins: metric -> delta; the lower 95 % bound of (tuned - reference) must be at least -delta for each.
    frechet_ratio: largest Frechet distance allowed, over the reference's; point value; 0: no condition.
    diversity_ratio: smallest within-prompt diversity allowed, in the same way.
    """

    margins: Mapping[str, float]
    frechet_ratio: float = 1.10
    diversity_ratio: float = 0.90


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One setting of a system, over its seeds, beside the reference."""

    system: str
    label: str
    setting: float
    seeds: tuple[int, ...]
    calls_mean: float
    differences: dict[str, Interval]  # metric -> tuned - reference
    seed_differences: dict[str, tuple[float, ...]]  # the same, of each seed alone
    frechet_ratio: float | None
    diversity_ratio: Interval | None
    failed: tuple[str, ...]  # conditions not met, in words; empty: equal quality

    @property
    def equal(self) -> bool:
        return not self.failed


@dataclasses.dataclass(frozen=True)
class Equality:
    """The whole table of a curve against its reference, and the point T* (None if no point qualifies)."""

    reference_system: str
    reference_label: str
    reference_calls: float
    criteria: Criteria
    table: tuple[Comparison, ...]  # by rising mean calls
    best: Comparison | None
    bounds: tuple[float, float]  # range of T* over draws; infinite where no measured setting qualifies

    @property
    def speedup(self) -> float | None:
        """Reference calls / T*, or None."""
        return None if self.best is None else self.reference_calls / self.best.calls_mean

    def to_json(self) -> dict:
        return {**dataclasses.asdict(self), "speedup": self.speedup}


def by_setting(points: Sequence[Point]) -> dict[float, list[Point]]:
    """Group a curve's points by setting; each list holds the seeds of that setting."""
    groups: dict[float, list[Point]] = {}
    for point in points:
        groups.setdefault(point.setting, []).append(point)
    return groups


def mean_calls(points: Sequence[Point]) -> float:
    """Return the mean network calls over the seeds of one setting."""
    return float(np.mean([point.calls_mean for point in points]))


def interval_over_seeds(points: Sequence[Point], metric: str) -> Interval | None:
    """Return the mean of a metric over the seeds of one setting, with bounds over prompts and seeds.

    Distances ("frechet", "precision", "recall") are numbers of a whole set: their bounds are the range over
    seeds. None where the points do not have the metric.
    """
    if metric in ("frechet", "precision", "recall"):
        values = [getattr(point, metric) for point in points]
        if None in values:
            return None
        return Interval(float(np.mean(values)), min(values), max(values))
    if any(point.diversity is None if metric == "diversity" else metric not in point.metrics for point in points):
        return None
    return bootstrap.mean_interval(np.stack([point.per_prompt(metric) for point in points]))


def references_of(points: Sequence[Point], references: Sequence[Point]) -> list[Point]:
    """Return the reference of each point: that of the same seed, else the only one.

    Raises:
      ValueError: if there are several references and none of the point's seed, or two of one seed.
    """
    by_seed = {reference.seed: reference for reference in references}
    if len(by_seed) != len(references) or not references:
        raise ValueError("there must be one reference point, or one for each seed")
    if len(references) == 1:
        return [references[0]] * len(points)
    missing = sorted({point.seed for point in points} - set(by_seed))
    if missing:
        raise ValueError(f"no reference point of seed {missing}")
    return [by_seed[point.seed] for point in points]


def _unmet(criteria, differences, frechet_ratio, diversity_ratio) -> tuple[str, ...]:
    failed = [
        f"{metric} bound {differences[metric].low:+.3f} < {-margin:+.3f}"
        for metric, margin in criteria.margins.items()
        if differences[metric].low < -margin
    ]
    if not _frechet_holds(criteria, frechet_ratio):
        found = "unknown" if frechet_ratio is None else f"×{frechet_ratio:.2f}"
        failed.append(f"Fréchet distance {found} > ×{criteria.frechet_ratio:.2f}")
    if criteria.diversity_ratio and (diversity_ratio is None or diversity_ratio.mean < criteria.diversity_ratio):
        found = "unknown" if diversity_ratio is None else f"×{diversity_ratio.mean:.2f}"
        failed.append(f"diversity {found} < ×{criteria.diversity_ratio:.2f}")
    return tuple(failed)


def _frechet_holds(criteria: Criteria, ratio: float | None) -> bool:
    return not criteria.frechet_ratio or (ratio is not None and ratio <= criteria.frechet_ratio)


def compare(points: Sequence[Point], references: Sequence[Point], criteria: Criteria) -> Comparison:
    """Compare the seeds of one setting with the reference on the same prompts.

    All metrics that both have are compared; only those in `criteria.margins` decide.

    Raises:
      ValueError: if a metric with a margin is missing, or prompts differ in number.
    """
    paired = references_of(points, references)
    shared = [name for name in points[0].metrics if all(name in other.metrics for other in (*points, *paired))]
    absent = sorted(set(criteria.margins) - set(shared))
    if absent:
        raise ValueError(f"metrics {absent} have a margin but were not measured; measured: {sorted(shared)}")
    tuned = {name: np.stack([point.per_prompt(name) for point in points]) for name in shared}
    base = {name: np.stack([point.per_prompt(name) for point in paired]) for name in shared}
    differences = {name: bootstrap.paired_difference(tuned[name], base[name]) for name in shared}
    own, base_own = (interval_over_seeds(side, "frechet") for side in (points, paired))
    frechet_ratio = own.mean / base_own.mean if own and base_own and base_own.mean > 0 else None
    diversity_ratio = None
    if all(point.diversity is not None for point in (*points, *paired)):
        spread = [np.stack([point.per_prompt("diversity") for point in side]) for side in (points, paired)]
        diversity_ratio = bootstrap.paired_ratio(*spread)
    return Comparison(
        system=points[0].system,
        label=points[0].label,
        setting=points[0].setting,
        seeds=tuple(point.seed for point in points),
        calls_mean=mean_calls(points),
        differences=differences,
        seed_differences={n: tuple(float(d) for d in (tuned[n] - base[n]).mean(axis=1)) for n in shared},
        frechet_ratio=frechet_ratio,
        diversity_ratio=diversity_ratio,
        failed=_unmet(criteria, differences, frechet_ratio, diversity_ratio),
    )


def first_equal(points: Sequence[Point], references: Sequence[Point], criteria: Criteria) -> Equality:
    """Compare every setting of one curve with the reference and pick T* (spec speed_rl.md, section 7.3).

    T* is the smallest mean number of calls at which every condition holds. It is picked among the measured
    settings on the same prompts that judge it, so with many settings it is a little optimistic.
    """
    groups = sorted(by_setting(points).values(), key=mean_calls)
    table = [compare(group, references, criteria) for group in groups]
    return Equality(
        reference_system=references[0].system,
        reference_label=references[0].label,
        reference_calls=mean_calls(references),
        criteria=criteria,
        table=tuple(table),
        best=next((row for row in table if row.equal), None),
        bounds=_fewest_calls_bounds(groups, references, table, criteria),
    )


def _fewest_calls_bounds(groups, references, table, criteria) -> tuple[float, float]:
    """Return the range of T* over 95 % of the draws of prompts (and seeds), each taking the same test on all settings.

    A draw has no bootstrap bounds of its own, so each keeps the distance between mean and lower bound of the whole
    sample. The Frechet distance is a number of the whole set and enters as measured. How stable T* is rather than a
    confidence interval: a draw picks the luckiest of settings near the margin, as T* itself does, so the range is
    widened to hold T*. Our choice.
    """
    fewest_R = np.full(bootstrap.RESAMPLES, np.inf)
    for points, row in zip(groups, table, strict=True):
        paired = references_of(points, references)
        passed_R = np.full(bootstrap.RESAMPLES, _frechet_holds(criteria, row.frechet_ratio))
        for metric, margin in criteria.margins.items():
            found = row.differences[metric]
            passed_R &= _drawn(points, metric) - _drawn(paired, metric) - (found.mean - found.low) >= -margin
        if criteria.diversity_ratio and row.diversity_ratio is not None:
            passed_R &= _drawn(points, "diversity") >= criteria.diversity_ratio * _drawn(paired, "diversity")
        elif criteria.diversity_ratio:
            passed_R[:] = False
        fewest_R = np.where(passed_R, np.minimum(fewest_R, _drawn(points, "calls")), fewest_R)
    tail = (1 - bootstrap.LEVEL) / 2
    # Of measured values, since there is none between a setting that qualifies and infinity.
    low, high = np.quantile(fewest_R, [tail, 1 - tail], method="inverted_cdf")
    found = next((row.calls_mean for row in table if row.equal), np.inf)
    return min(float(low), found), max(float(high), found)


def _drawn(points: Sequence[Point], metric: str) -> np.ndarray:
    """Return the mean of a metric in every bootstrap draw, [R]."""
    return bootstrap.replicate_means(np.stack([point.per_prompt(metric) for point in points]))


def of_the_verdict(equality: Equality) -> Comparison:
    """Return T*'s setting; where there is none, the one whose worst excess over its margins is smallest."""
    if equality.best is not None:
        return equality.best
    margins = equality.criteria.margins
    return max(
        equality.table,
        key=lambda row: min((row.differences[m].low + d for m, d in margins.items()), default=0),
    )


def fewest_calls(equality: Equality) -> str:
    """Write T* with its range; "none": a draw in which no measured setting passes. Not for a curve without T*."""
    low, high = (f"{bound:.1f}" if np.isfinite(bound) else "none" for bound in equality.bounds)
    return f"{equality.best.calls_mean:.1f} mean calls [{low}, {high}]"


def evidence(row: Comparison, deciding: Mapping[str, float]) -> str:
    """List the differences that decided, then the other headline scores, then the ratios of the set."""
    names = [*deciding, *(name for name in HEADLINE if name in row.differences and name not in deciding)]
    shown = [f"{name} {row.differences[name]:+}" for name in names]
    if row.frechet_ratio is not None:
        shown.append(f"Fréchet distance ×{row.frechet_ratio:.2f}")
    if row.diversity_ratio is not None:
        shown.append(f"diversity ×{row.diversity_ratio.mean:.2f}")
    return ", ".join(shown)


def verdict(equality: Equality, goal: float) -> str:
    """Say what was found: T*, the evidence, and whether `goal` times fewer calls was reached."""
    reference = f"{equality.reference_label} at {equality.reference_calls:.1f} calls"
    target = f"equal quality in {goal:g}× fewer calls"
    if equality.best is None:
        near = of_the_verdict(equality)
        margins = equality.criteria.margins
        # The mean is within the margin and the bound is not: worse has not been shown.
        unsure = [m for m, d in margins.items() if near.differences[m].low < -d <= near.differences[m].mean]
        undecided = f" Too few samples to tell: the mean of {', '.join(unsure)} is within the margin." * bool(unsure)
        return (
            f"Not reached: {target}. No measured setting of {near.label} equals {reference}; the nearest, at "
            f"{near.calls_mean:.1f} mean calls, fails by: {'; '.join(near.failed)} "
            f"(differences with 95 % bounds: {evidence(near, equality.criteria.margins)}).{undecided}"
        )
    best, speedup = equality.best, equality.speedup
    lower = [name for name in HEADLINE if name in best.differences and best.differences[name].high < 0]
    return (
        f"{'Reached' if speedup >= goal else 'Not reached'}: {target}, the goal. With {fewest_calls(equality)} "
        f"{best.label} equals {reference} within the margins, a factor of {speedup:.2f} "
        f"(differences with 95 % bounds: {evidence(best, equality.criteria.margins)})."
        + (f" Measurably lower nevertheless: {', '.join(lower)}." if lower else "")
    )
