"""VQ tokenizer of the embedded task: patch-local encoder, EMA codebook, small convolutional decoder."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from maskrl_jax.models.layers import Conv3

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """Static sizes of the tokenizer. The grid is (image_size / patch) squared."""

    image_size: int = 32
    patch: int = 4
    codebook_size: int = 96
    code_width: int = 16
    hidden: int = 128
    decoder_width: int = 64

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if getattr(self, field.name) < 1:
                raise ValueError(f"{field.name} {getattr(self, field.name)} must be at least 1")
        if self.image_size % self.patch:
            raise ValueError(f"image_size {self.image_size} is not divisible by patch {self.patch}")

    @property
    def side(self) -> int:
        return self.image_size // self.patch

    @property
    def num_tokens(self) -> int:
        return self.side**2


def to_patches(images_BHWC: Array, patch: int) -> Array:
    """[B,H,W,C] -> [B,H/p,W/p,p*p*C]."""
    batch, height, width, channels = images_BHWC.shape
    x = images_BHWC.reshape(batch, height // patch, patch, width // patch, patch, channels)
    return x.swapaxes(2, 3).reshape(batch, height // patch, width // patch, -1)


def from_patches(patches_BSSE: Array, patch: int) -> Array:
    """Inverse of `to_patches`."""
    batch, rows, cols, size = patches_BSSE.shape
    x = patches_BSSE.reshape(batch, rows, cols, patch, patch, size // patch**2).swapaxes(2, 3)
    return x.reshape(batch, rows * patch, cols * patch, -1)


class Tokenizer(nn.Module):
    """Encoder and decoder around a codebook that the task keeps (EMA statistics are not gradients).

    The encoder sees only its own patch: one that sees further puts its neighbours' noise into the
    tokens, and the generator above it stays at zero accuracy (measured).
    """

    config: TokenizerConfig

    def setup(self):
        c = self.config
        self.encoder_in = nn.Dense(c.hidden)
        self.encoder_out = nn.Dense(c.code_width)
        self.decoder_in = Conv3(c.decoder_width)
        self.decoder_mid = Conv3(c.decoder_width)
        self.decoder_out = nn.Dense(c.patch**2 * 3)

    def encode(self, images_BHWC: Array) -> Array:
        """Continuous codes [B,S,S,E] of images [B,H,W,3] float32 in [0,1]."""
        patches = to_patches(images_BHWC * 2 - 1, self.config.patch)
        return self.encoder_out(nn.gelu(self.encoder_in(patches)))

    def decode(self, codes_BSSE: Array) -> Array:
        """Images [B,H,W,3] float32, nominally in [0,1] and not clipped, of codes [B,S,S,E]."""
        x = nn.gelu(self.decoder_in(codes_BSSE))
        x = x + nn.gelu(self.decoder_mid(x))
        return from_patches((self.decoder_out(x) + 1) / 2, self.config.patch)

    def __call__(self, images_BHWC: Array, codebook_KE: Array) -> tuple[Array, Array, Array]:
        """Return (reconstruction through a straight-through quantiser, codes, ids [B,S,S])."""
        codes = self.encode(images_BHWC)
        ids = nearest_code(codes, codebook_KE)
        quantised = codes + jax.lax.stop_gradient(codebook_KE[ids] - codes)
        return self.decode(quantised), codes, ids


def nearest_code(codes: Array, codebook_KE: Array) -> Array:
    """Index of the nearest code by squared distance: [..., E] -> [...] int32.

    In float32 on every device: where a matmul rounds its inputs, the index of a near tie would change.
    """
    codes_ME = codes.reshape(-1, codes.shape[-1])
    products_MK = jnp.matmul(2 * codes_ME, codebook_KE.T, precision=jax.lax.Precision.HIGHEST)
    distance_MK = (codebook_KE**2).sum(-1)[None] - products_MK
    return jnp.argmin(distance_MK, axis=-1).astype(jnp.int32).reshape(codes.shape[:-1])
