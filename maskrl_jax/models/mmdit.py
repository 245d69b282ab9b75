"""Blocks of MM-DiT (arXiv 2403.03206) in the form of FLUX: text and image tokens in one attention, modulated norms.

specs/meissonic.md section 2, steps 6 to 8. Residual streams, norms, rotations and softmax are float32. Axes: B batch,
S = text + image tokens, D width, H heads, C width of a head.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from maskrl_jax.models import layers

Array = jax.Array
EPSILON = 1e-6
THETA = 1e4


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """Static sizes of a block."""

    heads: int
    head_width: int
    remat: bool
    dtype: str  # of the matmuls

    @property
    def width(self) -> int:
        return self.heads * self.head_width


class DualBlock(nn.Module):
    """Text and image each with weights of its own around one attention over both; a step of `nn.scan`."""

    sizes: BlockSizes

    @nn.compact
    def __call__(self, streams: tuple[Array, Array], condition_BD: Array, turns: tuple) -> tuple[tuple, None]:
        parts = [Stream(self.sizes, name=name) for name in ("text", "image")]
        changes = [part.changes(condition_BD) for part in parts]
        heads = [part.heads(x, change) for part, x, change in zip(parts, streams, changes, strict=True)]
        query, key, value = (jnp.concatenate(both, axis=1) for both in zip(*heads, strict=True))
        mixed = jnp.split(attended(query, key, value, turns), [streams[0].shape[1]], axis=1)
        rows = zip(parts, streams, mixed, changes, strict=True)
        return tuple(part.update(x, y, change) for part, x, y, change in rows), None


class Stream(nn.Module):
    """One stream of a two-stream block: x += gate a(x); x += gate' mlp(x), each behind a modulated norm."""

    sizes: BlockSizes

    def setup(self):
        s = self.sizes
        self.modulation, self.qkv = modulation(s, 6), Heads(s)
        self.out = linear(s, s.width)
        self.mlp_in, self.mlp_out = linear(s, 4 * s.width), linear(s, s.width)

    def changes(self, condition_BD: Array) -> list[Array]:
        """Shift, scale and gate of the attention, then of the MLP, [B,1,D] each."""
        return parted(self.modulation(nn.silu(condition_BD)), 6)

    def heads(self, x: Array, change: list[Array]) -> tuple[Array, Array, Array]:
        return self.qkv(modulated(x, *change[:2]))

    def update(self, x: Array, mixed: Array, change: list[Array]) -> Array:
        _, _, gate, shift, scale, mlp_gate = change
        x = x + gate * self.out(mixed)
        return x + mlp_gate * self.mlp_out(nn.gelu(self.mlp_in(modulated(x, shift, scale))))


class SingleBlock(nn.Module):
    """Attention and MLP side by side behind one modulated norm, [B,S,D]; a step of `nn.scan`."""

    sizes: BlockSizes

    @nn.compact
    def __call__(self, x: Array, condition_BD: Array, turns: tuple) -> tuple[Array, None]:
        s = self.sizes
        shift, scale, gate = parted(modulation(s, 3, "modulation")(nn.silu(condition_BD)), 3)
        normed = modulated(x, shift, scale)
        mixed = attended(*Heads(s, name="qkv")(normed), turns)
        hidden = nn.gelu(linear(s, 4 * s.width, "mlp_in")(normed))
        return x + gate * linear(s, s.width, "out")(jnp.concatenate([mixed, hidden], axis=-1)), None


class Heads(nn.Module):
    """Queries, keys and values [B,S,H,C]; those that meet in products are normed within each head."""

    sizes: BlockSizes

    @nn.compact
    def __call__(self, x_BSD: Array) -> tuple[Array, Array, Array]:
        s = self.sizes
        qkv = linear(s, 3 * s.width, "linear")(x_BSD).reshape(*x_BSD.shape[:2], 3 * s.heads, s.head_width)
        query, key, value = jnp.split(qkv, 3, axis=2)
        return norm("query_norm")(query), norm("key_norm")(key), value


def attended(query: Array, key: Array, value: Array, turns: tuple[Array, Array]) -> Array:
    """Attention of all tokens to all, [B,S,D], in the type of the values; no key is masked, as published."""
    query, key = (rotated(x, turns).astype(value.dtype) for x in (query, key))
    return jax.nn.dot_product_attention(query, key, value).reshape(*value.shape[:2], -1)


def rotations(axes: tuple[int, int, int], grid: tuple[int, int], text_length: int) -> tuple[Array, Array]:
    """Cosine and sine of every pair's angle, float32 [S,C/2], by image (always 0), row and column.

    `axes` are the entries of a head that each of them turns. Text stands at the origin and is not turned.
    """
    rows, columns = np.indices(grid).reshape(2, -1)
    places = np.pad(np.stack([0 * rows, rows, columns]), ((0, 0), (text_length, 0)))
    pairs = zip(places, axes, strict=True)
    # float64 until the tables are made, as published.
    angles = np.concatenate([np.outer(place, THETA ** (-np.arange(0, w, 2) / w)) for place, w in pairs], axis=-1)
    return jnp.asarray(np.cos(angles), jnp.float32), jnp.asarray(np.sin(angles), jnp.float32)


def rotated(x_BSHC: Array, turns: tuple[Array, Array]) -> Array:
    """Turn the neighbours (x_2i, x_2i+1) by their angle, in float32."""
    cos, sin = (x[None, :, None] for x in turns)
    pairs = x_BSHC.astype(jnp.float32).reshape(*x_BSHC.shape[:-1], -1, 2)
    first, second = pairs[..., 0], pairs[..., 1]
    return jnp.stack([first * cos - second * sin, first * sin + second * cos], axis=-1).reshape(x_BSHC.shape)


def modulated(x: Array, shift: Array, scale: Array) -> Array:
    """Layer norm without parameters of its own, scaled by 1 + scale and shifted; float32."""
    x = x - x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + EPSILON) * (1 + scale) + shift


def parted(x_BD: Array, parts: int) -> list[Array]:
    """Equal parts of a modulation, float32 [B,1,D] each."""
    return jnp.split(x_BD.astype(jnp.float32)[:, None], parts, axis=-1)


def stack(block: type[nn.Module], sizes: BlockSizes, length: int) -> nn.Module:
    """Blocks in a loop."""
    return layers.stack(block, length, remat=sizes.remat, in_axes=nn.broadcast)(sizes)


def norm(name: str | None = None) -> nn.RMSNorm:
    return nn.RMSNorm(EPSILON, jnp.float32, name=name)


def linear(sizes: BlockSizes, features: int, name: str | None = None, use_bias: bool = True) -> nn.Dense:
    init = nn.initializers.normal(0.02)
    return nn.Dense(features, use_bias=use_bias, dtype=jnp.dtype(sizes.dtype), kernel_init=init, name=name)


def modulation(sizes: BlockSizes, parts: int, name: str | None = None) -> nn.Dense:
    zeros = nn.initializers.zeros
    return nn.Dense(parts * sizes.width, dtype=jnp.dtype(sizes.dtype), kernel_init=zeros, name=name)
