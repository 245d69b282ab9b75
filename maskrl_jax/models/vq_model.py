"""VQ tokenizer of Meissonic and aMUSEd: images to a grid of codes and back (specs/meissonic.md section 3).

Images are in [0,1] inside too. Axes: B batch, N cells in raster order, K codes, E width of a code.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from maskrl_jax.models.conv_autoencoder import ConvDecoder, ConvEncoder, ConvSizes, conv
from maskrl_jax.models.vqgan import nearest_code

Array = jax.Array
PUBLISHED = ConvSizes(128, (1, 2, 2, 4, 6), encoder_attention=(), middle_attention=False)


@dataclasses.dataclass(frozen=True)
class VQModelConfig:
    """Static sizes; the defaults are the published ones."""

    conv: ConvSizes = PUBLISHED
    channels: int = 64  # what the encoder gives and the decoder takes
    code_width: int = 64  # E
    codebook_size: int = 8192  # K

    def __post_init__(self):
        for name in ("channels", "code_width", "codebook_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} must be at least 1")

    @property
    def patch(self) -> int:
        """Pixels a side of a cell."""
        return self.conv.patch


class VQModel(nn.Module):
    """Convolutional encoder and decoder around a codebook; float32. Published weights only: it has no training."""

    config: VQModelConfig

    def setup(self):
        c = self.config
        self.encoder, self.decoder = ConvEncoder(c.conv, c.channels), ConvDecoder(c.conv)
        self.quant, self.post_quant = conv(c.code_width, 1), conv(c.channels, 1)
        scale = nn.initializers.uniform(2 / c.codebook_size)
        self.codebook = self.param("codebook", scale, (c.codebook_size, c.code_width))

    def __call__(self, images_BHWC: Array) -> Array:
        """Images rebuilt from their codes."""
        return self.decode(self.encode(images_BHWC))

    def latents(self, images_BHWC: Array) -> Array:
        """What is quantised, [B,h,w,E] float32, of images [B,H,W,3] float32 in [0,1]."""
        sides, patch = images_BHWC.shape[1:3], self.config.patch
        if any(side % patch for side in sides):
            raise ValueError(f"image of {sides[0]} x {sides[1]} pixels is not divisible into cells of {patch}")
        return self.quant(self.encoder(images_BHWC))

    def encode(self, images_BHWC: Array) -> Array:
        """Nearest codes, int32 [B,h,w], of images [B,H,W,3] float32 in [0,1]."""
        return nearest_code(self.latents(images_BHWC), self.codebook)

    def decode(self, ids_Bhw: Array) -> Array:
        """Images [B,H,W,3] float32, nominally in [0,1] and not clipped, of codes int32 [B,h,w]; NaN where none is.

        A whole image sees a cell of NaN: the norms pool over the grid. At 1024 pixels one map of the last level takes
        0.5 GB an image, so decode in small batches.
        """
        known = (ids_Bhw >= 0) & (ids_Bhw < self.config.codebook_size)
        rows = jnp.where(known, ids_Bhw, self.config.codebook_size)
        return self.decoder(self.post_quant(jnp.take(self.codebook, rows, axis=0, mode="fill")))
