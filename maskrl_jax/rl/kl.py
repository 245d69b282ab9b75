"""Divergence of the policy from its frozen reference, one function per estimator.

All take float32 log-probs with the codes on the last axis, [..., K], finite, and give [...]. The reference is
stop-gradient. Values and gradients: speed_rl spec 5.3.
"""

import jax
import jax.numpy as jnp

K3_BOUND = 20.0  # of d, our choice: a code that the policy has lost must not overflow, and has no gradient


def forward_kl(logp: jax.Array, logp_ref: jax.Array) -> jax.Array:
    """KL(ref || pi) = CE - H(ref) = sum_v ref(v) (log ref(v) - log pi(v)); exactly 0 where both are equal.

    Same gradient as the cross-entropy, pi - ref: bounded, without the noise of a sampled token.
    """
    logp_ref = jax.lax.stop_gradient(logp_ref)
    return (jnp.exp(logp_ref) * (logp_ref - logp)).sum(-1)


def reverse_kl(logp: jax.Array, logp_ref: jax.Array) -> jax.Array:
    """KL(pi || ref) = sum_v pi(v) (log pi(v) - log ref(v)); logit gradient pi (log pi/ref - KL)."""
    return (jnp.exp(logp) * (logp - jax.lax.stop_gradient(logp_ref))).sum(-1)


def k3(logp: jax.Array, logp_ref: jax.Array, ids: jax.Array) -> jax.Array:
    """k3 = exp(d) - d - 1, d = log ref(a) - log pi(a): KL(pi || ref) from the drawn codes alone (MaskFocus).

    Args:
      logp: float32 [..., K].
      logp_ref: float32 [..., K].
      ids: int32 [...], codes a drawn from pi.
    """
    index = ids[..., None]
    difference = jnp.take_along_axis(jax.lax.stop_gradient(logp_ref) - logp, index, axis=-1)[..., 0]
    difference = jnp.minimum(difference, K3_BOUND)
    return jnp.expm1(difference) - difference
