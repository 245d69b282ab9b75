"""The transformer of Halton-MaskGIT (arXiv 2503.17076): class-conditional blocks with adaptive norms, for its weights.

Axes: B batch, N image tokens, R registers, S = N + R, D width, K codes.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from maskrl_jax.models.layers import SIZES, check_sizes, stack

Array = jax.Array
EPSILON = 1e-5  # of every norm
START = nn.initializers.normal(0.02)


@dataclasses.dataclass(frozen=True)
class HaltonConfig:
    """Static sizes. Rows of the tokens' table: codes 0..K-1, MASK = K; of the classes': 0..C-1, null = C."""

    num_tokens: int = 256  # N, a square number
    codebook_size: int = 16384  # K
    num_classes: int = 1000  # C
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_width: int = 3072  # nominal: the gated MLP has `hidden`
    registers: int = 1  # R, tokens without a place after the image's
    remat: bool = False
    dtype: str = "float32"

    def __post_init__(self):
        check_sizes(self, SIZES)
        if self.registers < 0:
            raise ValueError(f"registers {self.registers} must be at least 0")

    @property
    def mask_id(self) -> int:
        return self.codebook_size

    @property
    def hidden(self) -> int:
        """Width of the gated MLP: two thirds of the nominal one, rounded up to a multiple of 256."""
        return -(-int(2 * self.mlp_width / 3) // 256) * 256


def rms_norm(name: str | None = None, **options) -> nn.RMSNorm:
    """Root-mean-square norm that computes in float32 whatever the compute dtype."""
    return nn.RMSNorm(epsilon=EPSILON, dtype=jnp.float32, name=name, **options)


class HaltonBlock(nn.Module):
    """Attention and gated MLP without biases, each with shift, scale and gate from the class; a step of `nn.scan`.

    Queries and keys are normalised over their whole width, before they are split into heads.
    """

    config: HaltonConfig

    @nn.compact
    def __call__(self, x_BSD: Array, class_BD: Array) -> tuple[Array, None]:
        c, dtype = self.config, jnp.dtype(self.config.dtype)

        def linear(x, features, name):
            return nn.Dense(features, use_bias=False, dtype=dtype, kernel_init=START, name=name)(x)

        def heads(x):
            return x.reshape(*x.shape[:-1], c.heads, -1).astype(dtype)

        said = nn.Dense(6 * c.width, kernel_init=nn.initializers.zeros, name="modulation")(class_BD)
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(said[:, None], 6, axis=-1)
        y = rms_norm("norm_attention")(x_BSD) * (1 + scale1) + shift1
        query, key = (rms_norm(use_scale=False)(linear(y, c.width, name)) for name in ("query", "key"))
        mixed = jax.nn.dot_product_attention(heads(query), heads(key), heads(linear(y, c.width, "value")))
        x_BSD = x_BSD + gate1 * linear(mixed.reshape(x_BSD.shape), c.width, "out")
        y = rms_norm("norm_mlp")(x_BSD) * (1 + scale2) + shift2
        hidden = nn.silu(linear(y, c.hidden, "mlp_gate")) * linear(y, c.hidden, "mlp_up")
        return x_BSD + gate2 * linear(hidden, c.width, "mlp_out"), None


class HaltonMaskGIT(nn.Module):
    """Image tokens with places, registers after them, and the class in the norms of every block; tied head with a bias.

    The residual stream, the norms, what the class says, the softmax and the head are float32 whatever the compute
    dtype. An id or a class out of its range gives NaN. Start, our choice: what the class says is 0, so that blocks
    start as identities.
    """

    config: HaltonConfig

    def setup(self):
        c = self.config
        self.tokens = self.param("tokens", START, (c.codebook_size + 1, c.width))
        self.classes = self.param("classes", START, (c.num_classes + 1, c.width))
        self.position = self.param("position", START, (c.num_tokens, c.width))
        if c.registers:
            self.registers = self.param("registers", START, (c.registers, c.width))
        self.blocks = stack(HaltonBlock, c.depth, remat=c.remat, in_axes=nn.broadcast)(c)
        self.modulation = nn.Dense(2 * c.width, kernel_init=nn.initializers.zeros)
        self.norm_scale = self.param("norm_scale", nn.initializers.ones, (c.width,))
        self.norm_bias = self.param("norm_bias", nn.initializers.zeros, (c.width,))
        self.norm = rms_norm(use_scale=False)
        self.bias = self.param("bias", nn.initializers.zeros, (c.codebook_size + 1,))

    def __call__(self, ids_BN: Array, cond: Array) -> Array:
        """Logits [B,N,K] float32 from ids [B,N] int32 (MASK = K) and classes [B] or [B,1] int32 (null = C)."""
        return self.logits(self.features(ids_BN, cond))

    def features(self, ids_BN: Array, cond: Array) -> Array:
        """Output of the last norm at the image tokens, [B,N,D] float32. Arguments as in `__call__`."""
        c = self.config
        x_BSD = _rows(self.tokens, ids_BN) + self.position[None]
        if c.registers:
            more = jnp.broadcast_to(self.registers[None], (len(ids_BN), c.registers, c.width))
            x_BSD = jnp.concatenate([x_BSD, more], axis=1)
        class_BD = nn.silu(_rows(self.classes, cond.reshape(-1)))
        x_BSD, _ = self.blocks(x_BSD, class_BD)
        shift, scale = jnp.split(self.modulation(class_BD)[:, None], 2, axis=-1)
        normed = self.norm(x_BSD[:, : c.num_tokens]) * self.norm_scale[None, None] + self.norm_bias[None, None]
        return normed * (1 + scale) + shift

    def logits(self, features: Array) -> Array:
        """Tied head on features [..., D] -> [..., K] float32: image codes only."""
        return self._scores(features, self.config.codebook_size)

    def entries(self, features: Array) -> Array:
        """Scores of the codes and of MASK, [..., K+1] float32, as the published head gives them (and samples)."""
        return self._scores(features, self.config.codebook_size + 1)

    def controls(self, ids_Bn: Array, positions_Bn: Array) -> Array:
        """Embedding plus position of some image tokens, [B,n,D] float32: what the model sees of them."""
        return _rows(self.tokens, ids_Bn) + jnp.take(self.position, positions_Bn, axis=0)

    def _scores(self, features: Array, rows: int) -> Array:
        scores = jnp.einsum("...d,kd->...k", features.astype(jnp.float32), self.tokens[:rows])
        return scores + jnp.broadcast_to(self.bias[:rows], scores.shape)


def _rows(table: Array, index: Array) -> Array:
    """Rows of a table, NaN where there is none."""
    return jnp.take(table, jnp.where(index < 0, len(table), index), axis=0, mode="fill")
