"""Meissonic (arXiv 2410.08261): masked generative text-to-image transformer of two-stream and one-stream blocks.

specs/meissonic.md section 2. Axes: B batch, N image tokens, L text tokens, S = L + inner image tokens, D width,
H heads, C width of a head, E width of the text states.
"""

import dataclasses
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from maskrl_jax.models.layers import sinusoid
from maskrl_jax.models.mmdit import BlockSizes, DualBlock, SingleBlock, linear, norm, rotations, stack
from maskrl_jax.models.vqgan import from_patches, to_patches

Array = jax.Array
SIZES = ("codebook_size", "vocab_size", "depth", "single_depth", "heads", "head_width", "text_width")
MICRO_CONDITIONS = 5  # original width and height, crop left and top, aesthetic score


class Prompt(NamedTuple):
    """The condition of B images; a negative prompt is one of the same form."""

    states: Array  # float [B,L,E], last but one hidden states of the text encoder; padding is attended
    pooled: Array  # float [B,D]
    micro: Array  # float32 [B,5], 1024, 1024, 0, 0, 6 at 1024 pixels


@dataclasses.dataclass(frozen=True)
class MeissonicConfig:
    """Static sizes; the defaults are the published ones at 1024 pixels."""

    grid: tuple[int, int] = (64, 64)  # rows and columns of the tokens; no parameter depends on it
    codebook_size: int = 8192  # K
    vocab_size: int = 8256  # rows of the table of tokens: K codes, unused ones, and MASK, the last
    depth: int = 14  # blocks of two streams
    single_depth: int = 28  # blocks of one
    heads: int = 8
    head_width: int = 128
    text_width: int = 1024  # E
    rope_axes: tuple[int, int, int] = (16, 56, 56)  # entries of a head that turn by image, row, column
    resampled: bool = True  # the blocks see a grid of half the side, as at 1024 pixels
    remat: bool = False
    dtype: str = "float32"  # of the matmuls; residual streams, norms, softmax, condition and head are float32

    def __post_init__(self):
        for name in ("grid", "rope_axes"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in SIZES:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} must be at least 1")
        if len(self.grid) != 2 or min(self.grid) < 1:
            raise ValueError(f"grid {self.grid} is not a number of rows and of columns")
        if self.resampled and any(side % 2 for side in self.grid):
            raise ValueError(f"grid {self.grid} has an odd side, which cannot be halved")
        if self.codebook_size >= self.vocab_size:
            raise ValueError(f"vocab_size {self.vocab_size} leaves no row for MASK beside {self.codebook_size} codes")
        if len(self.rope_axes) != 3 or min(self.rope_axes) < 0 or any(width % 2 for width in self.rope_axes):
            raise ValueError(f"rope_axes {self.rope_axes} are not three even widths")
        if sum(self.rope_axes) != self.head_width:
            raise ValueError(f"rope_axes {self.rope_axes} do not add up to head_width {self.head_width}")

    @property
    def width(self) -> int:
        return self.heads * self.head_width

    @property
    def num_tokens(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def mask_id(self) -> int:
        """Not the number of codes here; the logits have K columns, so that MASK is never drawn."""
        return self.vocab_size - 1

    @property
    def blocks(self) -> BlockSizes:
        return BlockSizes(self.heads, self.head_width, self.remat, self.dtype)

    @property
    def inner_grid(self) -> tuple[int, int]:
        """The grid that the blocks see."""
        return tuple(side // (1 + self.resampled) for side in self.grid)


class Meissonic(nn.Module):
    """The transformer; parameters of a stack of blocks have a leading axis of blocks.

    An id that is neither a code nor MASK gives NaN. No dropout, as published. The start is our choice (normal 0.02,
    modulations 0: every block begins as the identity).
    """

    config: MeissonicConfig

    def setup(self):
        c, b = self.config, self.config.blocks
        self.tokens = self.param("tokens", nn.initializers.normal(0.02), (c.vocab_size, c.width))
        self.token_norm, self.token_out = norm(), linear(b, c.width, use_bias=False)
        if c.resampled:
            self.down_norm, self.down = norm(), linear(b, c.width, use_bias=False)
            self.up_norm, self.up = norm(), linear(b, 4 * c.width, use_bias=False)
        self.in_norm, self.in_out = norm(), linear(b, c.width, use_bias=False)
        self.text_in, self.text_norm = linear(b, c.width), norm()
        self.condition = Condition(c.width)
        self.dual_blocks = stack(DualBlock, b, c.depth)
        self.single_blocks = stack(SingleBlock, b, c.single_depth)
        self.out_norm, self.out = norm(), linear(b, c.width, use_bias=False)
        head = dataclasses.replace(b, dtype="float32")
        self.head_in, self.head_norm = linear(head, c.width, use_bias=False), norm()
        self.head_out = linear(head, c.codebook_size, use_bias=False)

    def __call__(self, ids_BN: Array, timestep_B: Array, cond: Prompt) -> Array:
        """Logits [B,N,K] float32. Arguments as in `features`."""
        return self.logits(self.features(ids_BN, timestep_B, cond))

    def features(self, ids_BN: Array, timestep_B: Array, cond: Prompt) -> Array:
        """Feature of every token before the head, [B,N,D] float32.

        Args:
          ids_BN: row-major codes or MASK, int32.
          timestep_B: T-1 down to 0 in the published sampler (specs/meissonic.md section 6); a thousand times it enters.
          cond: text and micro-conditions.
        """
        c = self.config
        if ids_BN.shape[1:] != (c.num_tokens,):
            raise ValueError(f"ids {ids_BN.shape} are not [batch, {c.num_tokens}], the tokens of grid {c.grid}")
        cells = self.token_out(self.token_norm(self._rows(ids_BN))).reshape(-1, *c.grid, c.width)
        if c.resampled:
            cells = self.down(to_patches(self.down_norm(cells), 2))
        image = self.in_out(self.in_norm(cells.reshape(len(ids_BN), -1, c.width))).astype(jnp.float32)
        text = self.text_norm(self.text_in(cond.states))
        condition_BD = self.condition(timestep_B, cond.pooled, cond.micro)
        length = text.shape[1]
        turns = rotations(c.rope_axes, c.inner_grid, length)
        (text, image), _ = self.dual_blocks((text, image), condition_BD, turns)
        x_BSD, _ = self.single_blocks(jnp.concatenate([text, image], axis=1), condition_BD, turns)
        cells = self.out(self.out_norm(x_BSD[:, length:])).reshape(-1, *c.inner_grid, c.width)
        if c.resampled:
            cells = from_patches(self.up(self.up_norm(cells)), 2)
        return cells.reshape(*ids_BN.shape, c.width).astype(jnp.float32)

    def logits(self, features: Array) -> Array:
        """Head on features [..., D] -> [..., K] float32, each position by itself."""
        return self.head_out(self.head_norm(self.head_in(features)))

    def _rows(self, ids_BN: Array) -> Array:
        """Rows of the table [B,N,D], NaN where there is no such token."""
        known = ((ids_BN >= 0) & (ids_BN < self.config.codebook_size)) | (ids_BN == self.config.mask_id)
        return jnp.take(self.tokens, jnp.where(known, ids_BN, len(self.tokens)), axis=0, mode="fill")


class Condition(nn.Module):
    """What modulates every block, [B,D]: timestep, pooled text and micro-conditions; float32 throughout."""

    width: int

    @nn.compact
    def __call__(self, timestep_B: Array, pooled_BD: Array, micro_BM: Array) -> Array:
        micro = sinusoid(micro_BM).reshape(len(micro_BM), -1)
        said = jnp.concatenate([pooled_BD.astype(jnp.float32), micro], axis=-1)
        said = ConditionMLP(self.width, use_bias=False, name="said")(said)
        time = ConditionMLP(self.width, name="time")(sinusoid(1000 * timestep_B.astype(jnp.float32)))
        return time + ConditionMLP(self.width, name="pooled")(said)


class ConditionMLP(nn.Module):
    """Linear, SiLU, Linear."""

    width: int
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: Array) -> Array:
        dense = lambda name: nn.Dense(self.width, use_bias=self.use_bias, name=name)  # noqa: E731
        return dense("out")(nn.silu(dense("in")(x)))
