"""Lumina-DiMOO's backbone (arXiv 2510.06308): a bidirectional Llama of whole sequences, text and image tokens alike.

specs/lumina_dimoo.md sections 1 and 6. Axes: B batch, L positions of the sequence, n some of them, D width, H heads,
G key and value heads, C head width, V rows of the vocabulary, K image codes.
"""

import dataclasses

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from maskrl_jax.models.layers import stack

Array = jax.Array
SIZES = ("vocab_size", "codebook_size", "width", "depth", "heads", "kv_heads", "mlp_width", "unroll")


@dataclasses.dataclass(frozen=True)
class DimooConfig:
    """Static sizes; the defaults are the published model's, of 8.08 billion parameters."""

    vocab_size: int = 134_548  # V
    codebook_size: int = 8192  # K; the image codes are the last rows of the table and of the head
    width: int = 4096
    depth: int = 32
    heads: int = 32
    kv_heads: int = 32
    mlp_width: int = 12288
    rope_theta: float = 5e5
    rms_eps: float = 1e-5
    remat: bool = False
    unroll: int = 1  # blocks that one turn of the loop over blocks holds
    dtype: str = "float32"  # of the blocks and the feature; norms, softmax and head are float32

    def __post_init__(self):
        for name in SIZES:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} must be at least 1")
        if self.codebook_size > self.vocab_size:
            raise ValueError(f"codebook_size {self.codebook_size} exceeds the vocab_size {self.vocab_size}")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not divisible by heads {self.heads}")
        if self.head_width % 2:
            raise ValueError(f"head width {self.head_width} is odd: no pairs to rotate")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads {self.heads} is not divisible by kv_heads {self.kv_heads}")

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    @property
    def code_offset(self) -> int:
        """Token id of image code 0."""
        return self.vocab_size - self.codebook_size


class Cache(flax.struct.PyTreeNode):
    """What a pass leaves for a cheaper one: keys and values of every layer, and the logits of every position.

    Keys are rotated: a position never moves, and so bfloat16 rounds them as in a pass without the cache.
    """

    keys: Array  # [layers, B, L, G, C] of the compute dtype
    values: Array  # like the keys
    logits: Array  # [B, L, K] float32, of the image codes alone


class Dimoo(nn.Module):
    """The network over token ids; parameters of the blocks have a leading axis of layers.

    Every method takes `positions_BL` int32, the place of every token in its own sequence (None: 0..L-1), and
    `real_BL` bool, False where a position is padding that no token may see (None: there is none). The published code
    ignores its padding mask; left-padded rows equal unpadded ones here. An id out of 0..V-1 gives NaN. Start: normal
    of std 1/sqrt(fan_in) cut at 3 std, what a block adds to the stream divided by sqrt(2 (layer + 1)).
    """

    config: DimooConfig

    def setup(self):
        c = self.config
        table = nn.initializers.truncated_normal(c.width**-0.5, lower=-3, upper=3)
        self.tokens = self.param("tokens", table, (c.vocab_size, c.width))
        self.head = self.param("head", table, (c.vocab_size, c.width))
        self.norm_out = nn.RMSNorm(c.rms_eps, jnp.float32)
        axes = (0, *[nn.broadcast] * 4)
        self.blocks = stack(Block, c.depth, remat=c.remat, static=(6,), in_axes=axes, unroll=c.unroll)(c)

    def __call__(self, ids_BL: Array, positions_BL: Array | None = None, real_BL: Array | None = None) -> Array:
        """Logits [B,L,V] float32 of the whole vocabulary from ids int32 [B,L]."""
        return _scores(self.features(ids_BL, positions_BL, real_BL), self.head)

    def features(self, ids_BL: Array, positions_BL: Array | None = None, real_BL: Array | None = None) -> Array:
        """Output of the last norm [B,L,D] in the compute dtype: what the shortcut predicts."""
        return self._pass(ids_BL, positions_BL, real_BL, None, None, False)[0]

    def logits(self, features: Array) -> Array:
        """Head on features [...,D] -> [...,K] float32, its rows of image codes alone."""
        return _scores(features, self.head[self.config.code_offset :])

    def embedded(self, ids: Array) -> Array:
        """Word embeddings [...,D] in the compute dtype."""
        inside = (ids >= 0) & (ids < len(self.tokens))
        rows = jnp.take(self.tokens, jnp.where(inside, ids, len(self.tokens)), axis=0, mode="fill")
        return rows.astype(self.config.dtype)

    def cached(self, ids_BL: Array, positions_BL: Array | None = None, real_BL: Array | None = None) -> Cache:
        """A full pass that keeps what `recomputed` needs."""
        features_BLD, (keys, values) = self._pass(ids_BL, positions_BL, real_BL, None, None, True)
        return Cache(keys, values, self.logits(features_BLD))

    def recomputed(
        self,
        ids_BL: Array,
        cache: Cache,
        places_Bn: Array,
        positions_BL: Array | None = None,
        real_BL: Array | None = None,
    ) -> Cache:
        """A pass of some positions alone: they see the kept keys and values of all others, and replace their own.

        Args:
          places_Bn: int32 indices into the sequence, each at most once a row; L stands for none.
        """
        features_BnD, (keys, values) = self._pass(ids_BL, positions_BL, real_BL, places_Bn, cache, True)
        return Cache(keys, values, _replaced(cache.logits, places_Bn, self.logits(features_BnD)))

    def _pass(self, ids_BL, positions_BL, real_BL, places_Bn, cache, keep):
        """Features of the positions at `places_Bn` or of all, and keys and values of all if asked to keep them."""
        c = self.config
        if positions_BL is None:
            positions_BL = jnp.broadcast_to(jnp.arange(ids_BL.shape[1])[None], ids_BL.shape)
        if places_Bn is not None:
            ids_BL, positions_BL = (
                jnp.take_along_axis(x, places_Bn, axis=1, mode="clip") for x in (ids_BL, positions_BL)
            )
        angles_BLc = rotary_angles(positions_BL, c.head_width, c.rope_theta)
        held = None if cache is None else (cache.keys, cache.values)
        layers = (jnp.arange(c.depth), held)
        x_BnD, kept = self.blocks(self.embedded(ids_BL), layers, angles_BLc, real_BL, places_Bn, keep)
        return self.norm_out(x_BnD).astype(c.dtype), kept


class Block(nn.Module):
    """Pre-norm attention with rotary positions, then a gated MLP, without biases; a step of `nn.scan`."""

    config: DimooConfig

    @nn.compact
    def __call__(self, x_BnD, layer, angles_Bnc, real_BL, places_Bn, keep):
        """Return the stream after this layer [B,n,D], and its keys and values [B,L,G,C] if `keep`."""
        c, (index, held) = self.config, layer
        batch, count, width = x_BnD.shape
        shrink = (2 * (index + 1.0)) ** -0.5

        def linear(x, features, name, scale=1.0):
            init = lambda *args: scale * cut_normal(*args)  # noqa: E731
            return nn.Dense(features, use_bias=False, dtype=c.dtype, kernel_init=init, name=name)(x)

        def heads(x, number, name):
            return linear(x, number * c.head_width, name).reshape(batch, count, number, c.head_width)

        normed = nn.RMSNorm(c.rms_eps, jnp.float32, name="norm")(x_BnD).astype(c.dtype)
        query = rotated(heads(normed, c.heads, "query"), angles_Bnc)
        key, value = rotated(heads(normed, c.kv_heads, "key"), angles_Bnc), heads(normed, c.kv_heads, "value")
        if held is not None:
            key, value = (_replaced(old, places_Bn, new) for old, new in zip(held, (key, value), strict=True))
        seen = None if real_BL is None else real_BL[:, None, None]
        mixed = jax.nn.dot_product_attention(query, key, value, mask=seen).reshape(x_BnD.shape)
        x_BnD = x_BnD + linear(mixed, width, "out", shrink)
        normed = nn.RMSNorm(c.rms_eps, jnp.float32, name="mlp_norm")(x_BnD).astype(c.dtype)
        hidden = nn.silu(linear(normed, c.mlp_width, "mlp_gate")) * linear(normed, c.mlp_width, "mlp_up")
        return x_BnD + linear(hidden, width, "mlp_out", shrink), (key, value) if keep else None


def rotary_angles(positions_Bn: Array, head_width: int, theta: float) -> Array:
    """Give the angles position * theta^(-2i/C) of a head's C/2 pairs, [B,n,C/2] float32."""
    exponents = np.arange(0, head_width, 2, dtype=np.float32) / np.float32(head_width)
    return positions_Bn.astype(jnp.float32)[..., None] * (1 / np.float32(theta) ** exponents)[None, None]


def rotated(x_BnHC: Array, angles_Bnc: Array) -> Array:
    """Rotate the pairs (x_i, x_{i+C/2}) by their angles in float32 (Llama's half-split form); keeps x's type."""
    cos, sin = jnp.cos(angles_Bnc)[:, :, None], jnp.sin(angles_Bnc)[:, :, None]
    first, second = jnp.split(x_BnHC.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x_BnHC.dtype)


def cut_normal(key: Array, shape: tuple[int, ...], dtype=jnp.float32) -> Array:
    """Normal of std 1/sqrt(fan_in), cut at 3 std."""
    return nn.initializers.truncated_normal(shape[0] ** -0.5, lower=-3, upper=3)(key, shape, dtype)


def _scores(features: Array, rows_KD: Array) -> Array:
    return jnp.einsum("...d,kd->...k", features, rows_KD, preferred_element_type=jnp.float32)


def _replaced(old_BL: Array, places_Bn: Array, new_Bn: Array) -> Array:
    """Rows of `old_BL` [B,L,...] with others at some places; places beyond L are left out."""
    return old_BL.at[jnp.arange(len(old_BL))[:, None], places_Bn].set(new_Bn, mode="drop")
