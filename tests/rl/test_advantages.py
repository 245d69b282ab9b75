"""Group advantages and filters (speed_rl spec 9, oracles 5, 12 and 13)."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskrl_jax.rl import advantages as adv


def everyone(reward):
    return jnp.ones(reward.shape, bool)


def test_four_rewards_by_hand():
    reward = jnp.array([[1.0, 2.0, 3.0, 4.0]])
    np.testing.assert_allclose(
        adv.group_advantage(reward, everyone(reward)), [[-1.16181, -0.38727, 0.38727, 1.16181]], atol=1e-5
    )


def test_one_success_in_eight():
    reward = jnp.array([[0.0] * 7 + [1.0]])
    advantage = adv.group_advantage(reward, everyone(reward))
    np.testing.assert_allclose(advantage[0, [0, 7]], [-0.35345, 2.47417], atol=1e-5)


def test_constant_reward_teaches_nothing_and_has_no_spread():
    reward = jnp.full((1, 7), 0.1)
    np.testing.assert_array_equal(adv.group_advantage(reward, everyone(reward)), np.zeros((1, 7)))
    np.testing.assert_array_equal(adv.group_std(reward, everyone(reward)), [0.0])


def test_advantage_carries_no_gradient():
    gradient = jax.grad(lambda r: (adv.group_advantage(r, everyone(r)) * r).sum())(jnp.array([[1.0, 2.0, 4.0]]))
    np.testing.assert_allclose(gradient, adv.group_advantage(jnp.array([[1.0, 2.0, 4.0]]), jnp.ones((1, 3), bool)))


@pytest.mark.parametrize("dropped", [1e6, np.nan])
def test_dropped_rollouts_change_neither_mean_nor_std(dropped):
    reward = jnp.array([[1.0, dropped, 2.0, 3.0, 4.0]])
    keep = jnp.array([[True, False, True, True, True]])
    kept = jnp.array([[1.0, 2.0, 3.0, 4.0]])
    advantage = adv.group_advantage(reward, keep)
    np.testing.assert_allclose(advantage[:, [0, 2, 3, 4]], adv.group_advantage(kept, everyone(kept)), rtol=1e-6)
    assert advantage[0, 1] == 0
    np.testing.assert_allclose(adv.group_std(reward, keep), [np.std([1, 2, 3, 4], ddof=1)], rtol=1e-6)


def test_a_single_survivor_has_no_advantage():
    np.testing.assert_array_equal(
        adv.group_advantage(jnp.array([[5.0, 1.0]]), jnp.array([[True, False]])), [[0.0, 0.0]]
    )


def test_low_quality_is_measured_from_the_reference():
    """The floors are 1 - 3 x 0.5 and 2 - 3 x 0.5."""
    quality = jnp.array([[1.0, 2.0, 3.0, -0.6], [1.0, 2.0, 0.5, 0.4]])
    np.testing.assert_array_equal(
        adv.low_quality_mask(quality, jnp.array([[1.0], [2.0]]), 0.5), [[1, 1, 1, 0], [1, 1, 1, 0]]
    )


def test_clip_raises_low_quality_to_the_floor():
    np.testing.assert_allclose(adv.clip_low_quality(jnp.array([[1.0, -5.0]]), jnp.array([[1.0]]), 0.5), [[1.0, -0.5]])


def test_half_of_the_group_must_survive():
    keep = jnp.array([[True, True, False, False], [True, False, False, False]])
    np.testing.assert_array_equal(adv.enough_survivors(keep), [True, False])


def test_threshold_is_the_tenth_percentile_of_the_filled_part():
    history = adv.history_push(adv.history_create(1000), jnp.arange(1.0, 101.0), jnp.ones(100, bool))
    np.testing.assert_allclose(jax.jit(adv.history_threshold)(history), 10.9, rtol=1e-6)


@pytest.mark.parametrize(("count", "active"), [(0, False), (63, False), (64, True)])
def test_threshold_waits_for_64_groups(count, active):
    history = adv.history_push(adv.history_create(100), jnp.arange(1.0, 65.0), jnp.arange(64) < count)
    expected = np.percentile(np.arange(1.0, 65.0), 10) if active else -np.inf
    np.testing.assert_allclose(adv.history_threshold(history), expected, rtol=1e-6)


def test_ring_keeps_the_newest_and_skips_invalid_groups():
    push = jax.jit(adv.history_push)
    history = push(adv.history_create(4), jnp.array([1.0, 2.0, 3.0]), jnp.ones(3, bool))
    history = push(history, jnp.array([4.0, 9.0, 5.0]), jnp.array([True, False, True]))
    np.testing.assert_array_equal(history.values, [5.0, 2.0, 3.0, 4.0])
    assert int(history.count) == 5
    np.testing.assert_allclose(adv.history_threshold(history, percentile=50, min_count=1), 3.5)


def test_impossible_histories_are_refused():
    with pytest.raises(ValueError, match="capacity"):
        adv.history_create(0)
    with pytest.raises(ValueError, match="exceed"):
        adv.history_push(adv.history_create(2), jnp.ones(3), jnp.ones(3, bool))


@pytest.mark.parametrize(
    ("reward", "size", "chosen"),
    [
        ([3.0, 0.0, 2.0, 1.0], 2, [1, 1, 0, 0]),  # the best and the worst
        ([0.0, 0.0, 0.0, 9.0, 0.0], 3, [0, 0, 1, 1, 1]),  # one success: it, and two of the rest
        ([9.0, 9.0, 0.0, 9.0, 9.0], 3, [0, 0, 1, 1, 1]),  # one failure: it, and two of the rest
        ([1.0, 2.0, 3.0], 5, [1, 1, 1]),
    ],
)
def test_subset_of_largest_variance(reward, size, chosen):
    reward = jnp.array([reward])
    found = adv.max_variance_subset(reward, everyone(reward), size)
    assert found.astype(int).tolist() == [chosen]


def test_subset_has_the_largest_variance_of_all():
    reward = np.random.default_rng(0).normal(size=(6, 7)).astype(np.float32)
    keep = np.random.default_rng(1).random((6, 7)) < 0.8
    found = np.asarray(adv.max_variance_subset(jnp.asarray(reward), jnp.asarray(keep), 4))
    assert not (found & ~keep).any()
    for values, kept, chosen in zip(reward, keep, found, strict=True):
        assert chosen.sum() == min(4, kept.sum())
        best = max(np.var(c) for c in itertools.combinations(values[kept], int(chosen.sum())))
        np.testing.assert_allclose(np.var(values[chosen]), best, rtol=1e-5)


def test_what_is_below_zero_is_lightened_and_nothing_else():
    advantage = jnp.array([[-2.0, 0.0, 1.5], [3.0, -0.5, -1.0]])
    np.testing.assert_array_equal(adv.lighten_negative(advantage, 1.0), advantage)
    np.testing.assert_allclose(adv.lighten_negative(advantage, 0.25), [[-0.5, 0, 1.5], [3.0, -0.125, -0.25]])
    assert adv.lighten_negative(advantage, 0.0).min() == 0
