"""Bootstrap bounds over prompts, and over training seeds where there are several.

The prompt is the unit of resampling, not the sample: samples of one prompt are correlated, and bounds that
treat them as independent are too narrow. With S seeds, arrays are [S, P]: every replicate draws P prompts
with replacement, the same ones for every seed (all seeds are judged on the same prompts), and S seeds with
replacement. With three seeds the part of the width that comes from seeds is itself only roughly known, so
reports print the value of each seed beside the bounds.
"""

import dataclasses
import functools

import numpy as np

RESAMPLES = 2000
LEVEL = 0.95


@dataclasses.dataclass(frozen=True)
class Interval:
    """A mean with percentile bounds at `LEVEL`."""

    mean: float
    low: float
    high: float

    def __format__(self, sign: str) -> str:
        """Return "mean [low, high]"; the format "+" writes signs, as for differences."""
        return f"{self.mean:{sign}.3f} [{self.low:{sign}.3f}, {self.high:{sign}.3f}]"


def _as_seeds_by_prompts(values: np.ndarray) -> np.ndarray:
    values = np.asarray(values, np.float64)
    values = values[None] if values.ndim == 1 else values
    if values.ndim != 2 or values.size == 0:
        raise ValueError(f"expected values [P] or [S, P], got shape {values.shape}")
    if not np.isfinite(values).all():
        raise ValueError("values hold entries that are not finite")
    return values


@functools.lru_cache(maxsize=8)  # a report asks for hundreds of intervals with the same draws
def _draws(seed: int, counts: tuple[int, ...], resamples: int) -> tuple[np.ndarray, ...]:
    """Return for each count [resamples, count] rows of how often each item is drawn, divided by count."""
    generator = np.random.default_rng(seed)
    return tuple(generator.multinomial(n, np.full(n, 1.0 / n), size=resamples) / n for n in counts)


def replicate_means(values: np.ndarray, *, seed: int = 0, resamples: int = RESAMPLES) -> np.ndarray:
    """Return the mean of each bootstrap replicate, float64 [resamples].

    Args:
      values: [P] one number per prompt, or [S, P] for S training seeds.
      seed: of the numpy generator; the same seed and P give the same draws, so replicates of two arrays pair.
    """
    values_SP = _as_seeds_by_prompts(values)
    prompts_RP, seeds_RS = _draws(seed, values_SP.shape[::-1], resamples)
    return ((prompts_RP @ values_SP.T) * seeds_RS).sum(axis=1)


def _bounds(replicates: np.ndarray) -> tuple[float, float]:
    tail = (1.0 - LEVEL) / 2.0
    low, high = np.quantile(replicates, [tail, 1.0 - tail])
    return float(low), float(high)


def mean_interval(values: np.ndarray, *, seed: int = 0, resamples: int = RESAMPLES) -> Interval:
    """Return the mean of [P] or [S, P] values with percentile bounds."""
    values_SP = _as_seeds_by_prompts(values)
    return Interval(float(values_SP.mean()), *_bounds(replicate_means(values_SP, seed=seed, resamples=resamples)))


def paired_difference(tuned: np.ndarray, reference: np.ndarray, *, seed: int = 0) -> Interval:
    """Return mean(tuned - reference) with bounds; prompts (and seeds) are resampled in pairs.

    Raises:
      ValueError: if the two differ in shape: an unpaired comparison would need another test.
    """
    tuned_SP, reference_SP = _as_seeds_by_prompts(tuned), _as_seeds_by_prompts(reference)
    if tuned_SP.shape != reference_SP.shape:
        raise ValueError(f"paired arrays differ in shape: {tuned_SP.shape} and {reference_SP.shape}")
    return mean_interval(tuned_SP - reference_SP, seed=seed)


def paired_ratio(tuned: np.ndarray, reference: np.ndarray, *, seed: int = 0) -> Interval | None:
    """Return mean(tuned) / mean(reference) with bounds, both means over the same draws.

    None where the reference's mean, or that of a replicate, is not positive: then there is no ratio.
    """
    tuned_SP, reference_SP = _as_seeds_by_prompts(tuned), _as_seeds_by_prompts(reference)
    if tuned_SP.shape != reference_SP.shape:
        raise ValueError(f"paired arrays differ in shape: {tuned_SP.shape} and {reference_SP.shape}")
    below = replicate_means(reference_SP, seed=seed)
    if reference_SP.mean() <= 0 or below.min() <= 0:
        return None
    ratios = replicate_means(tuned_SP, seed=seed) / below
    return Interval(float(tuned_SP.mean() / reference_SP.mean()), *_bounds(ratios))
