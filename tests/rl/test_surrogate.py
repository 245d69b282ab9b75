"""Clipped objective and the assembly of the loss (speed_rl spec 9, oracles 3, 6 and 12)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskrl_jax.rl import surrogate as sur


def objective(ratio, advantage):
    one = jnp.ones((1,))
    return sur.clipped_surrogate(
        jnp.log(jnp.full((1,), ratio)), 0 * one, jnp.full((1,), advantage), one, low=0.1, high=0.2
    )


@pytest.mark.parametrize(
    ("advantage", "ratio", "value", "gradient"),
    [
        (1.0, 1.3, 1.2, 0.0),
        (1.0, 0.8, 0.8, 1.0),
        (-1.0, 0.8, -0.9, 0.0),
        (-1.0, 1.3, -1.3, -1.0),
        (1.0, 1.0, 1.0, 1.0),
    ],
)
def test_asymmetric_clip(advantage, ratio, value, gradient):
    np.testing.assert_allclose(objective(ratio, advantage), value, rtol=1e-6)
    np.testing.assert_allclose(jax.grad(objective)(ratio, advantage), gradient, atol=1e-6)


def test_padding_changes_nothing_whatever_it_holds():
    logp = jnp.array([[-1.0, jnp.inf], [-2.0, jnp.nan]])
    weight = jnp.array([[1.0, 0.0], [1.0, 0.0]])

    def total(x):
        return sur.clipped_surrogate(x, jnp.zeros((2, 2)), jnp.ones((2, 1)), weight, low=0.2, high=0.2)

    value, gradient = jax.value_and_grad(total)(logp)
    np.testing.assert_allclose(value, np.exp(-1) + np.exp(-2), rtol=1e-6)
    np.testing.assert_allclose(gradient, [[np.exp(-1), 0], [np.exp(-2), 0]], rtol=1e-6)


def test_gradient_before_the_first_update_is_reinforce():
    logp, advantage = jnp.array([[-1.0, -0.3], [-2.0, -0.1]]), jnp.array([[2.0], [-1.0]])
    gradient = jax.grad(lambda x: sur.clipped_surrogate(x, x, advantage, jnp.ones((2, 2)), low=0.1, high=0.2))(logp)
    np.testing.assert_allclose(gradient, [[2.0, 2.0], [-1.0, -1.0]], rtol=1e-6)


def test_clip_fraction_counts_terms_without_gradient():
    logp = jnp.log(jnp.array([1.3, 0.8, 0.8, 1.3, 9.0]))
    advantage = jnp.array([1.0, 1.0, -1.0, -1.0, 1.0])
    weight = jnp.array([0.5, 0.5, 0.5, 0.5, 0.0])
    clipped, count = sur.clip_fraction(logp, jnp.zeros(5), advantage, weight, low=0.1, high=0.2)
    assert (float(clipped), float(count)) == (2.0, 4.0)


def test_ratio_error_is_exactly_zero_before_the_first_update():
    logp = jnp.array([-1.0, jnp.nan])
    assert float(sur.ratio_error(logp, logp, jnp.array([1.0, 0.0]))) == 0.0
    np.testing.assert_allclose(sur.ratio_error(jnp.log(jnp.array([1.2])), jnp.zeros(1), jnp.ones(1)), 0.2, rtol=1e-5)


def test_term_weights_give_every_rollout_the_same_mass():
    weights = sur.term_weights(jnp.array([4, 24]), num_tokens=64, max_calls=24)
    np.testing.assert_allclose(weights.token, [1 / 64, 1 / 64])
    np.testing.assert_allclose(weights.decision, [1 / 24, 1 / 24])


def test_per_rollout_mean_divides_by_the_calls():
    weights = sur.term_weights(jnp.array([4, 24]), num_tokens=64, max_calls=24, per_rollout_mean=True)
    np.testing.assert_allclose(weights.token, [6 / 64, 1 / 64], rtol=1e-6)
    np.testing.assert_allclose(weights.decision, [1 / 4, 1 / 24], rtol=1e-6)


def test_kl_and_budget_weights_are_means_over_masked_positions():
    masked = jnp.array([[True, True, False], [False, False, False]])
    np.testing.assert_allclose(sur.kl_weight(masked, jnp.array([4, 4])), [[0.125, 0.125, 0], [0, 0, 0]])
    np.testing.assert_allclose(sur.budget_weight(masked, levels=5), [[0.1, 0.1, 0], [0, 0, 0]])


def rollout_terms(rows):
    """Sum the terms of some of four rollouts of N = 3 tokens, R re-masked, D decisions; one is dropped."""
    advantage, survives = jnp.array([1.0, -0.5, 2.0, 0.7]), jnp.array([1.0, 1.0, 1.0, 0.0])
    remasked, decisions = jnp.array([0, 2, 3, 1]), jnp.array([1, 2, 3, 2])
    weights = sur.term_weights(decisions, num_tokens=3, max_calls=3)
    token = (jnp.arange(6)[None] < 3 + remasked[:, None]) * (survives * weights.token)[:, None]
    decision = (jnp.arange(3)[None] < decisions[:, None]) * (survives * weights.decision)[:, None]
    sums = [
        sur.clipped_surrogate(jnp.zeros_like(w), jnp.zeros_like(w), advantage[:, None], w, low=0.1, high=0.2)
        for w in (jnp.where(rows[:, None], token, 0), jnp.where(rows[:, None], decision, 0))
    ]
    return sur.Terms(*sums, kl=jnp.float32(0.4) * rows.sum(), entropy=jnp.float32(2.0) * (rows * decisions).sum())


TOTALS = sur.Normalisers(survivors=3.0, deciders=3.0, decisions=8.0)


def test_policy_loss_at_ratio_one_counts_the_terms():
    """-mean_j A_j (1 + sum_k |R_k| / N + D_j / T_max) over the survivors."""
    everyone = jnp.ones(4, bool)
    loss = sur.policy_loss(rollout_terms(everyone), TOTALS, kl_coefficient=0.0, entropy_coefficient=0.0)
    expected = -(1.0 * (1 + 1 / 3) - 0.5 * (1 + 2 / 3 + 2 / 3) + 2.0 * (1 + 1 + 1)) / 3
    np.testing.assert_allclose(loss, expected, rtol=1e-6)


def test_policy_loss_adds_the_mean_kl_of_the_survivors_and_takes_away_entropy():
    terms = sur.Terms(*(jnp.float32(x) for x in (0.0, 0.0, 2.0, 8.0)))
    loss = sur.policy_loss(terms, TOTALS, kl_coefficient=0.1, entropy_coefficient=0.01)
    np.testing.assert_allclose(loss, 0.1 * 2 / 3 - 0.01 * 8 / 8, rtol=1e-6)


def test_tokens_and_decisions_are_averaged_over_their_own_rollouts():
    terms = sur.Terms(*(jnp.float32(x) for x in (6.0, 6.0, 0.0, 0.0)))
    totals = sur.Normalisers(survivors=2.0, deciders=3.0, decisions=8.0)
    loss = sur.policy_loss(terms, totals, kl_coefficient=0.0, entropy_coefficient=0.0)
    np.testing.assert_allclose(loss, -(6 / 2 + 6 / 3), rtol=1e-6)


def test_losses_of_micro_batches_add_up():
    coefficients = {"kl_coefficient": 0.1, "entropy_coefficient": 0.01}
    parts = [
        jnp.array([True, False, False, True]),
        jnp.array([False, True, False, False]),
        jnp.array([False, False, True, False]),
        jnp.zeros(4, bool),
    ]
    whole = sur.policy_loss(rollout_terms(jnp.ones(4, bool)), TOTALS, **coefficients)
    np.testing.assert_allclose(
        sum(sur.policy_loss(rollout_terms(p), TOTALS, **coefficients) for p in parts), whole, rtol=1e-6
    )
