"""The reward of speed: its form, its gate, its weight (speed_rl spec 4.5; all our choice)."""

import jax
import jax.numpy as jnp

SIGMA_FLOOR = 1e-3  # of sigma_w, for R divides by it


def speed_reward(calls, max_calls: int, min_calls: int) -> jax.Array:
    """r_s(T) = clip((T_max - T) / (T_max - T_min), 0, 1): each saved call is worth the same time.

    Args:
      calls: int32 [...], network calls T of the rollouts.
      max_calls: T_max.
      min_calls: T_min, below T_max (else ValueError); fewer calls earn no more.
    Returns:
      float32 [...].
    """
    if not 0 < min_calls < max_calls:
        raise ValueError(f"need 0 < min_calls < max_calls, got {min_calls} and {max_calls}")
    saved = (max_calls - calls) / (max_calls - min_calls)
    return jnp.clip(saved, 0.0, 1.0).astype(jnp.float32)


def quality_gate(quality, reference, sigma, *, kind: str = "hard", margin: float = 0.5, slope: float = 4.0):
    """Pay speed only for good images: g = [r_q >= q_ref - margin sigma], or its soft form.

    Soft: sigmoid(slope (r_q - q_ref + margin sigma) / sigma). Without it policy `budget` learns fast garbage.

    Args:
      quality: float32 [...].
      reference: float32, same rank, size-1 axes allowed: the base's quality on the prompt at its reference T.
      sigma: float32 scalar, within-group std of the quality.
      kind: "hard", "soft" or "off" (else ValueError).
    """
    excess = quality - reference + margin * sigma
    if kind == "hard":
        return (excess >= 0).astype(jnp.float32)
    if kind == "soft":
        return jax.nn.sigmoid(slope * excess / sigma)
    if kind == "off":
        return jnp.ones_like(excess)
    raise ValueError(f"unknown gate {kind!r}; one of 'hard', 'soft', 'off'")


def lambda_schedule(step, *, zero_until: int, full_at: int, value: float) -> jax.Array:
    """Weigh the speed reward: 0 for the first `zero_until` updates, linear to `value` at update `full_at`."""
    if not 0 <= zero_until <= full_at:
        raise ValueError(f"need 0 <= zero_until <= full_at, got {zero_until} and {full_at}")
    ramp = (jnp.asarray(step, jnp.float32) - zero_until) / max(full_at - zero_until, 1)
    return value * jnp.where(step >= full_at, 1.0, jnp.clip(ramp, 0.0, 1.0))


def dual_lambda(weight, quality_PG, reference_P1, sigma, valid_P, *, rate=0.02, low=0.05, high=5.0) -> jax.Array:
    """Update lambda by quality surplus: clip(lambda exp(rate mean((r_q - q_ref) / sigma)), low, high).

    Buys speed only while quality is at least the base's. Groups that are not valid (failed scores) do not count.
    """
    valid = jnp.broadcast_to(valid_P[:, None], quality_PG.shape)
    surplus = jnp.where(valid, (quality_PG - reference_P1) / sigma, 0.0)
    mean = surplus.sum() / jnp.maximum(valid.sum(), 1)
    return jnp.clip(weight * jnp.exp(rate * mean), low, high)


def total_reward(quality, sigma, speed, gate, weight) -> jax.Array:
    """R = r_q / sigma_w + lambda g r_s: lambda is in units of the within-group spread of quality."""
    return quality / sigma + weight * gate * speed


def update_sigma(sigma, std_P, valid_P, *, decay: float = 0.99) -> jax.Array:
    """Average the within-group std of the quality, sigma_w, over updates (EMA), float32 scalar.

    Args:
      sigma: float32 scalar; not above the floor means that no spread was seen yet, and this batch sets it.
      std_P: float32 [P], `group_std` of the quality.
      valid_P: bool [P]; no valid group leaves sigma as it is (at least the floor).
      decay: weight of the past.
    """
    count = valid_P.sum()
    mean = jnp.where(valid_P, std_P, 0.0).sum() / jnp.maximum(count, 1)
    updated = jnp.where(sigma > SIGMA_FLOOR, decay * sigma + (1 - decay) * mean, mean)
    return jax.lax.stop_gradient(jnp.maximum(jnp.where(count > 0, updated, sigma), SIGMA_FLOOR))
