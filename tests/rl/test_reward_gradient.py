"""Gradients of a reward through iterations of masked autoregression: exact, checkpointed, truncated, detached."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskrl_jax.rl import reward_gradient
from maskrl_jax.rl.reward_gradient import Truncation
from maskrl_jax.sampling import mar
from maskrl_jax.sampling.mar import MarPlan

PLAN, CHANNELS, BATCH = MarPlan(8, 3), 2, 2
CONDS = [jnp.array([0, 1])]


def networks(params):
    """A backbone that sums what is visible, and a draw that is smooth in it."""

    def backbone(tokens, order, cond, masked):
        length, rows = order.shape[1], tokens.shape[1]
        seen = (jnp.arange(length - rows, length) >= masked)[None, :, None]
        total = jnp.where(seen, tokens, 0).sum((1, 2))
        return jnp.tanh(params["see"] * total + cond)[:, None, None] * jnp.ones((1, length, 1))

    def draw(z, null, dials, keys):
        noise = jax.vmap(jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, 0), (CHANNELS,))))(keys)
        return params["scale"] * noise + z * params["shift"]

    return backbone, draw


WHOLE = Truncation()
PARAMS = {"see": jnp.float32(0.3), "scale": jnp.float32(0.8), "shift": jnp.float32(0.5)}


def rolled(params, truncation=WHOLE, plan=PLAN):
    keys = jax.random.split(jax.random.key(0), BATCH)
    return reward_gradient.rollout(*networks(params), keys, CONDS, plan.dials(), plan, CHANNELS, truncation)


def reward(params, truncation=WHOLE):
    tokens = rolled(params, truncation)
    return jnp.sin(tokens).sum() + (tokens[:, 0] * tokens[:, -1]).sum()


@functools.partial(jax.jit, static_argnums=1)
def gradient(params, truncation=WHOLE):
    return jax.grad(reward)(params, truncation)


def plain(params):
    """The same rollout without checkpoints."""
    keys = jax.random.split(jax.random.key(0), BATCH)
    made = mar.generate(*networks(params), keys, CONDS, PLAN.dials(), PLAN, CHANNELS)
    return jnp.sin(made.tokens).sum() + (made.tokens[:, 0] * made.tokens[:, -1]).sum()


def test_the_rollout_is_the_sampler_s():
    np.testing.assert_allclose(reward(PARAMS), plain(PARAMS), rtol=1e-6)


@pytest.mark.parametrize("truncation", [Truncation(), Truncation(PLAN.num_steps)])
def test_the_whole_gradient_is_exact(truncation):
    found, expected = gradient(PARAMS, truncation), jax.jit(jax.grad(plain))(PARAMS)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found, expected)
    for name in PARAMS:
        ends = [jax.jit(reward)(PARAMS | {name: PARAMS[name] + step}) for step in (1e-2, -1e-2)]
        np.testing.assert_allclose(found[name], (ends[0] - ends[1]) / 2e-2, rtol=2e-2)


def test_truncation_keeps_the_last_iterations():
    """With one iteration, all but its tokens are constants."""
    masked = PLAN.masked_after[-2]
    order, _ = mar.randomness(jax.random.split(jax.random.key(0), BATCH), PLAN.num_tokens)
    last = mar.to_raster(jnp.broadcast_to(jnp.arange(PLAN.num_tokens) < masked, order.shape), order)[..., None]
    found = jax.jit(jax.jacobian(lambda p: rolled(p, Truncation(1))))(PARAMS)
    for value in jax.tree.leaves(found):
        np.testing.assert_array_equal(jnp.where(last, 0, value), 0)
    exact = jax.jit(jax.jacobian(rolled))(PARAMS)
    assert np.abs(jnp.where(last, 0, exact["scale"])).max() > 0.1


def test_a_detached_context_leaves_every_token_its_direct_path():
    found = jax.jit(jax.jacobian(lambda p: rolled(p, Truncation(detach_context=True))))(PARAMS)
    values, exact = rolled(PARAMS), jax.jit(jax.jacobian(rolled))(PARAMS)
    # d token / d scale is the token's own noise: whatever was seen before it counts as a constant.
    assert np.abs(found["scale"] - exact["scale"]).max() > 1e-3
    assert np.all(np.abs(found["scale"]).max(-1) > 0)
    np.testing.assert_allclose(values, rolled(PARAMS, Truncation(detach_context=True)), rtol=1e-6)


@pytest.mark.parametrize("truncation", [WHOLE, Truncation(3), Truncation(detach_context=True)])
def test_iterations_that_share_a_shape_have_the_same_gradient(truncation):
    """Also where the first with a gradient is in the midst of a segment."""
    alone, shared = (MarPlan(8, 5, bucket) for bucket in (1, 4))
    assert [len(segment.masked) for segment in shared.segments()] == [1, 3, 1]
    found, expected = (jax.jit(jax.jacobian(lambda p, x=x: rolled(p, truncation, x)))(PARAMS) for x in (shared, alone))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, expected)


@pytest.mark.parametrize(
    ("make", "named"),
    [(lambda: Truncation(-1), "-1"), (lambda: Truncation(4).first(3), "exceeds")],
)
def test_bad_settings_are_refused(make, named):
    with pytest.raises(ValueError, match=named):
        make()
