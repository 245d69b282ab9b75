"""Log-likelihood of one sampler call, position by position (speed_rl spec 3).

A call draws y_i ~ pi for every masked i and commits those of highest z_i = log pi_old(y_i) + tau Gumbel_i.
Four candidate likelihoods of what it did, on committed positions U and re-masked positions R:

    all         log pi(y_i) on U and R; unbiased, very noisy (Mask-GRPO eq. 13)
    kept        log pi(y_i) on U; biased to low entropy (eq. 15), a negative control
    hard        kept + log sum_v pi_j(v) [log pi_old,j(v) < h] on R, h = min_U log pi_old(y_i);
                exact at tau = 0 only (eq. 14)
    transition  kept + log sum_v pi_j(v) w_j(v) on R; unbiased for every tau (our choice, the default)
                w_j(v) = exp(-exp(-(z* - log pi_old,j(v)) / tau)), z* = min_U z_i

The ordering is part of the environment: w carries no gradient.
"""

import jax
import jax.numpy as jnp
import numpy as np

KINDS = ("transition", "hard", "kept", "all")
FLOOR = -60.0


def position_likelihood(kind: str, logp_MK, logp_old_MK, ids_M, committed_M, remasked_M, z_star_M, tau_M):
    """Score flat positions under a likelihood, for the new and the old policy (speed_rl spec 3, 5.3).

    Flat, so that the caller may put the output head and this function in one rematerialised chunk.

    Args:
      kind: "transition", "hard", "kept" or "all" (else ValueError).
      logp_MK: float32 [M, K], new log-probs.
      logp_old_MK: float32 [M, K], behaviour log-probs; stop-gradient here, so logp itself may be passed.
      ids_M: int32 [M], codes drawn; only `all` reads those of re-masked positions, else MASK may stand there.
      committed_M: bool [M].
      remasked_M: bool [M].
      z_star_M: float32 [M], a value per row spread over its positions: z* for `transition`; for `hard` the
        lowest committed log pi_old (or log c* of the `threshold` action); unread otherwise.
      tau_M: float32 [M], Gumbel scale of the call, read by `transition` only; 0 is the limit, an indicator.
    Returns:
      (logp_M, logp_old_M, weight_M): weight 1 where the position has a term, elsewhere all three are 0.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown likelihood {kind!r}; one of {KINDS}")
    logp_old_MK = jax.lax.stop_gradient(logp_old_MK)
    drawn = jnp.clip(ids_M, 0, logp_MK.shape[-1] - 1)[:, None]
    new, old = (jnp.take_along_axis(x, drawn, axis=-1)[:, 0] for x in (logp_MK, logp_old_MK))
    if kind in ("transition", "hard"):
        tau_M = jnp.zeros_like(tau_M) if kind == "hard" else tau_M
        log_w_MK = log_order_weight(logp_old_MK, z_star_M, tau_M)
        new = jnp.where(committed_M, new, _log_remasked(logp_MK, log_w_MK))
        old = jnp.where(committed_M, old, _log_remasked(logp_old_MK, log_w_MK))
    scored = committed_M if kind == "kept" else committed_M | remasked_M
    return jnp.where(scored, new, 0.0), jnp.where(scored, old, 0.0), scored.astype(logp_MK.dtype)


def log_order_weight(logp_old_MK, z_star_M, tau_M):
    """Give log w_j(v), the log-probability that code v at j ranks below z*, clamped at -60; [M, K].

    log w = -exp((log pi_old(v) - z*) / tau); tau = 0 gives 0 where log pi_old(v) < z* and -60 elsewhere.
    """
    excess = logp_old_MK - z_star_M[:, None]
    positive = (tau_M > 0)[:, None]
    # Bounding the exponent by log 60 is the clamp, and keeps exp finite; the inner where keeps 0/0 out.
    exponent = jnp.minimum(excess / jnp.where(positive, tau_M[:, None], 1.0), np.log(-FLOOR))
    log_w = jnp.where(positive, -jnp.exp(exponent), jnp.where(excess < 0, 0.0, FLOOR))
    return jax.lax.stop_gradient(jnp.maximum(log_w, FLOOR))


def _log_remasked(logp_MK, log_w_MK):
    """Give log q_j = log sum_v pi_j(v) w_j(v), clamped at -60, [M]."""
    return jnp.maximum(jax.nn.logsumexp(logp_MK + log_w_MK, axis=-1), FLOOR)
