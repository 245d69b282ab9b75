"""What the head sees of a state (speed_rl spec 4.4)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskrl_jax.sampling import observation


def test_features_by_hand():
    probability = np.array([[[0.5, 0.5], [0.9, 0.1], [0.7, 0.3]]])
    masked = jnp.array([[True, False, True]])
    found = observation.features(
        jnp.log(jnp.float32(probability)), masked, jnp.array([480]), jnp.array([6]), ticks=960, max_calls=24
    )
    entropy = [np.log(2), -(0.7 * np.log(0.7) + 0.3 * np.log(0.3))]
    quantiles = np.quantile([0.5, 0.7], np.arange(0.05, 1, 0.1))
    expected = [2 / 3, 0.5, 0.25, np.mean(entropy) / np.log(2), np.log([0.5, 0.7]).mean(), *quantiles]
    np.testing.assert_allclose(found, [expected], rtol=1e-5)
    assert found.shape == (1, observation.NUM_FEATURES)


@pytest.mark.parametrize("count", [0, 1, 2, 17, 40])
def test_masked_quantiles_equal_numpy(count):
    values = np.random.default_rng(0).random((1, 40), np.float32)
    masked = np.zeros((1, 40), bool)
    masked[0, np.random.default_rng(1).permutation(40)[:count]] = True
    expected = np.quantile(values[masked], observation.QUANTILES) if count else np.zeros(10)
    np.testing.assert_allclose(
        observation.masked_quantiles(jnp.asarray(values), jnp.asarray(masked))[0], expected, atol=1e-6
    )


def test_features_are_an_observation_without_gradient():
    logp = jax.nn.log_softmax(jax.random.normal(jax.random.key(0), (1, 4, 3)))
    zero = jnp.zeros(1, jnp.int32)
    gradient = jax.grad(
        lambda x: observation.features(x, jnp.ones((1, 4), bool), zero, zero, ticks=6, max_calls=3).sum()
    )(logp)
    np.testing.assert_array_equal(gradient, np.zeros((1, 4, 3)))
