"""One update: what changes, what is skipped, what is frozen."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskrl_jax import state as train_state
from maskrl_jax.errors import UserError
from maskrl_jax.state import OptimizerConfig

PARAMS = {
    "head": {"w": jnp.full((2, 2), 2.0)},
    "body": {"w": jnp.full((2, 2), 2.0), "b": jnp.full((2,), 2.0)},
}


def updated(grads=None, steps=1, ema_decay=0.5, **settings):
    tx = train_state.make_optimizer(OptimizerConfig(**{"name": "sgd", "b1": 0.0, "clip_norm": 0.0, **settings}))
    state = train_state.create(jax.tree.map(jnp.copy, PARAMS), tx, {"n": jnp.zeros(())})
    grads = jax.tree.map(jnp.ones_like, PARAMS) if grads is None else grads
    apply = jax.jit(
        lambda s: train_state.apply_gradients(s, grads, tx, ema_decay=ema_decay, extra={"n": s.extra["n"] + 1})
    )
    for _ in range(steps):
        state, info = apply(state)
    return state, info


def test_sgd_step_is_rate_times_gradient_and_ema_follows():
    state, info = updated(learning_rate=0.5)
    np.testing.assert_allclose(state.params["head"]["w"], 1.5)
    # decay is min(0.5, (1 + 0) / (10 + 0)) = 0.1 at step 0: 0.1 * 2 + 0.9 * 1.5
    np.testing.assert_allclose(state.ema["head"]["w"], 1.55, rtol=1e-6)
    np.testing.assert_allclose(info["grad_norm"], np.sqrt(10), rtol=1e-6)
    assert (int(state.step), int(state.extra["n"]), float(info["skipped"])) == (1, 1, 0)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_gradient_that_is_not_finite_changes_nothing_but_counts(bad):
    grads = jax.tree.map(jnp.ones_like, PARAMS) | {"head": {"w": jnp.full((2, 2), bad)}}
    state, info = updated(grads, steps=3, name="adamw", clip_norm=1.0)
    jax.tree.map(np.testing.assert_array_equal, state.params, PARAMS)
    jax.tree.map(np.testing.assert_array_equal, state.ema, PARAMS)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.opt_state))
    assert (int(state.step), int(state.bad_steps), int(state.bad_total)) == (3, 3, 3)
    assert (int(state.extra["n"]), float(info["skipped"])) == (0, 1)


def test_a_finite_gradient_ends_a_row_of_bad_ones():
    tx = train_state.make_optimizer(OptimizerConfig())
    state = train_state.create(PARAMS, tx)
    for value in (np.nan, 1.0):
        grads = jax.tree.map(lambda p, value=value: jnp.full_like(p, value), PARAMS)
        state, _ = train_state.apply_gradients(state, grads, tx, ema_decay=0.9)
    assert (int(state.bad_steps), int(state.bad_total)) == (0, 1)


@pytest.mark.parametrize("name", train_state.OPTIMIZERS)
def test_a_gradient_of_zero_moves_nothing_though_momentum_is_left(name):
    tx = train_state.make_optimizer(OptimizerConfig(name=name))
    state = train_state.create(PARAMS, tx)
    grads = jax.tree.map(jnp.ones_like, PARAMS)
    state, _ = train_state.apply_gradients(state, grads, tx, ema_decay=0.9)
    nothing = jax.tree.map(jnp.zeros_like, PARAMS)
    after, info = train_state.apply_gradients(state, nothing, tx, ema_decay=0.9)
    jax.tree.map(np.testing.assert_array_equal, after.params, state.params)
    jax.tree.map(np.testing.assert_array_equal, after.opt_state, state.opt_state)
    assert (float(info["skipped"]), int(after.bad_steps), int(after.step)) == (1, 0, 2)


@pytest.mark.parametrize("name", train_state.OPTIMIZERS)
def test_factor_zero_freezes_and_the_first_match_counts(name):
    rates = (("body/b$", 0.0), ("body/", 0.5))
    settings = {"name": name, "rates": rates, "learning_rate": 0.1, "weight_decay": 0.1, "clip_norm": 1.0}
    settings["muon_skip"] = "table"  # treats both parts alike
    state, _ = updated(steps=2, **settings)
    np.testing.assert_array_equal(state.params["body"]["b"], PARAMS["body"]["b"])
    whole, _ = updated(steps=1, **settings)
    moved = {part: PARAMS[part]["w"] - whole.params[part]["w"] for part in ("head", "body")}
    np.testing.assert_allclose(moved["body"], 0.5 * moved["head"], rtol=1e-4)
    assert (np.abs(moved["head"]) > 0).all()


def test_frozen_gradients_do_not_use_up_the_clip_norm():
    grads = {"head": {"w": jnp.full((2, 2), 0.5)}, "body": {"w": jnp.full((2, 2), 1e6), "b": jnp.zeros((2,))}}
    state, _ = updated(grads, rates=(("body", 0.0),), clip_norm=1.0, learning_rate=1.0)
    np.testing.assert_allclose(state.params["head"]["w"], 1.5, rtol=1e-6)


def test_weight_decay_spares_biases():
    grads = jax.tree.map(lambda p: jnp.full_like(p, 1e-9), PARAMS)
    state, _ = updated(grads, name="sgd", weight_decay=0.1, learning_rate=1.0)
    np.testing.assert_allclose(state.params["body"]["w"], 1.8, rtol=1e-6)
    np.testing.assert_allclose(state.params["body"]["b"], 2.0)


def test_rate_warms_up_then_decays_to_zero():
    cfg = OptimizerConfig(warmup_steps=3, decay="linear", decay_steps=7)
    rates = [float(train_state.learning_rate(cfg, 1.0)(step)) for step in (0, 1, 2, 3, 5, 7, 9)]
    np.testing.assert_allclose(rates, [0.25, 0.5, 0.75, 1.0, 0.5, 0.0, 0.0], atol=1e-6)
    tenth = train_state.learning_rate(OptimizerConfig(decay="tenth", decay_steps=4, warmup_steps=1), 2.0)
    np.testing.assert_allclose([float(tenth(step)) for step in range(7)], [1.0, 2, 2, 2, 0.2, 0.2, 0.2], atol=1e-6)
    cosine = OptimizerConfig(decay="cosine", decay_steps=4)
    np.testing.assert_allclose(float(train_state.learning_rate(cosine, 2.0)(2)), 1.0, atol=1e-6)


def test_muon_moves_matrices_by_an_orthogonal_step():
    grads = {"head": {"w": jnp.diag(jnp.array([9.0, 1.0]))}, "body": {"w": jnp.eye(2), "b": jnp.ones(2)}}
    state, _ = updated(grads, name="muon", muon_learning_rate=0.1, muon_skip="table")
    step = (PARAMS["head"]["w"] - state.params["head"]["w"]) / 0.1
    # Newton-Schulz brings both singular values near 1, in a band that its coefficients allow.
    assert np.all((np.diag(step) > 0.6) & (np.diag(step) < 1.3))
    state, _ = updated(grads, name="muon", muon_learning_rate=0.1, muon_skip="table", muon_steps=1)
    short = (PARAMS["head"]["w"] - state.params["head"]["w"]) / 0.1
    assert short[1, 1] < 0.5  # one iteration is not enough for the small one


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "adam"}, "did you mean 'adamw'"),
        ({"decay": "cosin"}, "did you mean 'cosine'"),
        ({"decay": "linear"}, "decay_steps=0"),
        ({"ema_decay": 1.0}, "ema_decay=1.0"),
        ({"muon_steps": 0}, "muon_steps=0"),
    ],
)
def test_impossible_settings_are_named(settings, message):
    with pytest.raises(UserError, match=message):
        OptimizerConfig(**settings)


def test_the_decay_lasts_as_long_as_the_run_unless_told_otherwise():
    decaying = {"decay": "linear", "decay_steps": 0}
    assert train_state.optimizer_of(decaying, 700).decay_steps == 700
    assert train_state.optimizer_of({**decaying, "decay_steps": 50}, 700).decay_steps == 50
    assert train_state.optimizer_of({"decay": "constant"}, 700).decay_steps == 0
