"""Text to image with Lumina-DiMOO: plain, with a feature shortcut, and with the training-free cache of keys and values.

specs/lumina_dimoo.md sections 4 and 6, specs/shortcut.md sections 3 and 6. The loop is that of `sampling/maskgit.py`
on a grid of codes; what is said here is how codes and prompts become sequences, and where a step's logits come from.
Axes as there; b rows of both branches of guidance, L positions of the sequence, R recomputed ones.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from maskrl_jax.sampling import draws, maskgit, shortcut
from maskrl_jax.sampling.dimoo_sequence import Layout, Prompt
from maskrl_jax.sampling.maskgit import Plan, Rollout, SamplerConfig

Array = jax.Array
GREEDY = 1e-6  # the temperature that stands for 0: an argmax, down to logits that close

# A bound `apply` of `models.dimoo.Dimoo`: base(*arguments, method=name).
Base = Callable[..., Any]
# (features [b,L,D], controls' embeddings [b,n,D], their positions [b,n], whether they are any [b,n],
#  masked share [b], padding [b,L], positions [b,L]) -> the next step's features; `models.dimoo_shortcut`
Move = Callable[..., Array]


@dataclasses.dataclass(frozen=True)
class CacheConfig:
    """The training-free cache (section 6): when a pass is full, and how little of the others is computed."""

    cache_ratio: float = 0.9  # share of positions that keep their keys, values and logits
    warmup_ratio: float = 0.3  # share of steps that are full first
    refresh_interval: int = 5

    def __post_init__(self):
        for name in ("cache_ratio", "warmup_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} {getattr(self, name)} must lie in [0, 1]")
        if self.refresh_interval < 1:
            raise ValueError(f"refresh_interval {self.refresh_interval} must be at least 1")

    def full_steps(self, num_steps: int) -> np.ndarray:
        """Which steps are full, bool [T]: s <= W or (s - W) mod interval = 0, W = int(T * warmup_ratio)."""
        steps, warmup = np.arange(num_steps), int(num_steps * self.warmup_ratio)
        return (steps <= warmup) | ((steps - warmup) % self.refresh_interval == 0)


def sampler_of(num_steps: int = 64, cfg_scale: float = 4.0, temperature: float = 1.0) -> SamplerConfig:
    """The published sampler: constant guidance l_c + cfg (l_c - l_u) and noise that is not annealed.

    The temperature divides the logits of the draw alone and scales the noise of the confidence, which is read from
    the logits as they are; 0 takes the most likely codes. ValueError where it is negative.
    """
    if temperature < 0:
        raise ValueError(f"temperature {temperature} must be at least 0")
    return SamplerConfig(
        num_steps=num_steps,
        max_steps=num_steps,
        schedule="floored-cosine",
        gumbel=temperature,
        last_gumbel=temperature,
        temperature=max(temperature, GREEDY),
        plain_confidence=True,
        guidance=1 + cfg_scale,
    )


def make_plan(num_tokens: int, num_steps: int = 64, cfg_scale: float = 4.0, temperature: float = 1.0) -> Plan:
    """Tables of `sampler_of` for N tokens. ValueError where T exceeds N."""
    return maskgit.make_plan(sampler_of(num_steps, cfg_scale, temperature), num_tokens)


def logits_fn(base: Base, layout: Layout) -> draws.LogitsFn:
    """The model over a grid: (codes [B,N] with MASK = K, anything, Prompt) -> logits [B,N,K] float32."""

    def fn(ids_BN: Array, _: Any, prompt: Prompt) -> Array:
        features_BLD = base(*layout.sequence(ids_BN, prompt), method="features")
        return base(layout.image(features_BLD), method="logits")

    return fn


def parts(
    base: Base, layout: Layout, null_cond: Prompt, move: Move | None, prompt_controls: bool = True
) -> shortcut.Parts:
    """The model cut at its feature, whose rows are those of the image tokens first.

    Args:
      null_cond: the prompt of the unconditional branch.
      move: the shortcut network; None where nothing is moved.
      prompt_controls: whether the tokens of the prompt are controls in the conditional branch, at every step.
    """

    def features(ids_bN, _, prompt):
        return layout.image_first(base(*layout.sequence(ids_bN, prompt), method="features"))

    def head(features_bLD):
        return base(features_bLD[:, : layout.num_tokens], method="logits")

    def advance(features_bLD, controls, share_b, prompt):
        moved = advanced(base, layout, null_cond, move, features_bLD, controls, share_b, prompt, prompt_controls)
        return moved.astype(features_bLD.dtype)

    return shortcut.Parts(features, head, advance)


def advanced(
    base: Base,
    layout: Layout,
    null_cond: Prompt,
    move: Move,
    features_bLD: Array,
    controls: shortcut.Controls,
    share_b: Array,
    prompt: Prompt,
    prompt_controls: bool = True,
) -> Array:
    """What the shortcut makes of features [b,L,D], image tokens first, in its own type; arguments as in `parts`."""
    empty = jnp.full((len(features_bLD), layout.num_tokens), layout.codebook_size)
    _, positions_bL, real_bL = layout.sequence(empty, prompt)
    told = _told(base, layout, controls, positions_bL, prompt, null_cond if prompt_controls else None)
    return move(features_bLD, *told, share_b, *(layout.image_first(x) for x in (~real_bL, positions_bL)))


def _told(base, layout, controls, positions_bL, prompt, null_cond):
    """Embeddings of the controls, their positions, and whether they are any; the prompt's first unless it is null."""
    places = jnp.take_along_axis(layout.image(positions_bL), controls.positions, axis=1)
    ids, valid = layout.token_ids(jnp.where(controls.valid, controls.ids, 0)), controls.valid
    if null_cond is not None:
        conditional_b1 = (prompt.ids != jnp.asarray(null_cond.ids)[None]).any(-1, keepdims=True)
        ids = jnp.concatenate([prompt.ids, ids], axis=1)
        places = jnp.concatenate([positions_bL[:, : prompt.ids.shape[1]], places], axis=1)
        valid = jnp.concatenate([prompt.real & conditional_b1, valid], axis=1)
    return base(ids, method="embedded"), places, valid


def decode_cached(
    base: Base,
    layout: Layout,
    keys_B: Array,
    cond: Prompt,
    null_cond: Prompt,
    plan: Plan,
    full_S: Array,
    cache_ratio: float,
    given_BN: Array,
) -> Rollout:
    """Fill every MASK of `given_BN` with full passes now and then, and passes of the least certain positions between.

    Args:
      full_S: bool, which steps are full, step 0 among them (`CacheConfig.full_steps`).
      cache_ratio: share of positions that the other steps leave alone, static.
    Returns:
      A Rollout whose `calls` count the full passes.
    """
    plan, full_S = jax.tree.map(jnp.asarray, (plan, full_S))
    conds = shortcut.conditions(plan, cond, null_cond)
    rows = len(given_BN) * shortcut.branches(plan)

    def full(sequence, _):
        return base(*sequence, method="cached")

    def partial(sequence, cache):
        ids_bL, positions_bL, real_bL = sequence
        places_bR = least_certain(cache.logits, real_bL, 1 - cache_ratio)
        return base(ids_bL, cache, places_bR, positions_bL, real_bL, method="recomputed")

    def predict(cache, step, ids_BN, _):
        sequence = layout.sequence(shortcut.tiled(ids_BN, rows), conds)
        cache = jax.lax.cond(full_S[step], full, partial, sequence, cache)
        return shortcut.guided(plan, step, layout.image(cache.logits)), cache, full_S[step]

    first = layout.sequence(shortcut.tiled(given_BN, rows), conds)
    cache = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(full, first, None))
    return maskgit.fill(predict, cache, keys_B, plan, given_BN, layout.codebook_size)[0]


def least_certain(logits_bLK: Array, real_bL: Array, share: float) -> Array:
    """Real positions whose largest logit is at or below the `share` quantile of their row, int32 [b,R]; L is none.

    The linear quantile lies between the floor(share (n - 1))-th of n sorted values, from 0, and the next. Of equal
    values, which bfloat16 makes, the published rule takes all and this one the first: R is fixed.
    """
    length = real_bL.shape[1]
    best_bL = jnp.where(real_bL, logits_bLK.max(-1), jnp.inf)
    most = int(np.float32(share) * np.float32(length - 1)) + 1
    _, places_bR = jax.lax.top_k(-best_bL, most)
    count_b = jnp.floor(np.float32(share) * (real_bL.sum(1) - 1).astype(jnp.float32)).astype(jnp.int32) + 1
    return jnp.where(jnp.arange(most)[None] < count_b[:, None], places_bR, length)
