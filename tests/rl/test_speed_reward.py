"""Speed reward, gate and weight, by hand (speed_rl spec 4.5)."""

import jax.numpy as jnp
import numpy as np
import pytest

from maskrl_jax.rl import speed_reward as sp


def test_speed_reward_is_linear_between_the_bounds():
    calls = jnp.array([1, 4, 14, 24, 30])
    np.testing.assert_allclose(sp.speed_reward(calls, 24, 4), [1.0, 1.0, 0.5, 0.0, 0.0])


def test_impossible_bounds_are_refused():
    with pytest.raises(ValueError, match="min_calls"):
        sp.speed_reward(3, 4, 4)


def test_gate_allows_half_a_sigma():
    quality, reference = jnp.array([[0.5, 0.75, 1.0]]), jnp.array([[1.0]])
    np.testing.assert_array_equal(sp.quality_gate(quality, reference, 0.5), [[0.0, 1.0, 1.0]])
    soft = sp.quality_gate(quality, reference, 0.5, kind="soft")
    np.testing.assert_allclose(soft, [[1 / (1 + np.exp(2)), 0.5, 1 / (1 + np.exp(-2))]], rtol=1e-5)
    np.testing.assert_array_equal(sp.quality_gate(quality, reference, 0.5, kind="off"), [[1.0, 1.0, 1.0]])
    with pytest.raises(ValueError, match="gate"):
        sp.quality_gate(quality, reference, 0.5, kind="none")


@pytest.mark.parametrize(("step", "value"), [(0, 0.0), (50, 0.0), (150, 0.5), (250, 1.0), (900, 1.0)])
def test_lambda_ramp(step, value):
    np.testing.assert_allclose(sp.lambda_schedule(jnp.int32(step), zero_until=50, full_at=250, value=1.0), value)


@pytest.mark.parametrize(("step", "value"), [(4, 0.0), (5, 0.4), (6, 0.4)])
def test_lambda_without_a_ramp_is_whole_from_its_first_update_on(step, value):
    np.testing.assert_allclose(sp.lambda_schedule(jnp.int32(step), zero_until=5, full_at=5, value=0.4), value)
    np.testing.assert_allclose(sp.lambda_schedule(jnp.int32(0), zero_until=0, full_at=0, value=0.4), 0.4)


def test_lambda_ramp_must_not_run_backwards():
    with pytest.raises(ValueError, match="zero_until"):
        sp.lambda_schedule(0, zero_until=5, full_at=4, value=1.0)


def test_dual_lambda_follows_the_quality_surplus_of_the_valid_groups():
    quality, reference = jnp.array([[1.5, 2.5], [9.0, jnp.nan]]), jnp.array([[1.0], [0.0]])
    valid = jnp.array([True, False])
    np.testing.assert_allclose(sp.dual_lambda(1.0, quality, reference, 0.5, valid), np.exp(0.02 * 2), rtol=1e-6)
    assert float(sp.dual_lambda(1.0, quality, reference, 0.5, jnp.zeros(2, bool))) == 1.0


@pytest.mark.parametrize(("weight", "surplus", "bound"), [(4.99, 9.0, 5.0), (0.051, -9.0, 0.05)])
def test_dual_lambda_is_bounded(weight, surplus, bound):
    found = sp.dual_lambda(weight, jnp.array([[surplus]]), jnp.array([[0.0]]), 0.5, jnp.array([True]))
    np.testing.assert_allclose(found, bound)


def test_total_reward_is_in_units_of_sigma():
    np.testing.assert_allclose(
        sp.total_reward(jnp.array([1.0, 1.0]), 0.5, jnp.array([0.5, 0.5]), jnp.array([1.0, 0.0]), 0.8),
        [2.4, 2.0],
    )


def test_sigma_starts_at_the_first_batch_and_skips_invalid_groups():
    sigma = sp.update_sigma(jnp.float32(0), jnp.array([0.2, 0.4, 9.0]), jnp.array([True, True, False]))
    np.testing.assert_allclose(sigma, 0.3, rtol=1e-6)
    sigma = sp.update_sigma(sigma, jnp.array([1.3, jnp.nan]), jnp.array([True, False]))
    np.testing.assert_allclose(sigma, 0.99 * 0.3 + 0.01 * 1.3, rtol=1e-6)
    np.testing.assert_allclose(sp.update_sigma(sigma, jnp.array([9.0]), jnp.array([False])), sigma)


def test_sigma_never_reaches_zero():
    np.testing.assert_allclose(sp.update_sigma(jnp.float32(0), jnp.zeros(2), jnp.ones(2, bool)), 1e-3)
