"""Convolutional encoder and decoder of latent image models (the layout of taming-transformers and LDM), [B,H,W,C].

specs/mar.md section 2. Group norm of 32 groups, swish, and attention over the cells of a level where asked.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

Array = jax.Array
GROUPS = 32


@dataclasses.dataclass(frozen=True)
class ConvSizes:
    """Channels `width` times each multiplier, finest level first; the decoder has one block a level more."""

    width: int = 128
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    blocks: int = 2  # of a level of the encoder
    encoder_attention: tuple[int, ...] = (4,)  # levels whose encoder blocks are each followed by attention
    decoder_attention: tuple[int, ...] = ()
    middle_attention: bool = True  # between the two blocks of the coarsest level
    groups: int = GROUPS  # of every norm
    dtype: str = "float32"  # of the convolutions; norms, softmax and the last layers are float32

    def __post_init__(self):
        for name in ("multipliers", "encoder_attention", "decoder_attention"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if min(self.width, self.blocks, self.groups, *self.multipliers) < 1:
            raise ValueError(f"width, blocks, groups and multipliers must be at least 1, not {self}")
        if any(self.width * multiplier % self.groups for multiplier in self.multipliers):
            raise ValueError(
                f"width {self.width} times a multiplier must be divisible by the {self.groups} groups of a norm"
            )
        levels = range(len(self.multipliers))
        if any(level not in levels for level in (*self.encoder_attention, *self.decoder_attention)):
            raise ValueError(f"attention at a level beyond 0..{levels[-1]}: {self}")

    @property
    def patch(self) -> int:
        """Pixels a side of a latent cell."""
        return 2 ** (len(self.multipliers) - 1)


def conv(features: int, size: int = 3, name: str | None = None, stride: int = 1, dtype: str = "float32") -> nn.Conv:
    """A convolution that keeps the grid; with a stride it takes no padding of its own."""
    padding = "SAME" if stride == 1 else "VALID"
    return nn.Conv(features, (size, size), strides=stride, padding=padding, dtype=jnp.dtype(dtype), name=name)


def norm(name: str | None = None, groups: int = GROUPS) -> nn.GroupNorm:
    return nn.GroupNorm(groups, epsilon=1e-6, dtype=jnp.float32, name=name)


def doubled(x: Array) -> Array:
    """Every cell of [B,H,W,C] four times: nearest-neighbour upsampling."""
    return x.repeat(2, axis=1).repeat(2, axis=2)


class ResBlock(nn.Module):
    """Two normed convolutions on a residual stream."""

    features: int
    sizes: ConvSizes

    @nn.compact
    def __call__(self, x: Array) -> Array:
        groups, dtype = self.sizes.groups, self.sizes.dtype
        y = conv(self.features, name="conv1", dtype=dtype)(nn.swish(norm("norm1", groups)(x)))
        y = conv(self.features, name="conv2", dtype=dtype)(nn.swish(norm("norm2", groups)(y)))
        if x.shape[-1] != self.features:
            x = conv(self.features, 1, name="shortcut", dtype=dtype)(x)
        return x + y


class CellAttention(nn.Module):
    """One head of attention among all cells of a grid."""

    sizes: ConvSizes

    @nn.compact
    def __call__(self, x: Array) -> Array:
        batch, height, width, channels = x.shape
        y = norm("norm", self.sizes.groups)(x)
        query, key, value = (
            conv(channels, 1, name=name, dtype=self.sizes.dtype)(y).reshape(batch, height * width, 1, channels)
            for name in ("query", "key", "value")
        )
        mixed = jax.nn.dot_product_attention(query, key, value)
        return x + conv(channels, 1, name="out", dtype=self.sizes.dtype)(mixed.reshape(x.shape))


class Middle(nn.Module):
    """Block, attention if there is one, block at the coarsest level."""

    sizes: ConvSizes

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = ResBlock(x.shape[-1], self.sizes, name="block_1")(x)
        if self.sizes.middle_attention:
            x = CellAttention(self.sizes, name="attention")(x)
        return ResBlock(x.shape[-1], self.sizes, name="block_2")(x)


class ConvEncoder(nn.Module):
    """Images [B,H,W,3] -> [B,h,w,out]."""

    sizes: ConvSizes
    out: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        s = self.sizes
        x = conv(s.width, name="conv_in", dtype=s.dtype)(x)
        for level, multiplier in enumerate(s.multipliers):
            for index in range(s.blocks):
                x = ResBlock(s.width * multiplier, s, name=f"level_{level}_block_{index}")(x)
                if level in s.encoder_attention:
                    x = CellAttention(s, name=f"level_{level}_attention_{index}")(x)
            if level < len(s.multipliers) - 1:
                padded = jnp.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0)))
                x = conv(x.shape[-1], name=f"level_{level}_down", stride=2, dtype=s.dtype)(padded)
        x = Middle(s, name="middle")(x)
        return conv(self.out, name="conv_out")(nn.swish(norm("norm_out", s.groups)(x)))


class ConvDecoder(nn.Module):
    """Latents [B,h,w,C] -> images [B,H,W,3]."""

    sizes: ConvSizes

    @nn.compact
    def __call__(self, x: Array) -> Array:
        s = self.sizes
        x = conv(s.width * s.multipliers[-1], name="conv_in", dtype=s.dtype)(x)
        x = Middle(s, name="middle")(x)
        for level, multiplier in reversed(list(enumerate(s.multipliers))):
            for index in range(s.blocks + 1):
                x = ResBlock(s.width * multiplier, s, name=f"level_{level}_block_{index}")(x)
                if level in s.decoder_attention:
                    x = CellAttention(s, name=f"level_{level}_attention_{index}")(x)
            if level:
                x = conv(x.shape[-1], name=f"level_{level}_up", dtype=s.dtype)(doubled(x))
        return conv(3, name="conv_out")(nn.swish(norm("norm_out", s.groups)(x)))
