"""One sampling step's parts: guided logits, token draws, confidence, and which tokens to commit."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array
LogitsFn = Callable[[Array, Array, Any], Array]  # (ids [B,N], timestep [B], cond) -> logits [B,N,K] float32

TOKENS, NOISE, DECISION, ORDER = 0, 1, 2, 3  # purposes a sample's key is folded with


def step_keys(keys_B: Array, step: Array, purpose: int) -> Array:
    """Keys of one step and purpose, [B]: derived from the sample's key, so batch-independent."""
    return jax.vmap(lambda key: jax.random.fold_in(jax.random.fold_in(key, step), purpose))(keys_B)


def guided(logits_fn: LogitsFn, null_cond: Any) -> Callable[[Array, Array, Any, Array], Array]:
    """Classifier-free guidance in one doubled batch: l = u + s (c - u), s = 1 is the plain model.

    `null_cond` has the shape of one sample's cond. The result takes (ids, timestep, cond, scale [B]). The branches of a
    sample are neighbours in the batch: where rows are split over devices, none moves.
    """

    def pairs(null, cond):
        return jnp.stack([cond, _rows_of(null, cond)], axis=1).reshape(-1, *cond.shape[1:])

    def fn(ids_BN: Array, timestep_B: Array, cond: Any, scale_B: Array) -> Array:
        conds = jax.tree.map(pairs, null_cond, cond)
        logits = logits_fn(ids_BN.repeat(2, axis=0), timestep_B.repeat(2, axis=0), conds)
        logits = logits.reshape(-1, 2, *logits.shape[1:])
        return mixed(logits[:, 0], logits[:, 1], scale_B)

    return fn


def with_null(cond: Any, null_cond: Any) -> Any:
    """Conditions [B,...] followed by as many null ones, [2B,...]."""
    return jax.tree.map(lambda null, c: jnp.concatenate([c, _rows_of(null, c)]), null_cond, cond)


def _rows_of(null: Any, cond: Array) -> Array:
    return jnp.broadcast_to(null, cond.shape).astype(cond.dtype)


def mixed(conditional: Array, unconditional: Array, scale: Array) -> Array:
    """Logits [B,N,K] of both branches, mixed by a scale [] or [B]."""
    return unconditional + scale.reshape(-1, 1, 1) * (conditional - unconditional)


def log_probabilities(logits: Array) -> Array:
    """Log-softmax of logits [...,K] less their logarithm of a sum, in two passes.

    `jax.nn.log_softmax` makes one of it, for which the TPU's compiler finds no room at 2 x 4096 x 8192 (libtpu 0.0.42).
    """
    return logits - jax.nn.logsumexp(logits, axis=-1, keepdims=True)


def draw_tokens(keys_B: Array, logp_BNK: Array) -> tuple[Array, Array]:
    """Draw a token at every position: (ids [B,N] int32, their log-probability [B,N] float32).

    By inverting the cumulative distribution: one uniform a token, where Gumbel-argmax would need K.
    """
    cumulative = jnp.cumsum(jnp.exp(logp_BNK), axis=-1)
    uniform = jax.vmap(lambda key: jax.random.uniform(key, logp_BNK.shape[1:2]))(keys_B)
    level = uniform[..., None] * cumulative[..., -1:]
    ids = jnp.minimum((cumulative <= level).sum(-1), logp_BNK.shape[-1] - 1).astype(jnp.int32)
    return ids, jnp.take_along_axis(logp_BNK, ids[..., None], axis=-1)[..., 0]


def gumbel(keys_B: Array, num_tokens: int) -> Array:
    """Standard Gumbel noise [B,N] float32."""
    return jax.vmap(lambda key: jax.random.gumbel(key, (num_tokens,)))(keys_B)


def commit_top(priority_BN: Array, masked_BN: Array, count_B: Array) -> Array:
    """Choose exactly `count` masked positions of highest priority a row (ties: lower index), [B,N] bool."""
    priority = jnp.where(masked_BN, priority_BN, -jnp.inf)
    order = jnp.argsort(-priority, axis=-1, stable=True)
    rank = jnp.argsort(order, axis=-1, stable=True)
    return (rank < count_B[:, None]) & masked_BN


def threshold_commit(logp_BN, masked_BN, log_kappa_B, minimum_B, last_B):
    """Commit what is confident enough (action `threshold`): log pi(y_i) >= log c*, no noise.

    c* = min(kappa, n_min-th largest confidence), so at least n_min positions are committed; all at the last
    call. `hard` with threshold log c* is the exact likelihood of this rule.

    Args:
      logp_BN: float32 [B, N], log pi(y_i) of the drawn codes.
      masked_BN: bool [B, N].
      log_kappa_B: float32 [B], log sigmoid(a).
      minimum_B: int32 [B], n_min >= 1.
      last_B: bool [B], true at call T_max - 1.
    Returns:
      (committed bool [B, N], log c* float32 [B]); log c* = -inf where all is committed by force.
    """
    ordered = jnp.sort(jnp.where(masked_BN, -logp_BN, jnp.inf), axis=-1)
    index = jnp.clip(jnp.minimum(minimum_B, masked_BN.sum(-1)) - 1, 0, None)
    nth_B = -jnp.take_along_axis(ordered, index[:, None], axis=-1)[:, 0]
    log_c_B = jnp.where(last_B, -jnp.inf, jnp.minimum(log_kappa_B, nth_B))
    return masked_BN & (logp_BN >= log_c_B[:, None]), log_c_B


def frontier_commit(logp_BN, priority_BN, masked_BN, log_kappa_B, minimum_B, last_B):
    """Commit the `minimum` positions of highest priority, and whatever else is confident enough (our choice).

    Where the priority does not read what was drawn, the minimum is chosen as if by the environment, and `hard`
    with threshold log c* = log kappa is the exact likelihood: a position that is not committed was below it.

    Args and returns are those of `threshold_commit`, with the priority float32 [B, N] beside the confidences. The
    fixed-plan modes commit by the same rule, with a level of +inf where there is no threshold.
    """
    forced = commit_top(priority_BN, masked_BN, minimum_B)
    log_c_B = jnp.where(last_B, -jnp.inf, log_kappa_B)
    return masked_BN & (forced | (logp_BN >= log_c_B[:, None])), log_c_B


def entropy(logp: Array) -> Array:
    """Entropy in nats of log-probabilities [..., K], float32 [...]."""
    return -(jnp.exp(logp) * logp).sum(-1)


def entropy_temperature(entropy: Array, amplitude: float = 2.5, decay: float = 3.0, floor: float = 0.7) -> Array:
    """Temperature that heats sure positions most, amplitude exp(-h / decay) + floor, of entropies in nats; same shape.

    Published form, with the numbers of the official code (specs/maskfocus.md section 3).
    """
    return amplitude * jnp.exp(-entropy / decay) + floor
