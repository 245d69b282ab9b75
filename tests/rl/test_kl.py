"""Divergence estimators (speed_rl spec 9, oracle 4)."""

import jax
import jax.numpy as jnp
import numpy as np

from maskrl_jax.rl import kl, surrogate
from maskrl_jax.sampling import draws

POLICY = jnp.log(jnp.array([0.5, 0.3, 0.2]))
REFERENCE = jnp.log(jnp.array([0.6, 0.3, 0.1]))


def logit_gradient(estimator, logits=POLICY):
    return jax.grad(lambda x: estimator(jax.nn.log_softmax(x)))(logits)


def test_forward_kl_by_hand():
    entropy = draws.entropy(REFERENCE)
    np.testing.assert_allclose(entropy, 0.897946, atol=1e-6)
    np.testing.assert_allclose(kl.forward_kl(POLICY, REFERENCE) + entropy, 0.938024, atol=1e-6)  # the cross-entropy
    np.testing.assert_allclose(kl.forward_kl(POLICY, REFERENCE), 0.040078, atol=1e-6)


def test_forward_gradient_is_policy_minus_reference():
    np.testing.assert_allclose(logit_gradient(lambda logp: kl.forward_kl(logp, REFERENCE)), [-0.1, 0.0, 0.1], atol=1e-6)


def test_mean_over_masked_positions_and_calls_divides_the_gradient():
    """Two of three positions are masked in one of five calls: a tenth of the gradient each."""
    weight = surrogate.kl_weight(jnp.array([[True, False, True]]), jnp.array([5]))

    def penalty(logits):
        return (kl.forward_kl(jax.nn.log_softmax(logits), jnp.stack([REFERENCE] * 3)[None]) * weight).sum()

    gradient = jax.grad(penalty)(jnp.stack([POLICY] * 3)[None])
    np.testing.assert_allclose(gradient, [[[-0.01, 0, 0.01], [0, 0, 0], [-0.01, 0, 0.01]]], atol=1e-7)


def test_reverse_gradient():
    value = 0.5 * np.log(0.5 / 0.6) + 0.2 * np.log(0.2 / 0.1)
    np.testing.assert_allclose(kl.reverse_kl(POLICY, REFERENCE), value, atol=1e-6)
    expected = np.array([0.5, 0.3, 0.2]) * (np.log([0.5 / 0.6, 1.0, 2.0]) - value)
    np.testing.assert_allclose(logit_gradient(lambda logp: kl.reverse_kl(logp, REFERENCE)), expected, atol=1e-6)


def test_k3_averages_to_the_reverse_kl():
    each = kl.k3(jnp.stack([POLICY] * 3), jnp.stack([REFERENCE] * 3), jnp.arange(3))
    np.testing.assert_allclose(each[0], 0.6 / 0.5 - 1 - np.log(0.6 / 0.5), atol=1e-6)
    np.testing.assert_allclose((each * jnp.exp(POLICY)).sum(), kl.reverse_kl(POLICY, REFERENCE), atol=1e-6)


def test_all_are_exactly_zero_at_the_start():
    logp = jax.nn.log_softmax(jax.random.normal(jax.random.key(0), (7, 50)))
    for value in (
        kl.forward_kl(logp, logp),
        kl.reverse_kl(logp, logp),
        kl.k3(logp, logp, jnp.zeros(7, jnp.int32)),
    ):
        np.testing.assert_array_equal(value, np.zeros(7))


def test_reference_gets_no_gradient():
    gradient = jax.grad(lambda ref: kl.forward_kl(POLICY, ref) + kl.reverse_kl(POLICY, ref))(REFERENCE)
    np.testing.assert_array_equal(gradient, np.zeros(3))
