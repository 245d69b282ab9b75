"""The surrogate update of policy `budget`: likelihoods of randomly masked final images (speed_rl spec 4.3)."""

import jax
import jax.numpy as jnp
import numpy as np
import toy_model
from toy_update import (
    MASK,
    MODEL,
    ROWS,
    TOKENS,
    batch_of,
    changed,
    close,
    params_of,
    policy_gradient,
)

BUDGET = {"kind": "budget", "step_set": (5, 3), "levels": 3, "temperature": 1.0}


def budget():
    return changed(policy=BUDGET, tokens={"distribution": "cond", "temperature": 1.0})


@jax.jit
def budget_calls(batch):
    return budget()._budget_calls(batch)[1](jnp.arange(ROWS * 3), jnp.ones(ROWS * 3, bool))[0]


def masks(batch):
    """Calls of all rollouts at all levels, and their inputs [rollouts, levels, N]."""
    calls = budget_calls(batch)
    return calls, np.asarray(calls.inputs).reshape(ROWS, 3, TOKENS)


def test_budget_masks_are_shared_within_a_group_and_only_there():
    calls, inputs = masks(batch_of())
    hidden = inputs == MASK
    np.testing.assert_array_equal(hidden[0], hidden[1])
    np.testing.assert_array_equal(hidden[2], hidden[3])
    assert (hidden[0] != hidden[2]).any()
    np.testing.assert_array_equal(inputs[~hidden], np.asarray(batch_of()["ids"])[:, None].repeat(3, 1)[~hidden])
    np.testing.assert_array_equal(np.asarray(calls.committed).reshape(hidden.shape), hidden)
    assert not calls.remasked.any()
    later, _ = masks(batch_of() | {"round": jnp.full(ROWS, 4)})
    assert (np.asarray(later.committed) != np.asarray(calls.committed)).any()


def test_budget_levels_are_stratified():
    """Level s of 3 draws u in [s/3, (s+1)/3): ceil(9 cos(pi u / 2)) lies in [8, 9], [5, 8], [1, 5]."""
    for number in range(8):
        batch = batch_of() | {"round": jnp.full(ROWS, number), "prompt": jnp.arange(ROWS) + number}
        calls, inputs = masks(batch)
        counts = (inputs == MASK).sum(-1)
        assert (counts >= [8, 5, 1]).all() and (counts <= [9, 8, 5]).all()
        # t = ceil(64 (1 - u)) - 1
        times = np.asarray(calls.timestep).reshape(ROWS, 3)
        assert (times >= [42, 21, 0]).all() and (times <= [63, 42, 21]).all()


def test_budget_gradient_is_the_mean_log_likelihood_of_the_hidden_tokens():
    params, batch = params_of() | {"head": {}}, batch_of()
    calls, inputs = masks(batch)

    def expected(params):
        logits = toy_model.logits_of(MODEL, params["model"])(calls.inputs, calls.timestep, calls.cond)
        logp = jnp.take_along_axis(jax.nn.log_softmax(logits), calls.ids[..., None], -1)[..., 0]
        hidden = jnp.asarray(inputs == MASK).reshape(logp.shape)
        level = jnp.where(hidden, logp, 0.0).sum(-1) / hidden.sum(-1)
        gain = batch["keep"] * batch["advantage"]
        return -(gain * level.reshape(ROWS, 3).mean(-1)).sum() / batch["keep"].sum()

    found, metrics = policy_gradient(budget(), params, batch, params)  # old and new see the same masks
    close(found, jax.jit(jax.grad(expected))(params))
    np.testing.assert_allclose(metrics["rl/ratio_max_err"][0], 0.0, atol=1e-6)
    assert "rl/sampler_gap" not in metrics
