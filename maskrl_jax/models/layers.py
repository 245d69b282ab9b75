"""Layers that several model families share."""

import flax.linen as nn
import jax
import jax.numpy as jnp

Array = jax.Array


def layer_norm(name: str, epsilon: float = 1e-6) -> nn.LayerNorm:
    """Layer norm that computes in float32 whatever the compute dtype (DESIGN, contracts: Model)."""
    return nn.LayerNorm(epsilon=epsilon, dtype=jnp.float32, name=name)


def neighbourhood(x_BHWD: Array) -> Array:
    """Stack every cell's 3x3 neighbourhood: [B,H,W,D] -> [B,H,W,9D], zeros outside the grid.

    A 3x3 convolution as a gather and a matmul: `lax.conv` inside a scanned loop runs on XLA's slow
    path on CPU (four times slower, measured).
    """
    height, width = x_BHWD.shape[1:3]
    padded = jnp.pad(x_BHWD, ((0, 0), (1, 1), (1, 1), (0, 0)))
    shifts = [padded[:, i : i + height, j : j + width] for i in range(3) for j in range(3)]
    return jnp.concatenate(shifts, axis=-1)


class Conv3(nn.Module):
    """3x3 convolution with zero padding on [B,H,W,C], as one matmul."""

    features: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x_BHWC: Array) -> Array:
        return nn.Dense(self.features, dtype=self.dtype, name="kernel")(neighbourhood(x_BHWC))


class Attention(nn.Module):
    """Bidirectional multi-head self-attention on [B,S,D]; softmax in float32."""

    heads: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x_BSD: Array) -> Array:
        batch, length, width = x_BSD.shape
        qkv = nn.Dense(3 * width, dtype=self.dtype, name="qkv")(_rows(x_BSD))
        query, key, value = jnp.split(qkv.reshape(batch, length, 3 * self.heads, -1), 3, axis=2)
        mixed = jax.nn.dot_product_attention(query, key, value)
        return nn.Dense(width, dtype=self.dtype, name="out")(_rows(mixed.reshape(x_BSD.shape))).reshape(x_BSD.shape)


class Block(nn.Module):
    """Pre-norm transformer block (MaskGIT form A): x += attention(norm x); x += mlp(norm x)."""

    heads: int
    mlp_width: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x_BSD: Array) -> Array:
        mixed = Attention(self.heads, self.dtype, name="attention")(layer_norm("norm_attention")(x_BSD))
        x_BSD = x_BSD + mixed
        hidden = nn.Dense(self.mlp_width, dtype=self.dtype, name="mlp_in")(_rows(layer_norm("norm_mlp")(x_BSD)))
        out = nn.Dense(x_BSD.shape[-1], dtype=self.dtype, name="mlp_out")(nn.gelu(hidden))
        return x_BSD + out.reshape(x_BSD.shape)


def _rows(x: Array) -> Array:
    """[..., D] -> [M, D]: the weight gradient of a matmul over two leading axes costs a transpose on CPU."""
    return x.reshape(-1, x.shape[-1])
