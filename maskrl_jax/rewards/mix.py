"""Several named rewards as one: a weighted sum."""

from collections.abc import Mapping

import jax

from maskrl_jax.errors import UserError

Array = jax.Array


def weighted_sum(scores: Mapping[str, Array], weights: Mapping[str, float]) -> Array:
    """Sum of weight * score over the named rewards, float32 [B]."""
    return sum(weight * scores[name] for name, weight in weights.items())


def check(weights: Mapping[str, float], available: tuple[str, ...]) -> None:
    """Raise UserError for an empty mix or a reward that the judge does not give."""
    if not weights:
        raise UserError("rewards is empty; name at least one, such as --config.rewards.judge=1.0")
    unknown = sorted(set(weights) - set(available))
    if unknown:
        raise UserError(f"unknown reward {unknown[0]!r}; this judge gives: {', '.join(available)}")
