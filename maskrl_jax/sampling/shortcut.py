"""Sampling with a feature shortcut: the full model runs now and then, a light network moves its feature between.

specs/shortcut.md sections 1 and 6. The loop is that of `sampling/maskgit.py`; what is said here is where a step's
logits come from.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from maskrl_jax.sampling import draws, maskgit
from maskrl_jax.sampling.maskgit import Plan, Rollout
from maskrl_jax.sampling.refresh import Refresh

Array = jax.Array
KEPT, FULL, SHORTCUT = 0, 1, 2  # where a step's feature comes from


class Controls(flax.struct.PyTreeNode):
    """The tokens that a step revealed, padded: what a shortcut reads beside the feature."""

    positions: Array  # int32 [b, n]
    ids: Array  # int32 [b, n]
    valid: Array  # bool [b, n]


@dataclasses.dataclass(frozen=True)
class Parts:
    """A base model cut at its feature, and the network that moves the feature on.

    Attributes:
      features: (ids int32 [b,N], timestep int32 [b], cond) -> [b,T,D] of any float type; T >= N, image tokens first.
      head: [b,T,D] -> logits [b,N,K] float32, of image positions and codes alone.
      advance: (features [b,T,D], Controls, masked share float32 [b], cond) -> the next step's features [b,T,D].
    """

    features: Callable[[Array, Array, Any], Array]
    head: Callable[[Array], Array]
    advance: Callable[[Array, Controls, Array, Any], Array]


class Memory(flax.struct.PyTreeNode):
    """What a step hands to the next."""

    features: Array  # float32 [branches * B, T, D]: conditional rows, then unconditional ones
    previous: Array  # the features before those, of the same shape; [0] unless asked for
    drift: Array  # float32 [], since the last full step
    since: Array  # int32 [], shortcut steps since then
    full: Array  # bool [S], steps that were full


def controls_of(ids_BN: Array, revealed_BN: Array, most: int) -> Controls:
    """Gather the revealed tokens of each row into `most` places (those beyond are left out)."""
    _, positions = jax.lax.top_k(revealed_BN.astype(jnp.int32), most)  # ties: lower index
    take = lambda values: jnp.take_along_axis(values, positions, axis=-1)  # noqa: E731
    return Controls(positions=positions, ids=take(ids_BN), valid=take(revealed_BN))


def most_controls(plan: Plan, num_tokens: int) -> int:
    """Most tokens that one step reveals to the next, of a plan that starts from an empty grid.

    Modes with a threshold may commit all; the last step has no next.
    """
    if plan.mode in maskgit.OPEN_ENDED:
        return num_tokens
    left = np.concatenate([[num_tokens], np.asarray(plan.masked_after)[: int(plan.num_steps)]])
    return int(max([*(left[:-1] - left[1:])[:-1], 1]))


def decode(
    parts: Parts,
    keys_B: Array,
    cond: Any,
    null_cond: Any,
    plan: Plan,
    refresh: Refresh,
    given_BN: Array,
    mask_id: int,
    *,
    most: int,
    first: Array | None = None,
    extrapolate: bool = False,
) -> tuple[Rollout, Memory]:
    """Fill every MASK of `given_BN` int32 [B,N], with the full model only where `refresh` asks for it.

    Args:
      refresh: a drift is the mean over the rows that this program sees: under pmap every device decides for its own.
      most: places for controls, static; `most_controls(plan, N)`.
      first: features [branches * B, T, D] of an empty grid, computed before (section 6, cached step 0): step 0 then
        runs no network and is no call. Wrong where tokens are given.
      extrapolate: move the feature linearly, 2 f - f_previous, in the place of the network (a baseline).
    Returns:
      (Rollout, Memory): `calls` of the rollout count runs of the full model; the memory holds the last step's features
      and which steps were full, a kept step 0 among them.
    """
    plan, refresh = jax.tree.map(jnp.asarray, (plan, refresh))
    conds, rows = conditions(plan, cond, null_cond), len(given_BN) * branches(plan)
    struct = jax.eval_shape(parts.features, *inputs(plan, jnp.int32(0), given_BN, rows), conds)

    def moved(memory, step, ids_BN, commit_BN):
        if extrapolate:
            return memory.features + jnp.where(step > 1, memory.features - memory.previous, 0.0)
        controls = controls_of(ids_BN, commit_BN == (step - 1).astype(jnp.uint8), most)
        share_B = (ids_BN == mask_id).mean(-1, dtype=jnp.float32)
        return parts.advance(memory.features, *jax.tree.map(lambda x: tiled(x, rows), (controls, share_B)), conds)

    def predict(memory, step, ids_BN, commit_BN):
        source = _source(refresh, memory, step, first is not None)
        ways = [
            lambda m, *_: m.features,
            lambda m, step, ids, _: parts.features(*inputs(plan, step, ids, rows), conds),
            moved,
        ]
        features = jax.lax.switch(source, ways, memory, step, ids_BN, commit_BN)
        is_full = source != SHORTCUT
        drift = memory.drift
        if refresh.by_drift:
            drift += _drift(features, memory.features, tiled(ids_BN == mask_id, rows))
        memory = Memory(
            features=features,
            previous=memory.features if extrapolate else memory.previous,
            drift=jnp.where(is_full, 0.0, drift),
            since=jnp.where(is_full, 0, memory.since + 1),
            full=memory.full.at[step].set(is_full),
        )
        return guided(plan, step, parts.head(features)), memory, source == FULL

    memory = _before(struct, first, len(refresh.full), extrapolate)
    return maskgit.fill(predict, memory, keys_B, plan, given_BN, mask_id)


def _before(struct: Any, first: Array | None, steps: int, extrapolate: bool) -> Memory:
    """The memory before the first step, for features of a shape."""
    empty = jnp.zeros(struct.shape, struct.dtype)
    return Memory(
        features=empty if first is None else first,
        previous=empty if extrapolate else empty[:0],
        drift=jnp.float32(0),
        since=jnp.int32(0),
        full=jnp.zeros((steps,), bool),
    )


def _source(refresh: Refresh, memory: Memory, step: Array, kept: bool) -> Array:
    """Where a step's feature comes from, int32 []; `kept`: that of step 0 is known."""
    asked = (memory.drift > refresh.threshold) | (memory.since >= refresh.longest)
    full = refresh.full[step] | ((memory.full.sum() < refresh.budget) & asked)
    source = jnp.where(full, FULL, SHORTCUT)
    return jnp.where(step == 0, KEPT, source) if kept else source


def decode_unrolled(
    parts: Parts,
    keys_B: Array,
    cond: Any,
    null_cond: Any,
    plan: Plan,
    full_steps: Sequence[int],
    num_tokens: int,
    mask_id: int,
    *,
    first: Array | None = None,
) -> Rollout:
    """The same from an empty grid, with the pattern of full steps known to the compiler: no branch, exact counts.

    For few steps and for timing; `plan` must hold numbers, not tracers, and be of a mode without threshold.
    """
    batch = keys_B.shape[0]
    if plan.mode in maskgit.OPEN_ENDED:
        raise ValueError(f"sampler mode {plan.mode!r} does not know its counts; unrolled sampling needs them")
    conds = conditions(plan, cond, null_cond)
    rows = batch * branches(plan)
    if 0 not in full_steps:
        raise ValueError(f"full steps {tuple(full_steps)} must hold step 0: there is no feature before it")
    steps, left = int(plan.num_steps), np.concatenate([[num_tokens], np.asarray(plan.masked_after)])
    plan = jax.tree.map(jnp.asarray, plan)
    carry = maskgit.begin(jnp.full((batch, num_tokens), mask_id, jnp.int32), first)
    start_B = jnp.full((batch,), num_tokens)
    for step in range(steps):

        def predict(features, _, ids_BN, commit_BN, step=step):
            runs = step in full_steps and (step > 0 or first is None)
            if runs:
                features = parts.features(*inputs(plan, jnp.int32(step), ids_BN, rows), conds)
            elif step:
                exact = controls_of(ids_BN, commit_BN == step - 1, int(left[step - 1] - left[step]))
                share_b = jnp.full((rows,), left[step] / num_tokens, jnp.float32)
                features = parts.advance(features, jax.tree.map(lambda x: tiled(x, rows), exact), share_b, conds)
            return guided(plan, jnp.int32(step), parts.head(features)), features, jnp.bool_(runs)

        carry = maskgit.call(predict, keys_B, plan, start_B, mask_id, carry)
    return maskgit.finish(carry)


def empty_features(parts: Parts, cond: Any, null_cond: Any, plan: Plan, num_tokens: int, mask_id: int) -> Array:
    """Features [branches * B, T, D] of a grid of MASK only: they depend on the condition alone (cached step 0)."""
    conds = conditions(plan, cond, null_cond)
    rows = len(jax.tree.leaves(conds)[0])
    empty = jnp.full((rows, num_tokens), mask_id, jnp.int32)
    return parts.features(empty, jnp.full((rows,), plan.timestep[0]), conds)


def branches(plan: Plan) -> int:
    """How many features a sample has: one for each branch of guidance."""
    return 2 if plan.guide else 1


def conditions(plan: Plan, cond: Any, null_cond: Any) -> Any:
    """Conditions of both branches, [branches * B, ...]."""
    return draws.with_null(cond, null_cond) if plan.guide else cond


def inputs(plan: Plan, step: Array, ids_BN: Array, rows: int) -> tuple[Array, Array]:
    """Tokens and timestep of both branches."""
    return tiled(ids_BN, rows), jnp.full((rows,), jnp.asarray(plan.timestep)[step])


def tiled(x: Array, rows: int) -> Array:
    """Rows repeated for every branch: conditional ones, then unconditional ones."""
    return jnp.tile(x, (rows // len(x), *[1] * (x.ndim - 1)))


def guided(plan: Plan, step: Array, logits: Array) -> Array:
    """Guidance mixes logits, never features; `step` is [] or one for each row."""
    return draws.mixed(*jnp.split(logits, 2), jnp.asarray(plan.guidance)[step]) if plan.guide else logits


def _drift(after: Array, before: Array, masked_bN: Array) -> Array:
    """Mean over masked positions of |f' - f| / |f| (extension 4); 0 where nothing is masked."""
    after, before = (x[:, : masked_bN.shape[1]] for x in (after, before))
    length = jnp.linalg.norm(before, axis=-1)
    share = jnp.linalg.norm(after - before, axis=-1) / jnp.maximum(length, 1e-6)
    return (share * masked_bN).sum() / jnp.maximum(masked_bN.sum(), 1)
