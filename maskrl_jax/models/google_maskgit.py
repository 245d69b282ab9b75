"""MaskGIT's transformer as its Flax original has it (form B), for published weights (specs/maskgit.md section 1)."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from maskrl_jax.models.layers import SIZES, Attention, check_sizes, layer_norm, stack

Array = jax.Array
EPSILON = 1e-12  # of every norm
START = nn.initializers.truncated_normal(0.02)


@dataclasses.dataclass(frozen=True)
class GoogleMaskGITConfig:
    """Static sizes. Rows of the one table: codes 0..K-1, class c = K+c, MASK last.

    Ids are as in our other models, MASK = K: the model knows which row that is.
    """

    num_tokens: int = 256  # N: 256 at 256 pixels, 1024 at 512; any grid
    codebook_size: int = 1024  # K
    num_classes: int = 1000  # C; there is no null class
    width: int = 768
    depth: int = 24
    heads: int = 16
    mlp_width: int = 3072
    remat: bool = False
    dtype: str = "float32"

    def __post_init__(self):
        check_sizes(self, SIZES, square=False)

    @property
    def mask_id(self) -> int:
        return self.codebook_size

    @property
    def vocab(self) -> int:
        """Rows of the table."""
        return self.codebook_size + self.num_classes + 1

    @property
    def cond_length(self) -> int:
        return 1


class PostBlock(nn.Module):
    """Post-norm block: x = norm(x + attention(x)); x = norm(x + mlp(x)); tanh GELU; a step of `nn.scan`."""

    config: GoogleMaskGITConfig

    @nn.compact
    def __call__(self, x_BSD: Array) -> tuple[Array, None]:
        c, dtype = self.config, jnp.dtype(self.config.dtype)
        mixed = Attention(c.heads, dtype, START, name="attention")(x_BSD)
        x_BSD = layer_norm("norm_attention", EPSILON)(x_BSD + mixed)
        hidden = nn.gelu(nn.Dense(c.mlp_width, dtype=dtype, kernel_init=START, name="mlp_in")(x_BSD))
        out = nn.Dense(c.width, dtype=dtype, kernel_init=START, name="mlp_out")(hidden)
        return layer_norm("norm_mlp", EPSILON)(x_BSD + out), None


class GoogleMaskGIT(nn.Module):
    """Form B of MaskGIT (arXiv 2202.04200): class token first, tied head with a bias for each entry.

    The residual stream, the norms, the softmax and the head are float32 whatever the compute dtype. An id or a class
    out of its range gives NaN. No dropout (published: 0.1 in training), as in `MaskGITPort`.
    """

    config: GoogleMaskGITConfig

    def setup(self):
        c = self.config
        self.tokens = self.param("tokens", START, (c.vocab, c.width))
        self.position = self.param("position", START, (c.cond_length + c.num_tokens, c.width))
        self.bias = self.param("bias", nn.initializers.zeros, (c.vocab,))
        self.norm_in, self.norm_out = (layer_norm(None, EPSILON) for _ in range(2))
        self.blocks = stack(PostBlock, c.depth, remat=c.remat)(c)
        self.dense = nn.Dense(c.width, dtype=jnp.dtype(c.dtype), kernel_init=START)

    def __call__(self, ids_BN: Array, cond: Array) -> Array:
        """Logits [B,N,K] float32 from ids [B,N] int32 (MASK = K) and classes [B] or [B,1] int32 in 0..C-1."""
        return self.logits(self.features(ids_BN, cond))

    def features(self, ids_BN: Array, cond: Array) -> Array:
        """Output of the last norm, [B,N+1,D] float32. Arguments as in `__call__`.

        The class slot, which the network has first, comes last here, as in our other models.
        """
        c = self.config
        image, cond = self._rows(ids_BN), cond.reshape(-1, c.cond_length)
        inside = (cond >= 0) & (cond < c.num_classes)
        rows_BS = jnp.concatenate([jnp.where(inside, c.codebook_size + cond, c.vocab), image], axis=1)
        x_BSD = self.norm_in(self._embedded(rows_BS) + self.position[None])
        x_BSD, _ = self.blocks(x_BSD)
        return jnp.roll(self.norm_out(nn.gelu(self.dense(x_BSD))), -c.cond_length, axis=1)

    def logits(self, features: Array) -> Array:
        """Tied head on features [..., N or N+1, D] -> [..., N, K] float32: image positions and image codes only."""
        c = self.config
        if features.shape[-2] not in (c.num_tokens, c.cond_length + c.num_tokens):
            raise ValueError(f"features of {features.shape[-2]} positions; the model has the class and {c.num_tokens}")
        return self._scores(features[..., : c.num_tokens, :], c.codebook_size)

    def row_logits(self, rows: Array) -> Array:
        """The head on single rows [..., D] of image tokens -> [..., K] float32."""
        return self._scores(rows, self.config.codebook_size)

    def entries(self, features: Array) -> Array:
        """Scores of every row of the table at every slot, [..., 1+N, V] float32, as published: class slot first."""
        return jnp.roll(self._scores(features, self.config.vocab), self.config.cond_length, axis=-2)

    def controls(self, ids_Bn: Array, positions_Bn: Array) -> Array:
        """Embedding plus position of some image tokens, [B,n,D] float32: what the model sees of them."""
        return self._embedded(self._rows(ids_Bn)) + jnp.take(self.position[self.config.cond_length :], positions_Bn, 0)

    def _scores(self, features: Array, rows: int) -> Array:
        scores = jnp.einsum("...d,kd->...k", features.astype(jnp.float32), self.tokens[:rows])
        return scores + jnp.broadcast_to(self.bias[:rows], scores.shape)

    def _rows(self, ids: Array) -> Array:
        """Rows of the table for image ids; an id out of 0..K has none."""
        c = self.config
        rows = jnp.where(ids == c.mask_id, c.vocab - 1, ids)
        return jnp.where((ids >= 0) & (ids <= c.mask_id), rows, c.vocab)

    def _embedded(self, rows: Array) -> Array:
        """Rows of the table, NaN where there is none."""
        return jnp.take(self.tokens, rows, axis=0, mode="fill")
