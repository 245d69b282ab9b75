"""Group advantages and the two filters: zero-variance groups (F1) and low-quality samples (F2)."""

import flax.struct
import jax
import jax.numpy as jnp


def _moments(reward_PG, keep_PG):
    """Mean and std (ddof 1) over the kept rollouts, [P, 1] each; std 0 where fewer than two are kept."""
    # A dropped reward may be anything, also NaN: select before multiplying.
    weight = keep_PG.astype(reward_PG.dtype)
    count = weight.sum(-1, keepdims=True)
    # Measured from the best of the group, so that a constant group has a spread of exactly 0.
    best = jnp.where(keep_PG, reward_PG, -jnp.inf).max(-1, keepdims=True)
    gap = jnp.where(keep_PG, reward_PG - best, 0.0)
    mean = gap.sum(-1, keepdims=True) / jnp.maximum(count, 1)
    variance = (weight * (gap - mean) ** 2).sum(-1, keepdims=True) / jnp.maximum(count - 1, 1)
    return jnp.where(count > 0, best + mean, 0.0), jnp.sqrt(variance)


def group_advantage(reward_PG: jax.Array, keep_PG: jax.Array, eps: float = 1e-4) -> jax.Array:
    """Normalise rewards within their group: (R - mean) / (std + eps), ddof 1 (speed_rl spec 5.1).

    Args:
      reward_PG: float32 [P, G].
      keep_PG: bool [P, G]; dropped rollouts enter neither mean nor std and get 0.
      eps: added to the std.
    Returns:
      float32 [P, G], stop-gradient; all 0 in a group with fewer than two kept rollouts.
    """
    keep = keep_PG.astype(bool)
    mean, std = _moments(reward_PG, keep)
    usable = keep & (keep.sum(-1, keepdims=True) >= 2)
    return jax.lax.stop_gradient(jnp.where(usable, (reward_PG - mean) / (std + eps), 0.0))


def lighten_negative(advantage_PG: jax.Array, weight: float) -> jax.Array:
    """Multiply what is below zero by a weight in [0, 1]: 1 is the plain policy gradient, 0 learns from successes alone.

    Our choice, for a likelihood that is not that of what the sampler did: with a mean above zero the update also
    draws the policy towards its own better samples, which sharpens it and costs diversity.
    """
    return jnp.where(advantage_PG < 0, weight * advantage_PG, advantage_PG)


def group_std(reward_PG: jax.Array, keep_PG: jax.Array) -> jax.Array:
    """Take the unbiased std of each group over its kept rollouts, float32 [P]; 0 with fewer than two."""
    return jax.lax.stop_gradient(_moments(reward_PG, keep_PG.astype(bool))[1][:, 0])


def max_variance_subset(reward_PG: jax.Array, keep_PG: jax.Array, size: int) -> jax.Array:
    """Choose the `size` kept rollouts of each group whose rewards vary most: some of the best, some of the worst.

    A gradient is mostly made of the rollouts with large advantages, and an update costs several times a rollout, so
    many rollouts with few updated learn more in the same time (arXiv 2504.13818, "PODS").

    Args:
      reward_PG: float32 [P, G].
      keep_PG: bool [P, G]; what is dropped is not chosen.
      size: rollouts to choose, 2..G; all that are kept where they are no more than that.
    Returns:
      bool [P, G].
    """
    keep = keep_PG.astype(bool)
    order = jnp.argsort(jnp.where(keep, -reward_PG, jnp.inf), axis=-1, stable=True)
    rank_PG = jnp.argsort(order, axis=-1, stable=True)  # 0 is the best; what is dropped comes last
    count_P1 = keep.sum(-1, keepdims=True)

    def subset(best):
        return keep & ((rank_PG < best) | (rank_PG >= count_P1 - (size - best)))

    choices = jnp.stack([subset(best) for best in range(size + 1)])  # [S, P, G]
    spread = jax.vmap(lambda chosen: _moments(reward_PG, chosen)[1][:, 0])(choices)
    return jnp.take_along_axis(choices, spread.argmax(0)[None, :, None], axis=0)[0]


def low_quality_mask(quality_PG, reference_P1, sigma, factor: float = 3.0) -> jax.Array:
    """Tell which rollouts to keep: quality >= reference - factor sigma (F2, speed_rl spec 5.1; our choice).

    Args:
      quality_PG: float32 [P, G].
      reference_P1: float32 [P, 1], the base's quality on the prompt.
      sigma: float32 scalar, running within-group std of the quality.
      factor: width of the tolerance.
    Returns:
      bool [P, G], true where the rollout is kept.
    """
    return quality_PG >= reference_P1 - factor * sigma


def clip_low_quality(quality_PG, reference_P1, sigma, factor: float = 3.0) -> jax.Array:
    """Raise low qualities to the floor and keep the rollout (option `clip` of F2); see `low_quality_mask`."""
    return jnp.maximum(quality_PG, reference_P1 - factor * sigma)


def enough_survivors(keep_PG: jax.Array) -> jax.Array:
    """Tell which groups keep at least half of their rollouts, bool [P]; the others are rejected as in F1."""
    return 2 * keep_PG.astype(jnp.int32).sum(-1) >= keep_PG.shape[-1]


class History(flax.struct.PyTreeNode):
    """Ring buffer of group stds: values float32 [capacity], count int32 (all that were ever pushed)."""

    values: jax.Array
    count: jax.Array


def history_create(capacity: int) -> History:
    """Make an empty history; ValueError if the capacity is not positive."""
    if capacity < 1:
        raise ValueError(f"history capacity must be positive, got {capacity}")
    return History(values=jnp.zeros((capacity,), jnp.float32), count=jnp.zeros((), jnp.int32))


def history_push(history: History, std_P: jax.Array, valid_P: jax.Array) -> History:
    """Record the stds of the valid groups, rejected ones included: else the threshold ratchets up.

    Args:
      history: the ring buffer.
      std_P: float32 [P], P at most the capacity (ValueError).
      valid_P: bool [P]; entries that are false leave no trace.
    """
    capacity = history.values.shape[0]
    if std_P.shape[0] > capacity:
        raise ValueError(f"{std_P.shape[0]} groups exceed the history capacity {capacity}")
    valid = valid_P.astype(jnp.int32)
    slot = (history.count + jnp.cumsum(valid) - 1) % capacity
    slot = jnp.where(valid > 0, slot, capacity)
    return History(values=history.values.at[slot].set(std_P, mode="drop"), count=history.count + valid.sum())


def history_threshold(history: History, percentile: float = 10.0, min_count: int = 64) -> jax.Array:
    """Take the percentile of the recorded stds (F1: reject a group below it), float32 scalar.

    Linear over the filled part, as numpy.percentile; -inf before `min_count` groups are recorded.
    """
    capacity = history.values.shape[0]
    filled = jnp.minimum(history.count, capacity)
    ordered = jnp.sort(jnp.where(jnp.arange(capacity) < filled, history.values, jnp.inf))
    position = percentile / 100 * (filled - 1)
    lower = jnp.clip(jnp.floor(position).astype(jnp.int32), 0, capacity - 1)
    upper = jnp.clip(lower + 1, 0, jnp.maximum(filled - 1, 0))
    value = ordered[lower] + (position - lower) * (ordered[upper] - ordered[lower])
    active = history.count >= max(min_count, 1)
    return jnp.where(active, value, -jnp.inf)
