"""Random keys are derived, never threaded: results do not depend on devices, batch split or restarts."""

import jax

Array = jax.Array

# Purposes. 0 and 1 stand for none: numbering from 0 would change every key, and with it all that was ever drawn.
TRAIN, ROLLOUT, EVALUATE, MASKS, STEPS, STUDENT = range(2, 8)


def step_key(seed: int, purpose: int, step: Array | int) -> Array:
    """Typed key of one purpose at one step."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), purpose), step)


def sample_keys(seed: int, purpose: int, step: Array | int, index_B: Array) -> Array:
    """One typed key per sample, [B], from its global sample index int32 [B]."""
    key = step_key(seed, purpose, step)
    return jax.vmap(lambda index: jax.random.fold_in(key, index))(index_B)
