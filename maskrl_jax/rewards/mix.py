"""Several named rewards as one: a weighted sum."""

from collections.abc import Mapping, Sequence

import jax
import numpy as np

from maskrl_jax.errors import UserError

Array = jax.Array | np.ndarray
EPS = 1e-4  # added to a spread, as in advantages


def weighted_sum(scores: Mapping[str, Array], weights: Mapping[str, float]) -> Array:
    """Sum of weight * score over the named rewards, float32 [B]."""
    return sum(weight * scores[name] for name, weight in weights.items())


def standardised(scores: Mapping[str, np.ndarray], group: int) -> dict[str, np.ndarray]:
    """Each reward standardised within groups of G neighbours (ddof 1), so that none outweighs another by its spread."""

    def of(score):
        rows = score.reshape(-1, group)
        return ((rows - rows.mean(1, keepdims=True)) / (rows.std(1, ddof=1, keepdims=True) + EPS)).reshape(-1)

    return {name: of(score) for name, score in scores.items()}


def check(weights: Mapping[str, float], available: Sequence[str]) -> None:
    """Raise UserError for an empty mix, or a reward that the judge does not give."""
    if not weights:
        raise UserError(
            f"rewards is empty; name at least one with its weight; this judge gives: {', '.join(available)}"
        )
    unknown = sorted(set(weights) - set(available))
    if unknown:
        raise UserError(f"unknown reward {unknown[0]!r}; this judge gives: {', '.join(available)}; change rewards")


def check_held_out(held_out: Sequence[str], trained: Mapping[str, float], available: Sequence[str]) -> None:
    """Raise UserError for a held-out reward that there is not, or that is trained on."""
    for name in held_out:
        if name not in available:
            raise UserError(
                f"unknown held-out reward {name!r}; there are: {', '.join(available)}; change rewards_heldout"
            )
        if trained.get(name):
            raise UserError(f"reward {name!r} is trained on and held out; take it from rewards or rewards_heldout")
