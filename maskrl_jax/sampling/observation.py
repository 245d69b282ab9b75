"""What a decision may see of a state before a call (speed_rl spec 4.4; our choice)."""

import jax
import jax.numpy as jnp
import numpy as np

from maskrl_jax.sampling import draws

QUANTILES = tuple(round(0.05 + 0.1 * i, 2) for i in range(10))
NUM_FEATURES = 5 + len(QUANTILES)


def features(logp_BNK, masked_BN, tick_B, call_B, *, ticks: int, max_calls: int) -> jax.Array:
    """Describe the state before a call to the head (speed_rl spec 4.4), stop-gradient.

    Columns: masked share, c/C, k/T_max; over the masked positions the mean entropy / ln K, the mean top-1
    log-prob and the 5, 15, ..., 95 % quantiles of the top-1 probability. Where nothing is masked these are 0.

    Args:
      logp_BNK: float32 [B, N, K], guided log-probs, before tokens are drawn.
      masked_BN: bool [B, N].
      tick_B: int32 [B], clock before the call.
      call_B: int32 [B], k, calls made so far.
      ticks: C.
      max_calls: T_max.
    Returns:
      float32 [B, 15].
    """
    top_BN = logp_BNK.max(-1)
    columns = [
        masked_BN.mean(-1, dtype=jnp.float32),
        tick_B / ticks,
        call_B / max_calls,
        _masked_mean(draws.entropy(logp_BNK), masked_BN) / np.log(logp_BNK.shape[-1]),
        _masked_mean(top_BN, masked_BN),
    ]
    table = jnp.stack([c.astype(jnp.float32) for c in columns], axis=-1)
    quantiles = masked_quantiles(jnp.exp(top_BN), masked_BN).astype(jnp.float32)
    return jax.lax.stop_gradient(jnp.concatenate([table, quantiles], axis=-1))


def _masked_mean(x_BN, masked_BN):
    """Average over the masked positions, [B]; 0 where there is none."""
    return jnp.where(masked_BN, x_BN, 0.0).sum(-1) / jnp.maximum(masked_BN.sum(-1), 1)


def masked_quantiles(x_BN, masked_BN) -> jax.Array:
    """Interpolate the QUANTILES of the masked entries, as numpy.quantile, [B, Q]; 0 in rows without any."""
    count_B1 = masked_BN.sum(-1, keepdims=True)
    ordered = jnp.sort(jnp.where(masked_BN, x_BN, jnp.inf), axis=-1)
    last = jnp.maximum(count_B1 - 1, 0)
    position = jnp.asarray(QUANTILES, x_BN.dtype)[None] * last
    lower = jnp.floor(position).astype(jnp.int32)
    low = jnp.take_along_axis(ordered, lower, axis=-1)
    high = jnp.take_along_axis(ordered, jnp.minimum(lower + 1, last), axis=-1)
    # An empty row holds inf - inf; the last select discards it.
    return jnp.where(count_B1 > 0, low + (position - lower) * (high - low), 0.0)
