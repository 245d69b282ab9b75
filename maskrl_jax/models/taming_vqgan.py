"""The VQGAN of taming-transformers (arXiv 2012.09841), tokenizer of MaskGIT's PyTorch reproduction.

specs/maskgit.md section 2, form A. Axes: B batch, h, w cells of the grid, which need not be square, E width of a code.
"""

import dataclasses

import flax.linen as nn
import jax

from maskrl_jax.models.conv_autoencoder import ConvDecoder, ConvEncoder, ConvSizes, conv
from maskrl_jax.models.quantiser import check_pixels, latent_losses, look_up, straight_through
from maskrl_jax.models.vqgan import nearest_code

Array = jax.Array
PUBLISHED = ConvSizes(decoder_attention=(4,))


@dataclasses.dataclass(frozen=True)
class TamingVQGANConfig:
    """Static sizes; the defaults are those of `vqgan_imagenet_f16_1024`."""

    conv: ConvSizes = PUBLISHED
    channels: int = 256  # of the convolutional latent
    codebook_size: int = 1024  # K
    code_width: int = 256  # E

    def __post_init__(self):
        for name in ("channels", "codebook_size", "code_width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} must be at least 1")

    @property
    def patch(self) -> int:
        """Pixels a side of a cell."""
        return self.conv.patch


class TamingVQGAN(nn.Module):
    """Images to codes and back; images are in [0,1] outside and in [-1,1] inside."""

    config: TamingVQGANConfig

    def setup(self):
        c = self.config
        self.encoder, self.decoder = ConvEncoder(c.conv, c.channels), ConvDecoder(c.conv)
        self.quant, self.post_quant = conv(c.code_width, 1), conv(c.channels, 1)
        start = lambda key, shape: jax.random.uniform(key, shape, minval=-1, maxval=1) / c.codebook_size  # noqa: E731
        self.codebook = self.param("codebook", start, (c.codebook_size, c.code_width))

    def latents(self, images_BHWC: Array) -> Array:
        """What is quantised, float32 [B,h,w,E], of images [B,H,W,3] in [0,1]; H and W are multiples of the patch."""
        check_pixels(images_BHWC, self.config.patch)
        return self.quant(self.encoder(images_BHWC * 2 - 1))

    def encode(self, images_BHWC: Array) -> Array:
        """Codes int32 [B,h,w] of images [B,H,W,3] float32 in [0,1]: the nearest by squared distance."""
        return nearest_code(self.latents(images_BHWC), self.codebook)

    def decode(self, ids_Bhw: Array) -> Array:
        """Images [B,H,W,3] float32, nominally in [0,1] and not clipped, of codes [B,h,w]; NaN for ids that are none."""
        return self._decoded(look_up(self.codebook, ids_Bhw))

    def _decoded(self, latents_BhwE: Array) -> Array:
        return (self.decoder(self.post_quant(latents_BhwE)) + 1) / 2

    def __call__(self, images_BHWC: Array) -> tuple[Array, Array, Array]:
        """Return (reconstruction through a straight-through quantiser, latents [B,h,w,E], codes [B,h,w])."""
        latents = self.latents(images_BHWC)
        ids = nearest_code(latents, self.codebook)
        return self._decoded(straight_through(latents, self.codebook[ids])), latents, ids


def vq_loss(latents: Array, quantised: Array, beta: float = 0.25) -> Array:
    """Loss of the quantiser [], of latents and their codes [..., E]: mse(sg[q], z) + beta mse(q, sg[z]).

    The published weights were trained with beta on the codes' term, not on the commitment's (the legacy placement).
    """
    to_latents, to_codes = latent_losses(latents, quantised)
    return to_latents + beta * to_codes
