"""The policy gradient of tokens with noise about them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskrl_jax.rl import action_noise, surrogate
from maskrl_jax.rl.action_noise import ActionNoise

PLAIN = ActionNoise(deviation=0.3, clip=0.0, kl=0.0)


def mean_of(params, zeta):
    return params["scale"] * zeta + params["shift"]


def reward(actions):
    """Of a rollout of [..., L, C]: smooth, and not a sum over tokens."""
    return jnp.sin(actions.sum((-2, -1))) + (actions[..., 0, :] * actions[..., -1, :]).sum(-1)


@functools.partial(jax.jit, static_argnums=2)
def gradients(params, key, count):
    """(of the policy, through the actions), means over rollouts of 2 tokens of 1 channel."""
    zeta_key, noise_key = jax.random.split(key)
    zeta, noise = (jax.random.normal(k, (count, 2, 1)) for k in (zeta_key, noise_key))
    action = mean_of(params, zeta) + PLAIN.deviation * noise

    def by_policy(p):
        both = action_noise.log_densities(PLAIN, mean_of(p, zeta), action, noise)
        # A baseline that knows zeta alone leaves the expectation as it is.
        advantage = reward(action) - reward(mean_of(params, zeta))
        low, high = PLAIN.clip_range
        ones = jnp.ones_like(both[0])
        return surrogate.clipped_surrogate(*both, advantage[:, None], ones, low=low, high=high) / count

    def through(p):
        return reward(mean_of(p, zeta) + PLAIN.deviation * noise).mean()

    return jax.grad(by_policy)(params), jax.grad(through)(params)


def test_the_expected_gradient_is_that_through_the_actions():
    """specs/marval.md section 15, item 9."""
    params = {"scale": jnp.float32(0.7), "shift": jnp.float32(0.4)}
    found, expected = gradients(params, jax.random.key(0), 400_000)
    for name in params:
        np.testing.assert_allclose(found[name], expected[name], atol=0.015)
        assert abs(float(expected[name])) > 0.1


def test_fresh_actions_have_a_ratio_of_one():
    mean, noise = jnp.array([[0.3, -0.2]]), jnp.array([[1.0, -0.5]])
    now, then = action_noise.log_densities(PLAIN, mean, mean + PLAIN.deviation * noise, noise)
    np.testing.assert_allclose(now, then, atol=1e-6)
    # As normal densities say it.
    other = mean + 0.1
    density = lambda m: -jnp.square((mean + 0.3 * noise - m) / 0.3).sum(-1) / 2  # noqa: E731
    now, then = action_noise.log_densities(PLAIN, other, mean + 0.3 * noise, noise)
    np.testing.assert_allclose(now - then, density(other) - density(mean), rtol=1e-5)


def test_the_divergence_is_that_of_two_normal_laws():
    mean, reference = jnp.array([0.1, 0.2]), jnp.array([0.4, -0.2])
    assert action_noise.divergence(PLAIN, mean, reference) == pytest.approx(0.25 / (2 * 0.09))
    pull = jax.grad(lambda r: action_noise.divergence(PLAIN, mean, r))(reference)
    np.testing.assert_array_equal(pull, 0)


@pytest.mark.parametrize(
    "bad", [{"deviation": 0.0}, {"clip": 1.0}, {"kl": -1.0}, {"group": 1}, {"updates": 0}, {"iterations": -1}]
)
def test_bad_settings_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        ActionNoise(**bad)
