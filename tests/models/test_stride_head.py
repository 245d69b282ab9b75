"""Decision heads at their start."""

import jax
import jax.numpy as jnp
import numpy as np

from maskrl_jax.models.stride_head import StrideHead, ThresholdHead
from maskrl_jax.rl.stride import PriorConfig, decision_logits, prior_bias


def features():
    return jax.random.normal(jax.random.key(1), (3, 15))


def test_head_starts_as_the_prior_for_every_state():
    bias = prior_bias(PriorConfig())
    (logits, _, eta), _ = StrideHead(bias).init_with_output(jax.random.key(0), features())
    np.testing.assert_allclose(logits, np.tile(np.float32(bias), (3, 1)))
    assert float(eta) == 4.0


def test_output_weights_and_stickiness_get_gradient_and_the_features_none():
    head = StrideHead((0.0, 1.0), hidden=(8,))
    params = head.init(jax.random.key(0), features())
    params["params"]["out"]["kernel"] += 0.1  # at the start nothing would reach the features anyhow

    def loss(params, x):
        logits, _, eta = head.apply(params, x)
        sticky = decision_logits(logits, jnp.zeros(3, jnp.int32), eta, jnp.zeros(3, bool))
        return jax.nn.log_softmax(sticky)[:, 0].sum()

    gradient, to_features = jax.grad(loss, argnums=(0, 1))(params, features())
    assert np.abs(gradient["params"]["out"]["kernel"]).max() > 0
    assert float(gradient["params"]["eta"]) != 0
    np.testing.assert_array_equal(to_features, np.zeros((3, 15)))


def test_threshold_head_starts_at_its_law():
    (mean, std), _ = ThresholdHead(mean=1.5, std=0.5).init_with_output(jax.random.key(0), features())
    np.testing.assert_allclose(mean, [1.5] * 3)
    np.testing.assert_allclose(std, [0.5] * 3)
