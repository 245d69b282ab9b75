"""Several rewards as one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskrl_jax.errors import UserError
from maskrl_jax.rewards import mix

SCORES = {"judge": jnp.array([0.5, 1.0]), "judge_shown": jnp.array([1.0, 0.0]), "judge_whole": jnp.array([9.0, 9.0])}


def test_weighted_sum_of_the_named_rewards():
    found = mix.weighted_sum(SCORES, {"judge": 2.0, "judge_shown": -0.5})
    np.testing.assert_allclose(found, [0.5, 2.0])


def test_gradient_flows_by_weight():
    gradient = jax.grad(lambda s: mix.weighted_sum(s, {"judge": 2.0}).sum())(SCORES)
    assert {name: x.tolist() for name, x in gradient.items()} == {
        "judge": [2, 2],
        "judge_shown": [0, 0],
        "judge_whole": [0, 0],
    }


def test_known_rewards_pass():
    mix.check({"judge": 1.0, "judge_whole": 0.1}, tuple(SCORES))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({}, "rewards is empty; name at least one"),
        ({"judge": 1.0, "beauty": 1.0}, "unknown reward 'beauty'; this judge gives: judge, judge_shown, judge_whole"),
    ],
)
def test_unknown_or_no_rewards_are_refused(weights, message):
    with pytest.raises(UserError, match=message):
        mix.check(weights, tuple(SCORES))


def test_standardised_rewards_have_the_same_spread_in_every_group():
    scores = {"judge": np.array([0.0, 1.0, 5.0, 5.0]), "geneval": np.array([0.0, 100.0, 1.0, 0.0])}
    found = mix.standardised(scores, 2)
    np.testing.assert_allclose(found["judge"], [-0.70700, 0.70700, 0, 0], atol=2e-4)
    np.testing.assert_allclose(found["geneval"], [-0.70711, 0.70711, 0.70700, -0.70700], atol=2e-4)


@pytest.mark.parametrize(
    ("held_out", "message"),
    [(("beauty",), "unknown held-out reward 'beauty'; there are: judge"), (("judge",), "trained on and held out")],
)
def test_what_is_held_out_exists_and_is_not_trained_on(held_out, message):
    with pytest.raises(UserError, match=message):
        mix.check_held_out(held_out, {"judge": 1.0}, tuple(SCORES))
    mix.check_held_out(("judge_whole", "judge"), {"judge": 0.0}, tuple(SCORES))
