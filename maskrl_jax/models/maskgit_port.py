"""MaskGIT's transformer as its PyTorch reproduction has it (form A), for published weights and at full size."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from maskrl_jax.models.layers import SIZES, Attention, check_sizes, layer_norm

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class PortConfig:
    """Static sizes. Rows of the one table: codes 0..K-1, MASK = K, class c = K+1+c, null class = K+1+C."""

    num_tokens: int = 1024  # N, a square number: 1024 at 512 pixels, 256 at 256
    codebook_size: int = 1024  # K
    num_classes: int = 1000  # C
    width: int = 768
    depth: int = 24
    heads: int = 16
    mlp_width: int = 3072
    remat: bool = False
    dtype: str = "float32"

    def __post_init__(self):
        check_sizes(self, SIZES)

    @property
    def mask_id(self) -> int:
        return self.codebook_size

    @property
    def null_class(self) -> int:
        """Row of the null class in the table, its last; as a condition the null class is the number C."""
        return self.codebook_size + 1 + self.num_classes

    @property
    def cond_length(self) -> int:
        return 1


class Stage(nn.Module):
    """What form A has before and after its blocks: norm, Linear, exact GELU, norm; no residual. Float32 result."""

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x_BSD: Array) -> Array:
        hidden = nn.Dense(x_BSD.shape[-1], dtype=self.dtype, name="dense")(layer_norm("norm_in", 1e-12)(x_BSD))
        return layer_norm("norm_out", 1e-12)(nn.gelu(hidden, approximate=False))


class PortBlock(nn.Module):
    """Pre-norm block: x += attention(norm x); x += mlp(norm x); exact GELU, epsilon 1e-5 in the norms."""

    heads: int
    mlp_width: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x_BSD: Array) -> Array:
        normed = layer_norm("norm_attention", 1e-5)(x_BSD)
        x_BSD = x_BSD + Attention(self.heads, self.dtype, name="attention")(normed)
        hidden = nn.Dense(self.mlp_width, dtype=self.dtype, name="mlp_in")(layer_norm("norm_mlp", 1e-5)(x_BSD))
        out = nn.Dense(x_BSD.shape[-1], dtype=self.dtype, name="mlp_out")(nn.gelu(hidden, approximate=False))
        return x_BSD + out


class MaskGITPort(nn.Module):
    """Form A of MaskGIT ("A PyTorch Reproduction of MaskGIT", arXiv 2310.14400): class token last, tied head.

    The norms, the softmax and the head compute in float32 whatever the compute dtype. An id or a class out of its
    range gives NaN, never another kind of token. No dropout (the reference trains with 0.1): our trainer uses none,
    and the published weights sample without it. Start: the table is normal(0, 1), the positions truncated normal
    0.02, the head's bias 0, and the Linear layers have Flax's default (the reference has PyTorch's).
    """

    config: PortConfig

    def setup(self):
        c = self.config
        dtype = jnp.dtype(c.dtype)
        vocab, length = c.null_class + 1, c.num_tokens + c.cond_length
        self.tokens = self.param("tokens", nn.initializers.normal(1.0), (vocab, c.width))
        self.position = self.param("position", nn.initializers.truncated_normal(0.02), (length, c.width))
        self.bias = self.param("bias", nn.initializers.zeros, (length, vocab))
        self.first = Stage(dtype)
        self.entry = nn.Dense(c.width, dtype=dtype)
        block = nn.remat(PortBlock) if c.remat else PortBlock
        self.blocks = [block(c.heads, c.mlp_width, dtype) for _ in range(c.depth)]
        self.last = Stage(dtype)

    def __call__(self, ids_BN: Array, cond: Array) -> Array:
        """Logits [B,N,K] float32 from ids [B,N] int32 (MASK = K) and classes [B] or [B,1] int32 (null = C)."""
        return self.logits(self.features(ids_BN, cond))

    def features(self, ids_BN: Array, cond: Array) -> Array:
        """Output of the last stage, [B,N+1,D] float32, class slot last. Arguments as in `__call__`."""
        c = self.config
        image = self._embedded(ids_BN, 0, c.mask_id)
        condition = self._embedded(cond.reshape(-1, c.cond_length) + c.mask_id + 1, c.mask_id + 1, c.null_class)
        x_BSD = jnp.concatenate([image, condition], axis=1) + self.position[None]
        x_BSD = self.entry(self.first(x_BSD))
        for block in self.blocks:
            x_BSD = block(x_BSD)
        return self.last(x_BSD)

    def logits(self, features: Array) -> Array:
        """Tied head on features [..., N or N+1, D] -> [..., N, K] float32: image positions and image codes only."""
        c = self.config
        if features.shape[-2] not in (c.num_tokens, c.num_tokens + c.cond_length):
            raise ValueError(f"features of {features.shape[-2]} positions; the model has {c.num_tokens} and the class")
        image = features[..., : c.num_tokens, :].astype(jnp.float32)
        scores = jnp.einsum("...nd,kd->...nk", image, self.tokens[: c.codebook_size])
        return scores + jnp.broadcast_to(self.bias[: c.num_tokens, : c.codebook_size], scores.shape)

    def logits_at(self, rows: Array, places: Array) -> Array:
        """The head on single rows [..., D] of image tokens at places int32 [...] -> [..., K] float32."""
        scores = jnp.einsum("...d,kd->...k", rows.astype(jnp.float32), self.tokens[: self.config.codebook_size])
        return scores + self.bias[places, : self.config.codebook_size]

    def controls(self, ids_Bn: Array, positions_Bn: Array) -> Array:
        """Embedding plus position of some image tokens, [B,n,D] float32: what the model sees of them."""
        return self._embedded(ids_Bn, 0, self.config.mask_id) + jnp.take(self.position, positions_Bn, axis=0)

    def _embedded(self, rows: Array, first: int, last: int) -> Array:
        """Rows of the table, NaN where one lies outside first..last."""
        inside = (rows >= first) & (rows <= last)
        return jnp.take(self.tokens, jnp.where(inside, rows, len(self.tokens)), axis=0, mode="fill")
