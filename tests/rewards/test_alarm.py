"""The reward-hacking alarm, on made-up runs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskrl_jax.rewards import alarm

CONFIG = alarm.AlarmConfig()


def fired(trained, held_out, looks=None):
    """Watch a run; return how often each alarm fired, and its last memory."""
    looks = np.ones((len(trained), 2)) if looks is None else looks
    watch, state = jax.jit(lambda s, v: alarm.watch(CONFIG, s, v)), alarm.create(2)
    counts = {"held_out": 0.0, "pictures": 0.0}
    for values in np.column_stack([trained, held_out, looks]):
        state, found = watch(state, jnp.asarray(values, jnp.float32))
        counts = {name: count + float(found[name]) for name, count in counts.items()}
    return counts, state


def noise(seed, size=80):
    return 0.02 * np.random.default_rng(seed).normal(size=size)


RISE, FALL = np.linspace(0.4, 0.9, 80), np.linspace(0.9, 0.4, 80)


@pytest.mark.parametrize("seed", range(3))
def test_it_fires_where_reward_rises_and_the_held_out_one_falls(seed):
    assert fired(RISE + noise(seed), FALL + noise(seed + 9))[0]["held_out"] > 20


@pytest.mark.parametrize(("trained", "held_out"), [(RISE, RISE), (FALL, FALL), (FALL, RISE), (0 * RISE, 0 * RISE)])
def test_it_is_silent_elsewhere(trained, held_out):
    for seed in range(3):
        assert fired(trained + noise(seed), held_out + noise(seed + 9))[0] == {"held_out": 0, "pictures": 0}


def test_pictures_that_drift_while_reward_rises():
    looks = np.ones((80, 2))
    looks[:, 1] = np.linspace(1, 0.2, 80)
    assert fired(RISE, RISE, looks)[0]["pictures"] > 10
    assert fired(FALL, FALL, looks)[0]["pictures"] == 0  # nothing was gained by it


def test_a_failed_update_leaves_the_memory_as_it_was():
    _, state = fired(RISE[:10], RISE[:10])
    after, found = alarm.watch(CONFIG, state, jnp.array([np.nan, 1.0, 1.0, 1.0]))
    jax.tree.map(np.testing.assert_array_equal, after, state)
    assert float(found["held_out"]) == float(found["pictures"]) == 0


def test_means_of_the_first_updates():
    _, state = fired(np.array([1.0, 2.0, 6.0]), np.array([0.0, 0.0, 3.0]))
    np.testing.assert_allclose(state.slow[:2], [3.0, 1.0], rtol=1e-6)
    np.testing.assert_allclose(state.opening[:2], [3.0, 1.0], rtol=1e-6)
    assert int(state.count) == 3


@pytest.mark.parametrize(
    ("fields", "words"), [({"fast": 0.99}, "must rise"), ({"slow": 1.0}, "must rise"), ({"drift": 0.0}, "above 0")]
)
def test_settings_that_cannot_be(fields, words):
    with pytest.raises(ValueError, match=words):
        alarm.AlarmConfig(**fields)
