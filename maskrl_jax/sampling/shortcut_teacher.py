"""The teacher of a feature shortcut: rollouts that keep their features, what of them it learns from, and steps anew."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from maskrl_jax.sampling import maskgit
from maskrl_jax.sampling.maskgit import GIVEN, Plan, Rollout
from maskrl_jax.sampling.shortcut import Controls, Parts, branches, conditions, controls_of, guided, inputs, tiled

Array = jax.Array
LATER = GIVEN - 1  # commit step of a token that is not drawn yet


def predict_fully(parts: Parts, cond: Any, null_cond: Any, plan: Plan, given_BN: Array) -> tuple[Callable, Array]:
    """Prediction for `maskgit.fill` that runs the full model at every step and keeps its features.

    Returns (predict, memory): a buffer float32 [S, branches * B, T, D] that it fills.
    """
    conds, rows = conditions(plan, cond, null_cond), len(given_BN) * branches(plan)
    struct = jax.eval_shape(parts.features, *inputs(plan, jnp.int32(0), given_BN, rows), conds)

    def predict(kept, step, ids_BN, _):
        features = parts.features(*inputs(plan, step, ids_BN, rows), conds)
        return guided(plan, step, parts.head(features)), kept.at[step].set(features), jnp.bool_(True)

    return predict, jnp.zeros((len(plan.masked_after), *struct.shape), struct.dtype)


def step_pairs(rollout: Rollout, step_B: Array, most: int) -> tuple[Array, Controls, Array]:
    """What the shortcut reads on its way from a step to the next, out of finished rollouts of empty grids.

    Args:
      rollout: B samples. A token never changes once revealed, so ids and commit steps tell every earlier state.
      step_B: int32 [B], s: the feature of s is known, that of s + 1 is wanted.
    Returns:
      (positions still masked at s + 1, bool [B,N]; controls revealed at s; their share rho_{s+1}, float32 [B]).
    """
    commit_BN = jnp.where(rollout.commit_step == GIVEN, -1, rollout.commit_step.astype(jnp.int32))
    masked_BN = commit_BN > step_B[:, None]
    controls = controls_of(rollout.ids, commit_BN == step_B[:, None], most)
    return masked_BN, controls, masked_BN.mean(-1, dtype=jnp.float32)


def redraw(
    parts: Parts,
    keys_b: Array,
    cond: Any,
    null_cond: Any,
    plan: Plan,
    rollout: Rollout,
    step_b: Array,
    features: Array,
    mask_id: int,
) -> tuple[Rollout, Array]:
    """Take one step of rollouts from empty grids anew, each its own, with other features.

    Args:
      step_b: int32 [b], the step that is taken; `features` [branches * b, T, D] stand for those of the model at it.
    Returns:
      (the rollouts, whose tokens from that step on are forgotten and those of the step drawn anew: commit step `LATER`
      where nothing is drawn yet; the full model's features [branches * b, T, D] at the step that follows).
    """
    plan, num_tokens = jax.tree.map(jnp.asarray, plan), rollout.ids.shape[1]
    known_bN = rollout.commit_step.astype(jnp.int32) < step_b[:, None]
    ids_bN = jnp.where(known_bN, rollout.ids, mask_id)
    commit_bN = jnp.where(known_bN, rollout.commit_step, jnp.uint8(GIVEN))

    def one(key, step, ids, commit, logits):
        carry = maskgit.begin(ids[None], ()).replace(step=step, commit_step=commit[None])
        start = jnp.full((1,), num_tokens)
        predict = lambda memory, *_: (logits[None], memory, jnp.bool_(True))  # noqa: E731
        made = maskgit.call(predict, key[None], plan, start, mask_id, carry)
        return made.ids[0], made.commit_step[0]

    logits = guided(plan, step_b, parts.head(features))
    ids_bN, commit_bN = jax.vmap(one)(keys_b, step_b, ids_bN, commit_bN, logits)
    commit_bN = jnp.where(ids_bN == mask_id, jnp.uint8(LATER), commit_bN)
    rows, after_b = len(features), jnp.minimum(step_b + 1, len(plan.timestep) - 1)
    wanted = parts.features(tiled(ids_bN, rows), tiled(plan.timestep[after_b], rows), conditions(plan, cond, null_cond))
    return Rollout(ids_bN, commit_bN, rollout.calls), wanted
