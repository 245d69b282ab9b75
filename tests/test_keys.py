"""Keys depend on seed, purpose, step and sample, and on nothing else."""

import jax
import jax.numpy as jnp
import numpy as np

from maskrl_jax import keys


def bits(key):
    return [tuple(row) for row in np.asarray(jax.random.key_data(key)).reshape(-1, 2).tolist()]


def test_every_coordinate_gives_another_key():
    purposes = (keys.TRAIN, keys.ROLLOUT, keys.EVALUATE, keys.MASKS)
    steps = [keys.step_key(seed, purpose, step) for seed in (0, 1) for purpose in purposes for step in (0, 1)]
    samples = keys.sample_keys(0, keys.ROLLOUT, 0, jnp.arange(9))
    found = [b for key in steps for b in bits(key)] + bits(samples)
    assert len(set(found)) == len(found) == 2 * 4 * 2 + 9


def test_a_sample_keeps_its_key_in_any_batch_and_under_jit():
    everyone = bits(keys.sample_keys(3, keys.TRAIN, 5, jnp.arange(8)))
    some = jax.jit(lambda step, index: keys.sample_keys(3, keys.TRAIN, step, index))(5, jnp.array([6, 2]))
    assert bits(some) == [everyone[6], everyone[2]]


def test_keys_are_typed():
    assert jnp.issubdtype(keys.sample_keys(0, keys.TRAIN, 0, jnp.arange(2)).dtype, jax.dtypes.prng_key)
