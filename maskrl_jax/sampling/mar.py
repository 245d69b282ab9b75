"""Masked autoregression over continuous tokens (arXiv 2406.11838): the loop over iterations; specs/mar.md 7 and 8.

Tokens lie in generation order, last first: before iteration k the first m_k of L are still masked, and iteration k
draws those from m_{k+1} on. All counts are known beforehand, so every shape is static. Axes: B batch, L tokens,
V rows given to the encoder, R rows that an iteration draws, C channels, D width.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
GUIDANCE_SCHEDULES = ("linear", "constant")
# (tokens [b,V,C], order [b,L], cond [b,...], masked) -> condition of the head [b,L,D]
Backbone = Callable[[Array, Array, Array, int | Array], Array]
# (condition [B,R,D], the null condition's or None, what the iteration draws with, keys [B,R]) -> tokens [B,R,C]
Draw = Callable[[Array, Array | None, "Dials", Array], Array]
# (tokens [B,L,C], shape (V, R), masked before, masked after, number k) -> tokens
Iteration = Callable[[Array, tuple[int, int], int | Array, int | Array, int | Array], Array]


class Dials(NamedTuple):
    """What iterations draw with: float32 [N] of all of a plan's, [] of one."""

    guidance: Array  # w of eps_null + w (eps - eps_null)
    temperature: Array  # of the noise

    def at(self, k: int | Array) -> "Dials":
        """Those of iteration k."""
        return Dials(*(jnp.asarray(x)[k] for x in self))


class Segment(NamedTuple):
    """Iterations of one shape: the encoder sees the last `rows` tokens, and `width` of them are drawn at once."""

    rows: int
    width: int
    first: int  # k of its first iteration
    masked: tuple[int, ...]  # m_k before each iteration
    after: tuple[int, ...]  # m_{k+1}

    def split(self, k: int) -> list["Segment"]:
        """Its iterations before k, and those from k on; what is empty is left out."""
        at = min(max(k - self.first, 0), len(self.masked))
        parts = (self.first, slice(0, at)), (self.first + at, slice(at, None))
        found = [self._replace(first=first, masked=self.masked[own], after=self.after[own]) for first, own in parts]
        return [part for part in found if part.masked]


@dataclasses.dataclass(frozen=True)
class MarPlan:
    """Counts of every iteration.

    num_tokens: L. num_steps: N iterations, at most L.
    bucket: iterations whose visible tokens round up to the same multiple of it share a loop and pad to its longest;
      1 gives every iteration a shape of its own and pads nothing.
    """

    num_tokens: int
    num_steps: int
    bucket: int = 1

    def __post_init__(self):
        if not 1 <= self.num_steps <= self.num_tokens:
            raise ValueError(f"num_steps {self.num_steps} must be in [1, {self.num_tokens}], the number of tokens")
        if self.bucket < 1:
            raise ValueError(f"bucket {self.bucket} must be at least 1")

    @property
    def masked_after(self) -> tuple[int, ...]:
        """Tokens still masked after each iteration; 0 at the end."""
        return (*self._scheduled()[:-1], 0)

    def _scheduled(self) -> list[int]:
        """What the schedule says, 1 at the end: guidance follows it."""
        left, counts = self.num_tokens, []
        for k in range(self.num_steps):
            planned = math.floor(self.num_tokens * math.cos(math.pi / 2 * (k + 1) / self.num_steps))
            left = max(1, min(left - 1, planned))
            counts.append(left)
        return counts

    def dials(
        self, guidance: float = 1.0, schedule: str = "linear", temperature: float = 1.0, full_noise: int = 0
    ) -> Dials:
        """Guidance and temperature of each iteration.

        Args:
          schedule: of the guidance: `linear` grows from 1 with the share of tokens that are drawn; `constant`.
          full_noise: iterations that see fewer tokens than this keep temperature 1 (ours).
        """
        if schedule not in GUIDANCE_SCHEDULES:
            known = ", ".join(GUIDANCE_SCHEDULES)
            raise ValueError(f"guidance_schedule {schedule!r} is not one of {known}")
        shares = 1 - np.array(self._scheduled()) / self.num_tokens
        seen = self.num_tokens - np.array((self.num_tokens, *self.masked_after[:-1]))
        scales = np.full(self.num_steps, guidance) if schedule == "constant" else 1 + (guidance - 1) * shares
        return Dials(np.float32(scales), np.where(seen < full_noise, 1, temperature).astype(np.float32))

    def segments(self) -> list[Segment]:
        """Iterations in order, neighbours of one shape together."""
        after = self.masked_after
        before = (self.num_tokens, *after[:-1])
        groups: dict[int, list[int]] = {}
        for k, masked in enumerate(before):
            rows = -(-(self.num_tokens - masked) // self.bucket) * self.bucket
            groups.setdefault(min(rows, self.num_tokens), []).append(k)
        return [
            Segment(
                rows,
                max(before[k] - after[k] for k in ks),
                ks[0],
                *(tuple(values[k] for k in ks) for values in (before, after)),
            )
            for rows, ks in groups.items()
        ]


class MarRollout(flax.struct.PyTreeNode):
    """What was drawn, in raster order."""

    tokens: Array  # float32 [B,L,C]
    commit_step: Array  # uint8 [B,L], iteration of each token


def orders(keys_B: Array, num_tokens: int) -> Array:
    """A uniform permutation of the grid places for every sample, int32 [B,L]."""
    return jax.vmap(lambda key: jax.random.permutation(key, num_tokens))(keys_B).astype(jnp.int32)


def randomness(keys_B: Array, num_tokens: int) -> tuple[Array, Array]:
    """(order int32 [B,L], a key for every token in generation order [B,L]) of samples."""
    order_keys_B, noise_keys_B = (jax.vmap(jax.random.fold_in, (0, None))(keys_B, i) for i in range(2))
    places_L = jnp.arange(num_tokens)
    keys_BL = jax.vmap(lambda key: jax.vmap(lambda j: jax.random.fold_in(key, j))(places_L))(noise_keys_B)
    return orders(order_keys_B, num_tokens), keys_BL


def to_order(x_BL: Array, order_BL: Array) -> Array:
    """Raster order -> generation order, [B,L,...]."""
    return jnp.take_along_axis(x_BL, order_BL.reshape(*order_BL.shape, *[1] * (x_BL.ndim - 2)), axis=1)


def to_raster(x_BL: Array, order_BL: Array) -> Array:
    """Generation order -> raster order, [B,L,...]."""
    return to_order(x_BL, jnp.argsort(order_BL, axis=1))


def iterate(
    backbone: Backbone,
    draw: Draw,
    tokens_BLC: Array,
    order_BL: Array,
    conds: Sequence[Array],
    keys_BL: Array,
    shape: tuple[int, int],
    masked: int | Array,
    after: int | Array,
    dials: Dials,
) -> Array:
    """One iteration: tokens [B,L,C] with those in [after, masked) drawn.

    Args:
      conds: the condition, and with guidance the null condition, each [B,...].
      keys_BL: a key for every token: it is drawn once, whatever the iteration.
      shape: (V, R).
      dials: of this iteration, for `draw`.
    """
    (rows, width), num_tokens = shape, order_BL.shape[1]
    seen_BVC = tokens_BLC[:, num_tokens - rows :]
    spread = lambda x: jnp.concatenate([x] * len(conds))  # noqa: E731 - to all branches
    z_bLD = backbone(spread(seen_BVC), spread(order_BL), jnp.concatenate(conds), masked)
    start = jnp.minimum(after, num_tokens - width)
    cut = lambda x: jax.lax.dynamic_slice_in_dim(x, start, width, axis=1)  # noqa: E731
    z_BRD, *null = jnp.split(cut(z_bLD), len(conds))
    drawn_BRC = draw(z_BRD, null[0] if null else None, dials, cut(keys_BL))
    place_R = start + jnp.arange(width)
    fresh_R1 = ((place_R >= after) & (place_R < masked))[:, None]
    kept_BRC = jnp.where(fresh_R1[None], drawn_BRC, cut(tokens_BLC))
    return jax.lax.dynamic_update_slice_in_dim(tokens_BLC, kept_BRC, start, axis=1)


def generate(
    backbone: Backbone,
    draw: Draw,
    keys_B: Array,
    conds: Sequence[Array],
    dials_N: Dials,
    plan: MarPlan,
    channels: int,
) -> MarRollout:
    """Sample from nothing.

    Args:
      keys_B: a typed key a sample; order and noise come from it, and nothing else does.
      conds: the condition [B,...] int32; two of them, the null condition last, are guided by `dials_N`.
    """
    order_BL, keys_BL = randomness(keys_B, plan.num_tokens)
    tokens_BLC = jnp.zeros((*order_BL.shape, channels))
    step_L = np.zeros(plan.num_tokens, np.uint8)
    for k, (first, end) in enumerate(zip(plan.masked_after, (plan.num_tokens, *plan.masked_after), strict=False)):
        step_L[first:end] = k

    def iteration(tokens, shape, masked, after, k):
        return iterate(backbone, draw, tokens, order_BL, conds, keys_BL, shape, masked, after, dials_N.at(k))

    for segment in plan.segments():
        tokens_BLC = run(segment, iteration, tokens_BLC)
    step_BL = jnp.broadcast_to(jnp.asarray(step_L)[None], order_BL.shape)
    return MarRollout(to_raster(tokens_BLC, order_BL), to_raster(step_BL, order_BL))


def run(segment: Segment, iteration: Iteration, tokens_BLC: Array) -> Array:
    """The iterations of a segment, compiled once."""
    shape, count = (segment.rows, segment.width), len(segment.masked)
    if count == 1:
        return iteration(tokens_BLC, shape, segment.masked[0], segment.after[0], segment.first)
    counts = (jnp.array(values, jnp.int32) for values in (segment.masked, segment.after))
    numbers = jnp.arange(segment.first, segment.first + count)
    return jax.lax.scan(lambda tokens, now: (iteration(tokens, shape, *now), None), tokens_BLC, (*counts, numbers))[0]
