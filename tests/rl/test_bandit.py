"""Whole policy gradient on a bandit: speed, and speed alone, moves the calls (speed_rl spec 9, oracle 11)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from maskrl_jax.rl import stride, surrogate
from maskrl_jax.rl.advantages import group_advantage
from maskrl_jax.rl.speed_reward import speed_reward
from maskrl_jax.rl.step_likelihood import position_likelihood
from maskrl_jax.sampling import draws
from maskrl_jax.sampling.clock import Clock, next_masked

CLOCK, PRIOR = Clock(num_tokens=12), stride.PriorConfig(divisors=(12, 8, 6, 4, 3, 2), centre=8.0)
MAX_CALLS, MIN_CALLS, CODES, GROUPS, SIZE = 12, 4, 4, 16, 8
ROWS = GROUPS * SIZE


def parameters():
    return {
        "bias": jnp.asarray(stride.prior_bias(PRIOR), jnp.float32),
        "eta": jnp.float32(PRIOR.stickiness),
        "tokens": 1.5 * jax.random.normal(jax.random.key(9), (CLOCK.num_tokens, CODES)),
    }


def token_terms(logp_NK, masked, count_after, tick, key, remasked):
    """Draw and commit one call under the clock's noise; log-probs, weights and committed, [B, N] each.

    `remasked` weighs the terms of re-masked positions: 1 for `transition`, and 0 leaves the likelihood `kept`.
    """
    draw_key, noise_key = jax.random.split(key)
    tau = jnp.asarray(CLOCK.noise)[jnp.minimum(tick, CLOCK.ticks)][:, None]
    ids = jax.random.categorical(draw_key, logp_NK[None], shape=masked.shape)
    confidence = jnp.take_along_axis(jnp.broadcast_to(logp_NK[None], (ROWS, *logp_NK.shape)), ids[..., None], -1)[
        ..., 0
    ]
    noisy = jnp.where(masked, confidence + tau * jax.random.gumbel(noise_key, masked.shape), -jnp.inf)
    commits = masked.sum(-1) - count_after
    z_star = -jnp.take_along_axis(jnp.sort(-noisy, axis=-1), jnp.maximum(commits - 1, 0)[:, None], axis=-1)
    committed = masked & (noisy >= z_star) & (commits > 0)[:, None]
    spread = [jnp.broadcast_to(x, masked.shape).ravel() for x in (z_star, tau)]
    wide = jnp.broadcast_to(logp_NK[None], (ROWS, *logp_NK.shape)).reshape(-1, CODES)
    logp, _, weight = position_likelihood(
        "transition", wide, wide, ids.ravel(), committed.ravel(), (masked & ~committed).ravel(), *spread
    )
    weight = weight.reshape(masked.shape) * jnp.where(committed, 1.0, remasked)
    return logp.reshape(masked.shape), weight, committed


def rollout(params, key, remasked):
    """Roll out all rows with a blind head; log-probs of all terms, and the calls [B]."""
    logp_NK = jax.nn.log_softmax(params["tokens"])
    jump = jnp.asarray(stride.jumps(PRIOR.divisors, CLOCK.ticks))

    def call(state, k):
        tick, previous, masked, calls = state
        head_key, token_key = jax.random.split(jax.random.fold_in(key, k))
        active = masked.any(-1)
        logits = stride.decision_logits(
            jnp.broadcast_to(params["bias"][None], (ROWS, jump.size)),
            previous,
            params["eta"],
            jnp.broadcast_to(k == 0, (ROWS,)),
        )
        decision = jax.random.categorical(head_key, logits)
        after = tick + jump[decision]
        logp, weight, committed = token_terms(
            logp_NK, masked, next_masked(CLOCK, after, masked.sum(-1)), tick, token_key, remasked
        )
        terms = (logp, weight, stride.decision_logp(logits, decision), active.astype(jnp.float32))
        return (after, decision, masked & ~committed, calls + active), terms

    zero = jnp.zeros(ROWS, jnp.int32)
    start = (zero, zero, jnp.ones((ROWS, CLOCK.num_tokens), bool), zero)
    (_, _, _, calls), terms = jax.lax.scan(call, start, jnp.arange(MAX_CALLS))
    return terms, calls


def loss(params, key, weight, noise, remasked):
    """Give the policy loss on reward = noise (no information) + weight x speed, and the mean calls."""
    (token, token_weight, decision, decision_weight), calls = rollout(params, key, remasked)
    noise_PG = noise * jax.random.normal(jax.random.fold_in(key, 99), (GROUPS, SIZE))
    reward = noise_PG + weight * speed_reward(calls, MAX_CALLS, MIN_CALLS).reshape(GROUPS, SIZE)
    advantage = group_advantage(reward, jnp.ones(reward.shape, bool)).reshape(1, ROWS)
    clip = {"low": 0.1, "high": 0.2}
    factor = surrogate.term_weights(calls, num_tokens=CLOCK.num_tokens, max_calls=MAX_CALLS)
    terms = surrogate.Terms(
        token=surrogate.clipped_surrogate(
            token, token, advantage[..., None], token_weight * factor.token[None, :, None], **clip
        ),
        decision=surrogate.clipped_surrogate(
            decision, decision, advantage, decision_weight * factor.decision[None], **clip
        ),
        kl=jnp.float32(0),
        entropy=jnp.float32(0),
    )
    totals = surrogate.Normalisers(survivors=ROWS, deciders=ROWS, decisions=decision_weight.sum())
    return surrogate.policy_loss(terms, totals, kl_coefficient=0.0, entropy_coefficient=0.0), calls.mean()


@functools.partial(jax.jit, static_argnames=("updates",))
def train(weight, noise, remasked=1.0, updates=100):
    """Run plain gradient steps; mean calls [updates] and mean token entropy before and after."""
    optimizer = optax.sgd(2.0)

    def update(carry, step):
        params, opt_state = carry
        gradient, calls = jax.grad(loss, has_aux=True)(
            params, jax.random.fold_in(jax.random.key(3), step), weight, noise, remasked
        )
        change, opt_state = optimizer.update(gradient, opt_state)
        return (optax.apply_updates(params, change), opt_state), calls

    params = parameters()
    (trained, _), calls = jax.lax.scan(update, (params, optimizer.init(params)), jnp.arange(updates))
    return calls, [draws.entropy(jax.nn.log_softmax(p["tokens"])).mean() for p in (params, trained)]


@pytest.mark.parametrize(("weight", "noise"), [(1.0, 0.1), (0.0, 1.0)])
def test_speed_reward_moves_calls_and_leaves_tokens_alone(weight, noise):
    calls, (before, after) = train(weight, noise)
    if weight:
        assert float(calls[-10:].mean()) < MIN_CALLS + 0.5
    else:
        np.testing.assert_allclose(calls[-10:].mean(), calls[:10].mean(), atol=1.0)
    np.testing.assert_allclose(after, before, atol=0.015)


def test_without_the_terms_of_remasked_positions_speed_moves_the_tokens():
    """The negative control, `kept`: pay for speed leaks into what is drawn."""
    _, (before, after) = train(1.0, 0.1, remasked=0.0)
    assert abs(float(after - before)) > 0.02
