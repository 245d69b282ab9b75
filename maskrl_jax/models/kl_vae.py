"""Continuous tokenizers: images to a grid of Gaussian latents and back (specs/mar.md section 2).

Axes: B batch, L tokens in raster order, C channels of a latent.
"""

import dataclasses
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from maskrl_jax.models.conv_autoencoder import ConvDecoder, ConvEncoder, ConvSizes, conv
from maskrl_jax.models.layers import Conv3
from maskrl_jax.models.vqgan import from_patches, to_patches

Array = jax.Array
LOG_VARIANCE = (-30.0, 20.0)


class Moments(NamedTuple):
    """Posterior of every token, float32 [B,L,C]."""

    mean: Array
    log_variance: Array

    def sample(self, noise: Array) -> Array:
        """A draw, from normal noise [B,L,C]."""
        return self.mean + jnp.exp(0.5 * self.log_variance) * noise

    def divergence(self) -> Array:
        """KL from the unit normal, nats, summed over tokens and channels: [B]."""
        terms = jnp.square(self.mean) + jnp.exp(self.log_variance) - 1 - self.log_variance
        return 0.5 * terms.sum((1, 2))


@dataclasses.dataclass(frozen=True)
class KLVAEConfig:
    """Static sizes.

    form: `patch`: the encoder sees its own patch alone, with a small decoder (ours, for the embedded task);
      `conv`: KL-16's network, from `conv`; its patch follows from the levels.
    """

    form: str = "patch"
    image_size: int = 32
    patch: int = 4
    channels: int = 4  # C
    hidden: int = 128
    decoder_width: int = 64
    conv: ConvSizes | None = None

    def __post_init__(self):
        if self.form not in ("patch", "conv"):
            raise ValueError(f"form {self.form!r} is not one of patch, conv")
        if (self.form == "conv") != (self.conv is not None):
            raise ValueError("form conv, and it alone, has sizes `conv`")
        for name in ("image_size", "patch", "channels", "hidden", "decoder_width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} must be at least 1")
        if self.conv is not None and self.patch != self.conv.patch:
            raise ValueError(f"patch {self.patch} is not the {self.conv.patch} of {len(self.conv.multipliers)} levels")
        if self.image_size % self.patch:
            raise ValueError(f"image_size {self.image_size} is not divisible by patch {self.patch}")

    @property
    def side(self) -> int:
        return self.image_size // self.patch

    @property
    def num_tokens(self) -> int:
        return self.side**2


class KLVAE(nn.Module):
    """Encoder to moments and decoder from latents; images are in [0,1] outside and in [-1,1] inside."""

    config: KLVAEConfig

    def setup(self):
        c = self.config
        if c.form == "conv":
            self.encoder, self.decoder = ConvEncoder(c.conv, 2 * c.channels), ConvDecoder(c.conv)
            self.quant, self.post_quant = conv(2 * c.channels, 1), conv(c.channels, 1)
        else:
            self.encoder_in, self.encoder_out = nn.Dense(c.hidden), nn.Dense(2 * c.channels)
            self.decoder_in, self.decoder_mid = Conv3(c.decoder_width), Conv3(c.decoder_width)
            self.decoder_out = nn.Dense(c.patch**2 * 3)

    def encode(self, images_BHWC: Array) -> Moments:
        """Posterior of images [B,H,W,3] float32 in [0,1]."""
        c = self.config
        x = images_BHWC * 2 - 1
        if c.form == "conv":
            x = self.quant(self.encoder(x))
        else:
            x = self.encoder_out(nn.gelu(self.encoder_in(to_patches(x, c.patch))))
        mean, log_variance = jnp.split(x.reshape(len(x), -1, 2 * c.channels), 2, axis=-1)
        return Moments(mean, jnp.clip(log_variance, *LOG_VARIANCE))

    def decode(self, latents_BLC: Array) -> Array:
        """Images [B,H,W,3] float32, nominally in [0,1] and not clipped, of latents [B,L,C]."""
        c = self.config
        x = latents_BLC.reshape(-1, c.side, c.side, c.channels)
        if c.form == "conv":
            return (self.decoder(self.post_quant(x)) + 1) / 2
        x = nn.gelu(self.decoder_in(x))
        x = x + nn.gelu(self.decoder_mid(x))
        return from_patches((self.decoder_out(x) + 1) / 2, c.patch)

    def __call__(self, images_BHWC: Array, noise_BLC: Array) -> tuple[Array, Moments]:
        """Reconstruction of a draw from the posterior, and the posterior."""
        moments = self.encode(images_BHWC)
        return self.decode(moments.sample(noise_BLC)), moments
