"""Token terms of a micro-batch of calls against their formulas (speed_rl spec 5.2-5.4; spec 9, oracle 3)."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_model
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from maskrl_jax.axis import AXIS, Axis
from maskrl_jax.rl.step_likelihood import position_likelihood
from maskrl_jax.rl.token_terms import Calls, TokenLoss, token_terms

CODES, TOKENS, ROWS, NULL = 5, 4, 3, 2
MODEL, ONE = toy_model.tabular(NULL + 1), Axis(1)
PARAMS = toy_model.tabular_params(TOKENS, CODES, NULL + 1)
OTHER = jax.tree.map(lambda x: x - 0.1 * jnp.cos(7 * x), PARAMS)
LOSS = TokenLoss(chunk=5, temperature=1.3)  # five positions: chunks cross the rows
C, R, _ = 1, 2, 0
STATUS = np.array([[C, R, R, C], [_, C, R, _], [_, _, C, C]])
IDS = jnp.array([[0, 3, 1, 4], [2, 2, 0, 1], [4, 0, 3, 3]])
MASKED = jnp.asarray(STATUS > 0)


def weight(scale):
    return jnp.asarray(scale * (1 + np.arange(12).reshape(3, 4)) * (STATUS > 0), jnp.float32)


CALLS = Calls(
    inputs=jnp.where(MASKED, CODES, IDS),
    timestep=jnp.array([63, 40, 7]),
    cond=jnp.array([0, 1, 0]),
    ids=IDS,
    committed=jnp.asarray(STATUS == C),
    remasked=jnp.asarray(STATUS == R),
    z_star=jnp.array([-1.0, -2.0, 0.3]),
    tau=jnp.array([1.5, 0.4, 0.0]),
    scale=jnp.array([2.0, 3.0, 1.5]),
    advantage=jnp.array([1.0, -0.5, 2.0]),
    token_weight=weight(0.01),
    kl_weight=weight(0.02),
    penalty_weight=3 * weight(0.02),
)


@functools.partial(jax.jit, static_argnames="loss")
def terms(loss, params, old=None, reference=PARAMS, calls=CALLS):
    return token_terms(loss, MODEL, params, old, reference, calls, ONE)


@functools.partial(jax.jit, static_argnames=("loss", "part"))
def gradient(loss, params, calls=CALLS, part="token"):
    return jax.grad(lambda p: getattr(token_terms(loss, MODEL, p, None, PARAMS, calls, ONE)[0], part))(params)


def drawn_from(params, distribution, temperature=LOSS.temperature):
    """Log-probabilities that tokens are drawn from, written out, [M,N,K]."""
    logits = toy_model.logits_of(MODEL, params)
    conditional = logits(CALLS.inputs, CALLS.timestep, CALLS.cond)
    if distribution == "cond":
        return jax.nn.log_softmax(conditional / temperature)
    frozen = jax.lax.stop_gradient(params) if distribution == "guided_sg" else params
    null = toy_model.logits_of(MODEL, frozen)(CALLS.inputs, CALLS.timestep, jnp.full(ROWS, NULL))
    return jax.nn.log_softmax((null + CALLS.scale[:, None, None] * (conditional - null)) / temperature)


def reinforce(params, kind, distribution):
    """Sum of weight * advantage * likelihood: what the ratio's gradient is before the first update."""

    def flat(x):
        return jnp.broadcast_to(x[:, None], (ROWS, TOKENS)).ravel()

    logp = drawn_from(params, distribution).reshape(-1, CODES)
    rest = (CALLS.ids.ravel(), CALLS.committed.ravel(), CALLS.remasked.ravel(), flat(CALLS.z_star), flat(CALLS.tau))
    new, _, scored = position_likelihood(kind, logp, logp, *rest)
    return (new * scored * CALLS.token_weight.ravel() * flat(CALLS.advantage)).sum()


def close(a, b, atol=1e-6):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol), a, b)


def test_before_the_first_update_ratio_is_one_and_the_kl_is_zero():
    sums, error, _ = terms(LOSS, PARAMS, old=PARAMS)
    assert float(error) <= 1e-6
    np.testing.assert_allclose(sums.kl, 0.0, atol=1e-5)
    expected = (CALLS.token_weight * CALLS.advantage[:, None]).sum()  # ratio 1 on every masked position
    np.testing.assert_allclose(sums.token, expected, rtol=1e-5)
    assert (float(sums.clip[0]), float(sums.clip[1])) == (0.0, 8.0)
    alone, error, _ = terms(LOSS, PARAMS)
    assert float(error) == 0.0
    np.testing.assert_allclose(alone.token, expected, rtol=1e-6)


@pytest.mark.parametrize("chunk", [1, 512])
def test_chunks_change_neither_value_nor_gradient(chunk):
    whole = dataclasses.replace(LOSS, chunk=chunk)
    close(terms(whole, PARAMS, old=OTHER, reference=OTHER), terms(LOSS, PARAMS, old=OTHER, reference=OTHER), 1e-5)
    close(gradient(whole, PARAMS), gradient(LOSS, PARAMS))


def test_over_the_rows_of_eight_devices_chunks_change_nothing_and_no_feature_travels():
    """Every device scores its own positions: 2 calls of 4, in chunks of 5, 5 and padding."""
    mesh = Mesh(np.array(jax.devices()), (AXIS,))
    many = jax.tree.map(lambda x: jnp.resize(x, (16, *x.shape[1:])), CALLS)
    placed = jax.device_put((PARAMS, OTHER), NamedSharding(mesh, P()))
    split = jax.device_put(many, NamedSharding(mesh, P(AXIS)))

    def program(axis):
        def fn(params, old, calls):
            def total(p):
                found = token_terms(LOSS, MODEL, p, old, old, axis.split(calls), axis)
                return found[0].token + found[0].penalty, found

            return jax.grad(total, has_aux=True)(params)

        return jax.jit(fn)

    spread = program(Axis(mesh.size, mesh)).lower(*placed, split).compile()
    found, expected = spread(*placed, split), program(ONE)(PARAMS, OTHER, many)
    close(found, expected, 1e-5)
    text = spread.as_text()
    assert "all-reduce" in text and not any(name in text for name in ("all-gather", "all-to-all", "collective-permute"))


@pytest.mark.parametrize(
    ("kind", "distribution"),
    [
        ("transition", "guided_sg"),
        ("transition", "guided_full"),
        ("transition", "cond"),
        ("hard", "guided_sg"),
        ("kept", "guided_sg"),
        ("all", "guided_sg"),
    ],
)
def test_gradient_before_the_first_update_is_reinforce(kind, distribution):
    loss = dataclasses.replace(LOSS, likelihood=kind, distribution=distribution)
    expected = jax.jit(jax.grad(reinforce), static_argnums=(1, 2))(PARAMS, kind, distribution)
    found = gradient(loss, PARAMS)
    close(found, expected)
    unconditional = np.abs(found["cond"][NULL]).max()  # only the unconditional branch reads it
    assert (unconditional > 1e-4) == (distribution == "guided_full")
    assert np.abs(found["head"]).max() > 1e-3


def test_without_guidance_the_scale_is_not_read():
    loss = dataclasses.replace(LOSS, guided=False)
    expected = jax.jit(jax.grad(reinforce), static_argnums=(1, 2))(PARAMS, "transition", "cond")
    close(gradient(loss, PARAMS), expected)


def test_old_parameters_give_the_ratio_and_the_clip():
    loss = dataclasses.replace(LOSS, likelihood="kept", clip_low=0.1, clip_high=0.05)
    sums, error, _ = terms(loss, PARAMS, old=OTHER)
    index = np.asarray(IDS)[..., None]
    new, old = (np.take_along_axis(np.asarray(drawn_from(p, "guided_sg")), index, -1)[..., 0] for p in (PARAMS, OTHER))
    ratio, gain = np.exp(new - old), np.asarray(CALLS.advantage)[:, None]
    committed = STATUS == C
    objective = np.minimum(ratio * gain, np.clip(ratio, 0.9, 1.05) * gain)
    np.testing.assert_allclose(sums.token, (objective * CALLS.token_weight)[committed].sum(), rtol=1e-5)
    np.testing.assert_allclose(error, np.abs(ratio - 1)[committed].max(), rtol=1e-4)
    clipped = ((ratio > 1.05) & (gain > 0)) | ((ratio < 0.9) & (gain < 0))
    assert (float(sums.clip[0]), float(sums.clip[1])) == (clipped[committed].sum(), committed.sum())
    assert clipped[committed].tolist() == [False, True, True, False, False]


@pytest.mark.parametrize("kind", ["forward", "reverse", "k3"])
def test_kl_is_that_of_the_plain_conditional_branch(kind):
    """No guidance and no temperature: the reference must stay a language of its own."""
    sums, _, _ = terms(dataclasses.replace(LOSS, kl=kind), PARAMS, reference=OTHER)
    new, ref = (np.asarray(drawn_from(p, "cond", temperature=1.0)) for p in (PARAMS, OTHER))
    drawn = np.take_along_axis(ref - new, np.asarray(IDS)[..., None], -1)[..., 0]
    expected = {
        "forward": (np.exp(ref) * (ref - new)).sum(-1),
        "reverse": (np.exp(new) * (new - ref)).sum(-1),
        "k3": np.exp(drawn) - drawn - 1,
    }[kind]
    np.testing.assert_allclose(sums.kl, (expected * CALLS.kl_weight).sum(), rtol=1e-4)
    np.testing.assert_allclose(sums.penalty, 3 * sums.kl, rtol=1e-5)


def test_kl_leaves_the_reference_and_the_unconditional_branch_alone():
    def divergence(params, reference):
        return token_terms(LOSS, MODEL, params, None, reference, CALLS, ONE)[0].penalty

    to_params, to_reference = jax.jit(jax.grad(divergence, argnums=(0, 1)))(PARAMS, OTHER)
    assert np.abs(to_params["head"]).max() > 1e-4
    np.testing.assert_array_equal(to_params["cond"][NULL], np.zeros(4))
    close(to_reference, jax.tree.map(jnp.zeros_like, OTHER), 0)


def test_padding_pairs_change_nothing_and_get_no_gradient():
    """A padding pair: nothing committed, infinite threshold, weight 0, a condition of its own."""
    real = CALLS._replace(cond=jnp.array([0, 0, 0]))
    pad = Calls(
        *[x[:1] * 0 for x in real[:2]],
        cond=jnp.array([1]),
        ids=jnp.full((1, TOKENS), CODES),
        committed=jnp.zeros((1, TOKENS), bool),
        remasked=jnp.zeros((1, TOKENS), bool),
        z_star=jnp.array([jnp.inf]),
        tau=jnp.zeros(1),
        scale=jnp.array([9.0]),
        advantage=jnp.array([5.0]),
        token_weight=jnp.zeros((1, TOKENS)),
        kl_weight=jnp.zeros((1, TOKENS)),
        penalty_weight=jnp.zeros((1, TOKENS)),
    )
    padded = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), real, pad)
    for part in ("token", "kl"):
        found = gradient(LOSS, OTHER, padded, part)
        close(found, gradient(LOSS, OTHER, real, part))
        np.testing.assert_array_equal(found["cond"][1], np.zeros(4))
    with_pad, without = (terms(LOSS, PARAMS, reference=OTHER, calls=c)[0] for c in (padded, real))
    close(with_pad, without, 1e-5)


def test_entropy_and_log_probabilities_are_of_what_is_drawn_from():
    sums, _, drawn = terms(LOSS, PARAMS)
    logp = np.asarray(drawn_from(PARAMS, "guided_sg"))
    np.testing.assert_allclose(sums.entropy[0], -(np.exp(logp) * logp).sum(-1)[STATUS > 0].sum(), rtol=1e-5)
    assert float(sums.entropy[1]) == 8.0
    np.testing.assert_allclose(drawn, np.take_along_axis(logp, np.asarray(IDS)[..., None], -1)[..., 0], rtol=1e-5)


@pytest.mark.parametrize("wrong", [{"likelihood": "joint"}, {"distribution": "null"}, {"kl": "k1"}])
def test_unknown_names_are_refused(wrong):
    (name, value), *_ = wrong.items()
    with pytest.raises(ValueError, match=f"{name} '{value}' is not one of"):
        TokenLoss(**wrong)


@pytest.mark.parametrize("wrong", [{"clip_low": -0.1}, {"clip_low": 1.0}, {"clip_high": -0.1}, {"chunk": 0}])
def test_impossible_numbers_are_refused(wrong):
    (name, value), *_ = wrong.items()
    with pytest.raises(ValueError, match=f"{name} {value} "):
        TokenLoss(**wrong)
