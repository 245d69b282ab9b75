"""The two resizes of published Inception metrics, each as one matrix an axis: [B,H,W,C] -> [B,size,size,C].

They differ from each other, and from `jax.image.resize`, by enough to move a Frechet distance (Parmar et al. 2022).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
KEYS = -0.5  # the parameter of the cubic kernel in Pillow (Keys 1981)


def bilinear_tf1(length: int, size: int) -> np.ndarray:
    """Return the weights float32 [size, length] of TensorFlow 1's bilinear resize of one axis.

    Neither antialiased nor centred (align_corners and half-pixel centres off): output i reads at i * length / size,
    where the fraction is that of float32, as in the original.
    """
    at = np.arange(size, dtype=np.float32) * np.float32(length / size)
    low = np.floor(at).astype(int)
    share = at - low.astype(np.float32)
    weights, rows = np.zeros((size, length), np.float32), np.arange(size)
    weights[rows, low] = 1 - share
    weights[rows, np.minimum(low + 1, length - 1)] += share
    return weights


def bicubic_pil(length: int, size: int) -> np.ndarray:
    """Return the weights float32 [size, length] of Pillow's bicubic resize of one axis of a float image.

    Antialiased: the kernel widens with the step where it shrinks; cut at the border and normed there.
    """
    step = length / size
    distance = np.abs(np.arange(length) + 0.5 - (np.arange(size)[:, None] + 0.5) * step) / max(step, 1.0)
    near = ((KEYS + 2) * distance - (KEYS + 3)) * distance**2 + 1
    far = KEYS * (((distance - 5) * distance + 8) * distance - 4)
    weights = np.where(distance < 1, near, np.where(distance < 2, far, 0.0))
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


RESIZES = {"bilinear_tf1": bilinear_tf1, "bicubic_pil": bicubic_pil}


@functools.partial(jax.jit, static_argnames=("kind", "size"))
def resize(images_BHWC: Array, kind: str, size: int) -> Array:
    """Resize images [B,H,W,C] of values 0..255 to float32 [B,size,size,C], not rounded.

    `kind` is a name of RESIZES. What a bicubic kernel overshoots is cut to 0..255, as clean-fid 0.1.35 does.
    """
    rows, columns = (jnp.asarray(RESIZES[kind](length, size)) for length in images_BHWC.shape[1:3])
    product = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    wide = product("wx,byxc->bywc", columns, images_BHWC.astype(jnp.float32))
    return jnp.clip(product("hy,bywc->bhwc", rows, wide), 0, 255)
