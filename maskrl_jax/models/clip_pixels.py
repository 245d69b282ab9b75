"""Pictures as CLIP's picture tower reads them: resized as Pillow does it, fitted to a square, normalised.

Everything is differentiable: where the reference rounds to bytes and clips, the value is the rounded one and the
gradient passes as if it were not (straight through), so that a saturated pixel still learns.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
FITS = ("crop", "crop_even", "pad")
# Of the channels of OpenAI's training pictures; published, and what LAION used too.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


@dataclasses.dataclass(frozen=True)
class Pixels:
    """How a reference prepares its pictures.

    fit: `crop`: the shorter side becomes `size`, the middle is kept, an odd pixel too many is cut behind (Hugging
      Face); `crop_even`: the same, and half a pixel rounds to even (torchvision, so OpenAI and open_clip); `pad`: the
      longer side becomes `size`, the rest is black (HPSv2). Square pictures are alike under all three.
    as_bytes: round to bytes before and after every pass, as Pillow does. HPSv2 resizes float tensors instead, and
      does not clip what overshoots.
    """

    size: int = 224
    fit: str = "crop"
    as_bytes: bool = True

    def __post_init__(self):
        if self.size < 1:
            raise ValueError(f"size {self.size} must be at least 1")
        if self.fit not in FITS:
            raise ValueError(f"fit {self.fit!r} is not one of {', '.join(FITS)}")


def prepare(images: Array, pixels: Pixels) -> Array:
    """Pictures [B,H,W,3] in [0,1], of any size, normalised for the tower: float32 [B,size,size,3].

    What is outside [0,1] is clipped with a gradient. A picture with a number that is not finite becomes NaN there.
    """
    squares = square(images, pixels)
    mean, std = (jnp.asarray(x, jnp.float32).reshape(1, 1, 1, 3) for x in (MEAN, STD))
    return (squares - mean) / std


def square(images: Array, pixels: Pixels) -> Array:
    """The same without the normalisation: float32 [B,size,size,3], in [0,1] where `as_bytes`."""
    height, width = images.shape[1:3]
    levels = 255.0 * images.astype(jnp.float32)  # ties of Pillow's sums are exact in units of a byte
    levels = jnp.where(jnp.isfinite(levels), levels, jnp.nan)  # infinity is no bright pixel
    levels = to_bytes(levels) if pixels.as_bytes else clipped(levels)
    size = resized_sides(height, width, pixels)
    for axis, wanted in ((2, size[1]), (1, size[0])):  # along rows first, as Pillow
        if levels.shape[axis] != wanted:
            weights = jnp.asarray(bicubic_weights(levels.shape[axis], wanted))
            along = "oi,bhic->bhoc" if axis == 2 else "oi,biwc->bowc"
            levels = jnp.einsum(along, weights, levels, precision=jax.lax.Precision.HIGHEST)
            levels = to_bytes(levels) if pixels.as_bytes else levels
    return _fitted(levels, pixels) / 255.0


def resized_sides(height: int, width: int, pixels: Pixels) -> tuple[int, int]:
    """Height and width after resizing, before cropping or padding."""
    if pixels.fit == "pad":
        scale = pixels.size / max(height, width)
        return max(round(height * scale), 1), max(round(width * scale), 1)
    short = min(height, width)
    return tuple(pixels.size if side == short else pixels.size * side // short for side in (height, width))


def _fitted(levels: Array, pixels: Pixels) -> Array:
    rests = [side - pixels.size for side in levels.shape[1:3]]
    if pixels.fit == "pad":
        pads = [(-rest // 2, -rest - -rest // 2) for rest in rests]
        return jnp.pad(levels, ((0, 0), *pads, (0, 0)))
    top, left = (round(rest / 2) if pixels.fit == "crop_even" else rest // 2 for rest in rests)
    return levels[:, top : top + pixels.size, left : left + pixels.size]


@functools.lru_cache(maxsize=16)
def bicubic_weights(inputs: int, outputs: int) -> np.ndarray:
    """Weights of Pillow's bicubic resampling of a line of pixels, float32 [outputs, inputs]; rows add up to 1.

    Keys' cubic with a = -1/2, stretched by the factor of a reduction so that it does not alias. Its window is that
    of Pillow, which begins and ends at whole pixels.
    """
    scale = inputs / outputs
    stretch = max(scale, 1.0)
    centers = (np.arange(outputs) + 0.5)[:, None] * scale
    places = np.arange(inputs)[None]
    low, high = np.floor(centers - 2 * stretch + 0.5), np.floor(centers + 2 * stretch + 0.5)
    x = np.abs((places + 0.5 - centers) / stretch)
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    weights = np.where(x < 1, near, np.where(x < 2, far, 0.0)) * ((places >= low) & (places < high))
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)


@jax.custom_jvp
def to_bytes(levels: Array) -> Array:
    """Round to whole numbers in 0..255, halves up; the gradient passes straight through. NaN stays NaN."""
    return jnp.clip(jnp.floor(levels + 0.5), 0.0, 255.0)


@jax.custom_jvp
def clipped(levels: Array) -> Array:
    """Clip to 0..255; the gradient passes straight through. NaN stays NaN."""
    return jnp.clip(levels, 0.0, 255.0)


to_bytes.defjvp(lambda primals, tangents: (to_bytes(*primals), *tangents))
clipped.defjvp(lambda primals, tangents: (clipped(*primals), *tangents))
