"""Inception Score: how sure the classifier is of each image, and how different its answers are over all."""

from collections.abc import Sequence

import numpy as np
from scipy.special import log_softmax


def even_splits(count: int, splits: int, seed: int | None = None) -> list[np.ndarray]:
    """Return row numbers in `splits` parts as even as can be, shuffled by a seed first (torch-fidelity's order)."""
    if not 1 <= splits <= count:
        raise ValueError(f"{count} samples cannot be split into {splits} parts")
    rows = np.arange(count) if seed is None else np.random.RandomState(seed).permutation(count)
    return [rows[i * count // splits : (i + 1) * count // splits] for i in range(splits)]


def sized_splits(count: int, size: int) -> list[np.ndarray]:
    """Return row numbers in parts of `size` in order, the last one as it comes (the evaluator of ADM)."""
    return [np.arange(start, min(start + size, count)) for start in range(0, count, size)]


def inception_score(logits_MK: np.ndarray, splits: Sequence[np.ndarray]) -> tuple[float, float]:
    """Return mean and population standard deviation over the splits of exp(E KL(p(y|x) || p(y))), in float64.

    Salimans et al. 2016; logits [M, K] come without their bias, as in the original code.
    """
    scores = []
    for rows in splits:
        log_p = log_softmax(np.asarray(logits_MK[rows], np.float64), axis=1)
        marginal = np.exp(log_p).mean(axis=0)
        # A class whose probability underflows everywhere adds nothing.
        log_marginal = np.log(marginal, out=np.zeros_like(marginal), where=marginal > 0)
        scores.append(np.exp((np.exp(log_p) * (log_p - log_marginal)).sum(axis=1).mean()))
    return float(np.mean(scores)), float(np.std(scores))
