"""Policy losses: the clipped objective per term and the assembly of its terms (speed_rl spec 5.3)."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp


def _log_ratio(logp, logp_old, weight):
    """Subtract the log-probs where they count: a padded entry may hold anything, and 0 * inf is NaN."""
    return jnp.where(weight != 0, logp - jax.lax.stop_gradient(logp_old), 0.0)


def clipped_surrogate(logp, logp_old, advantage, weight, *, low: float, high: float):
    """Weighted sum of the clipped policy objective per term (PPO eq. 7, asymmetric); to be maximised.

    Ratios are per token or decision: a joint ratio over the hundreds of tokens of a few-step call explodes.

    Args:
      logp: float32 [...], new log-probs.
      logp_old: float32 [...], behaviour log-probs (stop-gradient here).
      advantage: float32, rank of `logp`, size-1 axes allowed.
      weight: float32 [...]; entries with weight 0 may hold any value.
      low: epsilon below 1.
      high: epsilon above 1.
    """
    chex.assert_equal_shape([logp, logp_old, weight])
    chex.assert_equal_rank([logp, advantage])
    ratio = jnp.exp(_log_ratio(logp, logp_old, weight))
    gain = jax.lax.stop_gradient(advantage)
    objective = jnp.minimum(ratio * gain, jnp.clip(ratio, 1 - low, 1 + high) * gain)
    return (weight * objective).sum()


def clip_fraction(logp, logp_old, advantage, weight, *, low: float, high: float):
    """Share of terms whose gradient the clip removes, as (sum, weight), each term counted once; as above."""
    ratio = jnp.exp(_log_ratio(logp, logp_old, weight))
    counted = (weight != 0).astype(jnp.float32)
    clipped = ((ratio > 1 + high) & (advantage > 0)) | ((ratio < 1 - low) & (advantage < 0))
    return (counted * clipped).sum(), counted.sum()


def approximate_kl(logp, logp_old, weight):
    """Mean of ratio - 1 - log ratio over the terms that count, as (sum, weight): how far the policy has moved.

    An unbiased, nonnegative estimate of KL(old || new) where the terms were drawn from the old policy.
    """
    log_ratio = _log_ratio(logp, logp_old, weight)
    counted = (weight != 0).astype(jnp.float32)
    return (counted * (jnp.expm1(log_ratio) - log_ratio)).sum(), counted.sum()


def ratio_error(logp, logp_old, weight):
    """Largest |ratio - 1| over the terms that count, float32 scalar; 0 before the first update."""
    return jnp.abs(jnp.expm1(_log_ratio(logp, logp_old, weight))).max()


class TermWeights(NamedTuple):
    """Constant factor of each score term, float32 [B] each (one value per rollout)."""

    token: jax.Array
    decision: jax.Array


def term_weights(calls_B, *, num_tokens: int, max_calls: int, per_rollout_mean: bool = False) -> TermWeights:
    """Weigh the score terms of a rollout: 1/N per position, 1/T_max per decision (speed_rl spec 5.3).

    Constants keep the gradient unbiased: T depends on the policy, so dividing by it weighs lengths wrongly.

    Args:
      calls_B: int32 [B], T_j.
      num_tokens: N.
      max_calls: T_max.
      per_rollout_mean: divide by T_j / T_max (Mask-GRPO's mean over calls); harmless only if T is exogenous.
    """
    scale = jnp.ones(calls_B.shape, jnp.float32)
    if per_rollout_mean:
        scale = max_calls / jnp.maximum(calls_B, 1).astype(jnp.float32)
    return TermWeights(token=scale / num_tokens, decision=scale / max_calls)


def budget_weight(masked_BN: jax.Array, levels: int) -> jax.Array:
    """Weigh the positions of one re-masking level of `budget`: 1 / (S |M'|) inside M', float32 [B, N]."""
    masked = masked_BN.astype(jnp.float32)
    return masked / (levels * jnp.maximum(masked.sum(-1, keepdims=True), 1.0))


def kl_weight(masked_BN: jax.Array, calls_B: jax.Array) -> jax.Array:
    """Weigh the KL of the masked positions of a call: 1 / (T_j |M_k|), float32 [B, N] (speed_rl spec 5.3)."""
    masked = masked_BN.astype(jnp.float32)
    count = jnp.maximum(masked.sum(-1, keepdims=True), 1.0)
    return masked / (count * jnp.maximum(calls_B, 1).astype(jnp.float32)[:, None])


class Terms(NamedTuple):
    """Sums over any part of the batch; parts add up. `token` and `decision` are to be maximised."""

    token: jax.Array
    decision: jax.Array
    kl: jax.Array
    entropy: jax.Array


class Normalisers(NamedTuple):
    """Totals over the whole batch of an update, known before its first gradient."""

    survivors: jax.Array
    deciders: jax.Array
    decisions: jax.Array


def policy_loss(terms: Terms, totals: Normalisers, *, kl_coefficient, entropy_coefficient) -> jax.Array:
    """Assemble the loss of speed_rl spec 5.3 from sums, to be minimised.

        L = -token / J - decision / sum_j omega^d_j + beta * kl / J - eta_H * entropy / (number of decisions)

    J = sum_j omega_j: the KL is a mean over the rollouts that are kept, for the others are not scored at all.
    The totals are those of the whole batch: the losses (and gradients) of micro-batches and devices add.

    Args:
      terms: sums over this part, each entry already times its omega_j and `term_weights` / `kl_weight`.
      totals: survivors J, deciders sum_j omega^d_j (where all rollouts' tokens are updated, omega^d = omega: the
        spec's loss), decisions (real ones) of the whole batch.
      kl_coefficient: beta.
      entropy_coefficient: eta_H.
    """
    policy = terms.token / jnp.maximum(totals.survivors, 1.0) + terms.decision / jnp.maximum(totals.deciders, 1.0)
    divergence = terms.kl / jnp.maximum(totals.survivors, 1.0)
    entropy = terms.entropy / jnp.maximum(totals.decisions, 1.0)
    return kl_coefficient * divergence - policy - entropy_coefficient * entropy
