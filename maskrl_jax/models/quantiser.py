"""What tokenizers with a trained codebook share: the straight-through value and the losses of quantisation.

specs/maskgit.md section 2. Axes: K codes, E their width.
"""

import jax
import jax.numpy as jnp

Array = jax.Array
ENTROPY_TARGETS = ("softmax", "argmax")


def check_pixels(images_BHWC: Array, patch: int) -> None:
    """Refuse images [B,H,W,3] that do not fall into whole cells."""
    height, width = images_BHWC.shape[1:3]
    if height % patch or width % patch:
        raise ValueError(f"images of {height} x {width} pixels do not fall into patches of {patch}")


def look_up(codebook_KE: Array, ids: Array) -> Array:
    """Rows of a codebook, [..., E]; NaN for ids out of 0..K-1."""
    codes = len(codebook_KE)
    return jnp.take(codebook_KE, jnp.where((ids >= 0) & (ids < codes), ids, codes), axis=0, mode="fill")


def straight_through(latents: Array, quantised: Array) -> Array:
    """The value of the code, the gradient of the latent; both [..., E]."""
    return latents + jax.lax.stop_gradient(quantised - latents)


def latent_losses(latents: Array, quantised: Array) -> tuple[Array, Array]:
    """Mean squared distances of latents and their codes [..., E]: (what moves the latents, what moves the codes)."""
    stop = jax.lax.stop_gradient
    return jnp.square(stop(quantised) - latents).mean(), jnp.square(quantised - stop(latents)).mean()


def squared_distances(latents: Array, codebook_KE: Array) -> Array:
    """Of every latent [..., E] to every code: [M,K] float32."""
    latents_ME = latents.reshape(-1, latents.shape[-1])
    squares_MK = jnp.square(latents_ME).sum(-1)[:, None] + jnp.square(codebook_KE).sum(-1)[None]
    return squares_MK - 2 * latents_ME @ codebook_KE.T


def entropy_loss(distances_MK: Array, temperature: float = 0.01, target: str = "softmax") -> Array:
    """Mean entropy of a latent's codes minus the entropy of their mean, in nats, [] (google-research/maskgit).

    Codes are distributed as softmax(-distance / temperature). Small where every latent is sure of its code and all
    codes are in use. `argmax` puts the nearest code in the place of the distribution, with its gradient.
    """
    if target not in ENTROPY_TARGETS:
        raise ValueError(f"entropy loss {target!r} is not one of {', '.join(ENTROPY_TARGETS)}")
    logp_MK = jax.nn.log_softmax(-distances_MK / temperature)
    share_MK = jnp.exp(logp_MK)
    if target == "argmax":
        nearest_MK = jax.nn.one_hot(logp_MK.argmax(-1), logp_MK.shape[-1])
        share_MK = straight_through(share_MK, nearest_MK)
    mean_K = share_MK.mean(0)
    return -(share_MK * logp_MK).sum(-1).mean() + (mean_K * jnp.log(mean_K + 1e-5)).sum()
