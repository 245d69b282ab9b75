"""The MaskFocus update (maskfocus spec 5, 6; spec 13, oracles 9-13)."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_model
from toy_update import ONE_DEVICE

from maskrl_jax.keys import ROLLOUT, sample_keys
from maskrl_jax.rl import advantages, kl
from maskrl_jax.rl.critical_steps import StepChoice
from maskrl_jax.rl.focus_update import FocusUpdate
from maskrl_jax.rl.token_terms import Model, TokenLoss
from maskrl_jax.sampling import routing

CODES, TOKENS, GROUP, ROWS, STEPS, NULL = 4, 9, 2, 4, 5, 2
MASK = CODES
MODEL = toy_model.tabular(NULL + 1)
EPS, UNCLIPPED = {"clip_low": 0.2, "clip_high": 0.2}, {"clipped": False}


def tokens(kl="k3", **fields):
    return TokenLoss(likelihood="kept", distribution="cond", kl=kl, guided=False, **fields)


FOCUS = FocusUpdate(
    choice=StepChoice(STEPS, TOKENS, 2),
    tokens=tokens(**EPS),
    model=MODEL,
    mask_id=MASK,
    group=GROUP,
    seed=0,
    micro_batch=16,
    kl_coefficient=0.01,
)


@functools.partial(jax.jit, static_argnums=0)
def gradients(focus, params, old, reference, batch, slots):
    return focus.gradients(params, old, reference, batch, slots, ONE_DEVICE)


@functools.cache
def rolled():
    """Return a batch of routed rollouts of the toy model, with steps chosen."""
    config = routing.RoutingConfig(num_steps=STEPS, guidance=1.5)
    cond, index = jnp.repeat(jnp.arange(ROWS // GROUP), GROUP), jnp.arange(ROWS)

    @jax.jit
    def run():
        logits = toy_model.logits_of(MODEL, params_of())
        keys = sample_keys(0, ROLLOUT, 0, index)
        return routing.rollout(logits, keys, cond, MODEL.null, config, TOKENS, MASK, GROUP)

    made = run()
    batch = {"ids": made.ids, "commit_step": made.commit_step, "cond": cond, "index": index}
    batch |= {"steps": jnp.tile(jnp.array([[0, 2]]), (ROWS, 1)), "round": jnp.full(ROWS, 3)}
    batch |= {"advantage": jnp.array([0.7, -0.7, 1.2, -0.3]), "keep": jnp.ones(ROWS)}
    return batch, made


def params_of():
    return toy_model.tabular_params(TOKENS, CODES, NULL + 1)


def test_advantages_by_hand():
    for reward, expected in (
        ([0, 1], [-0.707007, 0.707007]),
        ([1, *[0] * 7], [2.474174, *[-0.353453] * 7]),
        ([0.2, 0.25, 0.3, 0.35], [-1.160098, -0.386699, 0.386699, 1.160098]),
    ):
        reward = jnp.asarray([reward], jnp.float32)
        found = advantages.group_advantage(reward, jnp.ones(reward.shape, bool))
        np.testing.assert_allclose(found, [expected], atol=2e-5)


def test_kl_by_hand():
    """k3 of Delta = ln 2, -ln 2, 0.1; the full divergence of two laws; no overflow of a lost code."""
    delta = jnp.array([np.log(2), -np.log(2), 0.1, 90.0], jnp.float32)
    logp = jnp.stack([-delta, jnp.zeros(4)], -1)
    found = kl.k3(logp, jnp.zeros((4, 2)), jnp.zeros(4, jnp.int32))
    np.testing.assert_allclose(found[:3], [0.306853, 0.193147, 0.005171], atol=2e-6)
    assert np.isfinite(found[3])
    lost = jax.grad(lambda x: kl.k3(jnp.array([x, 0.0]), jnp.zeros(2), jnp.int32(0)))
    assert lost(-3.0) < 0 and lost(-90.0) == 0  # towards the reference, or not at all
    found = kl.reverse_kl(jnp.log(jnp.array([0.5, 0.3, 0.2])), jnp.log(jnp.array([0.4, 0.4, 0.2])))
    np.testing.assert_allclose(found, 0.025267, atol=1e-6)


def _of_two_codes(logp):
    """Log-probabilities over two codes whose first is given: its derivative stays 1 under the softmax."""
    logp = jnp.asarray(logp, jnp.float32)
    return {"logp": jnp.stack([logp, jnp.log1p(-jnp.exp(logp))], -1)}


@pytest.mark.parametrize(
    ("clip", "loss", "gradient"),
    [
        (UNCLIPPED, -0.0839882, ((-0.213508, -0.174352), (0.175, 0.129643))),
        (EPS, -0.0698859, ((0.000238, -0.174352), (0.175, 0))),
    ],
)
def test_loss_and_gradient_by_hand(clip, loss, gradient):
    """Two samples of two masked tokens each."""
    given = Model(lambda p: lambda ids, t, c: p["logp"], lambda p: lambda x: x, np.int32(0))
    choice = StepChoice(3, 2, 1)
    focus = dataclasses.replace(FOCUS, choice=choice, tokens=tokens(**clip), model=given, remask="trajectory")
    focus = dataclasses.replace(focus, micro_batch=2)
    batch = {
        "ids": jnp.zeros((2, 2), jnp.int32),
        "commit_step": jnp.full((2, 2), 2, jnp.uint8),  # all masked after step 0
        "steps": jnp.zeros((2, 1), jnp.int32),
        "cond": jnp.zeros(2, jnp.int32),
        "index": jnp.arange(2),
        "round": jnp.zeros(2, jnp.int32),
        "advantage": jnp.array([0.7, -0.7]),
        "keep": jnp.ones(2),
    }
    new, old, reference = ((-1, -2), (-1.5, -2.5)), ((-1.2, -2), (-1.5, -2.2)), ((-1.1, -2.3), (-1.5, -2.5))
    params, old, reference = (_of_two_codes(x) for x in (new, old, reference))
    grads, metrics, error = gradients(focus, params, old, reference, batch, jnp.array([0]))
    np.testing.assert_allclose(metrics["train/loss"][0], loss, atol=1e-6)
    np.testing.assert_allclose(metrics["rl/kl"][0], 0.0114139, atol=1e-6)
    np.testing.assert_allclose(error, 0.259182, atol=1e-5)
    # d/d first log-probability along the normalised pair.
    slope = -jnp.exp(params["logp"][..., 0]) / (1 - jnp.exp(params["logp"][..., 0]))
    found = grads["logp"][..., 0] + slope * grads["logp"][..., 1]
    np.testing.assert_allclose(found, gradient, atol=2e-6)


def test_at_the_start_the_ratio_is_one_and_only_the_gradient_is_not_zero():
    batch, _ = rolled()
    slots = jnp.arange(2)
    grads, metrics, error = gradients(FOCUS, params_of(), params_of(), params_of(), batch, slots)
    assert float(error) <= 1e-6 and abs(float(metrics["rl/kl"][0])) < 1e-6
    np.testing.assert_allclose(metrics["train/loss"][0], -batch["advantage"].mean(), atol=1e-6)
    assert max(np.abs(x).max() for x in jax.tree.leaves(grads)) > 1e-3
    alone, *_ = gradients(FOCUS, params_of(), None, None, batch, slots)  # accumulate, beta 0
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), alone, grads)


def _direct(params, focus, batch, slots):
    """Return the loss of the current parameters at ratio 1 without KL, from its formula alone, position by position."""
    logits = toy_model.logits_of(MODEL, params)
    kept, total, tokens = batch["keep"], 0.0, 0.0
    for slot in slots:
        masked, timestep = focus.remasked(batch, jnp.arange(ROWS), jnp.full(ROWS, slot))
        logp = jax.nn.log_softmax(logits(jnp.where(masked, MASK, batch["ids"]), timestep, batch["cond"]))
        own = jnp.take_along_axis(logp, batch["ids"][..., None], -1)[..., 0]
        ratio = jnp.exp(own - jax.lax.stop_gradient(own))
        term = (masked * ratio).sum(-1) * batch["advantage"] * kept
        count = masked.sum(-1)
        total += (term / count).sum() / kept.sum() if focus.norm == "step_mean" else term.sum()
        tokens += (kept * count).sum()
    return -total / len(slots) if focus.norm == "step_mean" else -total / tokens


@pytest.mark.parametrize("norm", ["step_mean", "token_mean"])
@pytest.mark.parametrize("remask", ["random_group", "trajectory"])
def test_gradient_is_that_of_the_formula(norm, remask):
    """One sample is dropped; micro-batches of three do not divide the rows."""
    batch = rolled()[0] | {"keep": jnp.array([1.0, 1.0, 0.0, 1.0])}
    focus = dataclasses.replace(FOCUS, norm=norm, remask=remask, micro_batch=3)
    found, *_ = gradients(focus, params_of(), None, None, batch, jnp.arange(2))
    expected = jax.grad(_direct)(params_of(), focus, batch, (0, 1))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found, expected)


def test_a_model_without_preference_scores_ln_of_the_codes():
    """All-zero logits of 8192 codes: every token costs 9.010913 nats."""
    codes = 8192
    blank = Model(
        lambda p: lambda ids, t, c: p["x"] * jnp.ones((*ids.shape, codes)), lambda p: lambda x: x, np.int32(0)
    )
    focus = dataclasses.replace(FOCUS, model=blank, tokens=tokens(**UNCLIPPED), mask_id=codes)
    _, metrics, _ = gradients(focus, {"x": jnp.zeros(())}, None, None, rolled()[0], jnp.arange(2))
    # The entropy of its law, which is what it scores.
    total, weight = metrics["rl/entropy"]
    assert float(total / weight) == pytest.approx(9.010913, abs=1e-5)


@pytest.mark.parametrize(
    ("remask", "same"),
    [("random_batch", (True, True)), ("random_group", (True, False)), ("random_per_sample", (False, False))],
)
def test_who_shares_a_mask(remask, same):
    """Exact counts; masks of two slots and of two iterations are independent."""
    batch, _ = rolled()
    focus = dataclasses.replace(FOCUS, remask=remask)
    rows = jnp.arange(ROWS)
    first = np.asarray(focus.remasked(batch, rows, jnp.zeros(ROWS, jnp.int32))[0])
    assert (first.sum(-1) == routing.mask_counts(TOKENS, STEPS)[1]).all()
    assert ((first[0] == first[1]).all(), (first[0] == first[2]).all()) == same
    equal = batch | {"steps": jnp.full((ROWS, 2), 2)}
    draws = [np.asarray(focus.remasked(equal, rows, jnp.full(ROWS, slot))[0]) for slot in (0, 1)]
    draws.append(np.asarray(focus.remasked(equal | {"round": jnp.full(ROWS, 4)}, rows, jnp.zeros(ROWS, jnp.int32))[0]))
    assert not (draws[0] == draws[1]).all() and not (draws[0] == draws[2]).all()


def test_trajectory_masks_are_the_states_of_the_rollout():
    batch, made = rolled()
    focus = dataclasses.replace(FOCUS, remask="trajectory")
    for step in range(-1, STEPS - 1):
        at = batch | {"steps": jnp.full((ROWS, 1), step)}
        masked, _ = focus.remasked(at, jnp.arange(ROWS), jnp.zeros(ROWS, jnp.int32))
        np.testing.assert_array_equal(masked, np.asarray(made.commit_step) > step)


def test_advantages_below_zero_are_lightened_but_at_the_first_call():
    focus = dataclasses.replace(FOCUS, negative_weight=0.25)
    found = focus.advantage(jnp.array([2.0, -2.0, 2.0, -2.0]), jnp.array([0, 0, -1, -1]))
    assert found.tolist() == [2, -0.5, 2, -2]
    batch, _ = rolled()
    plain, light = (gradients(f, params_of(), None, None, batch, jnp.arange(2))[0] for f in (FOCUS, focus))
    raised = batch | {"advantage": jnp.array([0.7, -0.175, 1.2, -0.075])}
    chex.assert_trees_all_close(light, gradients(FOCUS, params_of(), None, None, raised, jnp.arange(2))[0], rtol=1e-6)
    assert not np.allclose(jax.tree.leaves(plain)[0], jax.tree.leaves(light)[0])


def test_other_steps_compile_nothing():
    batch, _ = rolled()
    gradients(FOCUS, params_of(), None, None, batch, jnp.arange(2))
    size = gradients._cache_size()
    gradients(
        FOCUS, params_of(), None, None, batch | {"steps": jnp.tile(jnp.array([[1, 3]]), (ROWS, 1))}, jnp.arange(2)
    )
    assert gradients._cache_size() == size


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"remask": "none"}, "not one of random_group"),
        ({"mode": "both"}, "not one of sequential"),
        ({"norm": "sum"}, "not one of step_mean"),
        ({"kl_coefficient": -1.0}, "at least 0"),
        ({"negative_weight": 1.5}, "must lie in"),
    ],
)
def test_settings_that_cannot_be(fields, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(FOCUS, **fields)
