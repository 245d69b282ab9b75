"""Stride head maths: decisions, prior (speed_rl spec 4.4; spec 9, oracle 10)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskrl_jax.rl import stride
from maskrl_jax.sampling.clock import Clock, next_masked

PRIOR = stride.PriorConfig()


def test_prior_bias_peaks_at_the_centre():
    bias = stride.prior_bias(PRIOR)
    assert bias[2] == 0.0
    np.testing.assert_allclose(bias[0], -(np.log(24 / 16) ** 2) / 0.32)


def test_jumps_of_the_published_clock():
    assert stride.jumps(PRIOR.divisors, 960).tolist() == [40, 48, 60, 80, 96, 120, 160, 240, 320, 480, 960]
    with pytest.raises(ValueError, match="divide"):
        stride.jumps((7,), 960)


@pytest.mark.parametrize("wrong", [{"divisors": ()}, {"divisors": (4, 4)}, {"divisors": (0,)}, {"width": 0.0}])
def test_impossible_priors_are_refused(wrong):
    with pytest.raises(ValueError, match="must be"):
        stride.PriorConfig(**wrong)


def test_decisions_are_a_law_and_sticky_after_the_first_call():
    net = jnp.zeros((2, 3))
    logits = stride.decision_logits(net, jnp.array([1, 1]), jnp.float32(4.0), jnp.array([True, False]))
    np.testing.assert_array_equal(logits, [[0, 0, 0], [0, 4, 0]])
    each = [stride.decision_logp(logits, jnp.full(2, d)) for d in range(3)]
    np.testing.assert_allclose(np.exp(each).sum(0), [1.0, 1.0], rtol=1e-6)


def test_decision_entropy_of_a_flat_head():
    np.testing.assert_allclose(stride.decision_entropy(jnp.zeros((1, 11))), [np.log(11)], rtol=1e-6)


def prior_calls(prior, clock, rows):
    """Roll the untrained head out and count the calls, [rows]."""
    bias, jump = (
        jnp.asarray(stride.prior_bias(prior), jnp.float32),
        jnp.asarray(stride.jumps(prior.divisors, clock.ticks)),
    )
    max_calls = max(prior.divisors)

    def call(state, k):
        tick, previous, masked, calls = state
        logits = stride.decision_logits(
            jnp.broadcast_to(bias, (rows, bias.size)),
            previous,
            prior.stickiness,
            jnp.broadcast_to(k == 0, (rows,)),
        )
        decision = jax.random.categorical(jax.random.fold_in(jax.random.key(0), k), logits)
        after = tick + jump[decision]
        return (after, decision, next_masked(clock, after, masked), calls + (masked > 0)), None

    zero = jnp.zeros(rows, jnp.int32)
    start = (zero, zero, jnp.full(rows, clock.num_tokens), zero)
    (_, _, masked, calls), _ = jax.lax.scan(call, start, jnp.arange(max_calls))
    return masked, calls


def test_untrained_head_makes_about_sixteen_calls_and_always_ends():
    masked, calls = jax.jit(lambda: prior_calls(PRIOR, Clock(4096), 20_000))()
    assert int(masked.max()) == 0
    assert int(calls.max()) <= 24
    np.testing.assert_allclose([calls.mean(), calls.std()], [15.8, 3.6], atol=0.1)


def test_threshold_action_is_scored_as_a_normal_law():
    logp = stride.threshold_logp(jnp.array([1.0]), jnp.array([0.0]), jnp.array([2.0]))
    np.testing.assert_allclose(logp, [-0.125 - np.log(2) - 0.5 * np.log(2 * np.pi)], rtol=1e-6)
    entropy = stride.threshold_entropy(jnp.array([2.0]))
    np.testing.assert_allclose(entropy, [0.5 * np.log(2 * np.pi * np.e * 4)], rtol=1e-6)
