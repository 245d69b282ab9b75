"""The VQGAN of google-research/maskgit (arXiv 2202.04200), tokenizer of MaskGIT's Flax original.

specs/maskgit.md section 2, form B. Convolutions alone: no attention, no projections around the codebook. Axes: B
batch, h, w cells of the grid, which need not be square, E width of a code.
"""

import dataclasses
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from maskrl_jax.models.conv_autoencoder import GROUPS, doubled, norm
from maskrl_jax.models.quantiser import (
    ENTROPY_TARGETS,
    check_pixels,
    entropy_loss,
    latent_losses,
    look_up,
    squared_distances,
    straight_through,
)
from maskrl_jax.models.vqgan import nearest_code

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class GoogleVQGANConfig:
    """Static sizes; the defaults are the published ones. Channels `width` times each multiplier, finest level first."""

    width: int = 128
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    blocks: int = 2  # of a level, and of the coarsest grid besides
    conv_downsample: bool = False  # a 4x4 convolution of stride 2 in the place of the average of 2x2 cells
    codebook_size: int = 1024  # K
    code_width: int = 256  # E
    dtype: str = "float32"  # of the convolutions; norms and the last layers are float32

    def __post_init__(self):
        object.__setattr__(self, "multipliers", tuple(self.multipliers))
        if min(self.width, self.blocks, self.codebook_size, self.code_width, *self.multipliers) < 1:
            raise ValueError(f"sizes and multipliers must be at least 1, not {self}")
        if any(self.width * multiplier % GROUPS for multiplier in self.multipliers):
            raise ValueError(
                f"width {self.width} times a multiplier must be divisible by the {GROUPS} groups of a norm"
            )

    @property
    def patch(self) -> int:
        """Pixels a side of a cell."""
        return 2 ** (len(self.multipliers) - 1)


class Losses(NamedTuple):
    """Losses of the quantiser, weighted, each []; `total` is what is minimised."""

    total: Array
    to_latents: Array
    to_codes: Array
    entropy: Array


def quantiser_losses(
    latents: Array,
    codebook_KE: Array,
    *,
    commitment: float = 0.25,
    entropy: float = 0.1,
    temperature: float = 0.01,
    target: str = ENTROPY_TARGETS[0],
) -> Losses:
    """Codebook, commitment and entropy losses of latents [..., E], weighted as published (specs/maskgit.md section 2)."""
    to_latents, to_codes = latent_losses(latents, codebook_KE[nearest_code(latents, codebook_KE)])
    spread = entropy_loss(squared_distances(latents, codebook_KE), temperature, target)
    parts = commitment * to_latents, to_codes, entropy * spread
    return Losses(sum(parts), *parts)


class GoogleVQGAN(nn.Module):
    """Images to codes and back; images are in [0,1]."""

    config: GoogleVQGANConfig

    def setup(self):
        c = self.config
        self.encoder, self.decoder = Encoder(c), Decoder(c)
        start = nn.initializers.variance_scaling(1.0, "fan_in", "uniform")
        self.codebook = self.param("codebook", start, (c.codebook_size, c.code_width))

    def latents(self, images_BHWC: Array) -> Array:
        """What is quantised, float32 [B,h,w,E], of images [B,H,W,3] in [0,1]; H and W are multiples of the patch."""
        check_pixels(images_BHWC, self.config.patch)
        return self.encoder(images_BHWC)

    def encode(self, images_BHWC: Array) -> Array:
        """Codes int32 [B,h,w] of images [B,H,W,3] float32 in [0,1]: the nearest by squared distance."""
        return nearest_code(self.latents(images_BHWC), self.codebook)

    def decode(self, ids_Bhw: Array) -> Array:
        """Images [B,H,W,3] float32, nominally in [0,1] and not clipped, of codes [B,h,w]; NaN for ids that are none."""
        return self.decoder(look_up(self.codebook, ids_Bhw))

    def __call__(self, images_BHWC: Array) -> tuple[Array, Array, Array]:
        """Return (reconstruction through a straight-through quantiser, latents [B,h,w,E], codes [B,h,w])."""
        latents = self.latents(images_BHWC)
        ids = nearest_code(latents, self.codebook)
        return self.decoder(straight_through(latents, self.codebook[ids])), latents, ids


class Encoder(nn.Module):
    """Images [B,H,W,3] -> [B,h,w,E] float32."""

    config: GoogleVQGANConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        c, dtype = self.config, self.config.dtype
        x = conv(c.width, "conv_in", bias=False, dtype=dtype)(x)
        for level, multiplier in enumerate(c.multipliers):
            for index in range(c.blocks):
                x = Block(c.width * multiplier, dtype, name=f"level_{level}_block_{index}")(x)
            if level < len(c.multipliers) - 1 and c.conv_downsample:
                x = conv(x.shape[-1], f"level_{level}_down", 4, stride=2, dtype=dtype)(x)
            elif level < len(c.multipliers) - 1:
                x = nn.avg_pool(x, (2, 2), strides=(2, 2))
        for index in range(c.blocks):
            x = Block(x.shape[-1], dtype, name=f"last_block_{index}")(x)
        return conv(c.code_width, "conv_out", 1)(nn.swish(norm("norm_out")(x)))


class Decoder(nn.Module):
    """Latents [B,h,w,E] -> images [B,H,W,3] float32."""

    config: GoogleVQGANConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        c, dtype = self.config, self.config.dtype
        x = conv(c.width * c.multipliers[-1], "conv_in", dtype=dtype)(x)
        for index in range(c.blocks):
            x = Block(x.shape[-1], dtype, name=f"first_block_{index}")(x)
        for level, multiplier in reversed(list(enumerate(c.multipliers))):
            for index in range(c.blocks):
                x = Block(c.width * multiplier, dtype, name=f"level_{level}_block_{index}")(x)
            if level:
                x = conv(x.shape[-1], f"level_{level}_up", dtype=dtype)(doubled(x))
        return conv(3, "conv_out")(nn.swish(norm("norm_out")(x)))


class Block(nn.Module):
    """Two normed convolutions without bias, z, on a residual stream: z + x.

    Where the number of channels changes the stream ends: the result is z + shortcut(z), not z + shortcut(x) as in
    other networks. The published weights were trained so.
    """

    features: int
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        z = conv(self.features, "conv1", bias=False, dtype=self.dtype)(nn.swish(norm("norm1")(x)))
        z = conv(self.features, "conv2", bias=False, dtype=self.dtype)(nn.swish(norm("norm2")(z)))
        if x.shape[-1] == self.features:
            return z + x
        return z + conv(self.features, "shortcut", 1, bias=False, dtype=self.dtype)(z)


def conv(
    features: int, name: str, size: int = 3, *, stride: int = 1, bias: bool = True, dtype: str = "float32"
) -> nn.Conv:
    """A convolution of `SAME` padding."""
    return nn.Conv(features, (size, size), strides=stride, use_bias=bias, dtype=jnp.dtype(dtype), name=name)
