"""A Speed-RL update on the tabular toy model: its settings, one recorded batch, and what its gradient must be."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import toy_model

from maskrl_jax.rl.policy import Head, Policy
from maskrl_jax.rl.speed_update import RECORD, SpeedUpdate
from maskrl_jax.rl.step_likelihood import position_likelihood
from maskrl_jax.rl.token_terms import TokenLoss
from maskrl_jax.sampling import adaptive

CODES, TOKENS, ROWS, NULL, CALLS = 4, 9, 4, 2, 5
MASK = CODES
MODEL = toy_model.tabular(NULL + 1)
POLICY = Policy(max_calls=CALLS, divisors=(5, 3, 2, 1), centre=3.0, stickiness=1.0, guidance=1.5, temperature=0.8)
SPEED = SpeedUpdate(
    policy=POLICY,
    head=Head(POLICY),
    tokens=TokenLoss(temperature=0.8, chunk=32),
    model=MODEL,
    num_tokens=TOKENS,
    mask_id=MASK,
    seed=0,
    micro_batch=64,
    kl_coefficient=0.3,
)
ONE_DEVICE = types.SimpleNamespace(**dict.fromkeys(("all_reduce", "largest", "split"), lambda tree: tree), size=1)
REFERENCE = jax.tree.map(lambda x: x - 0.2 * jnp.sin(9 * x), toy_model.tabular_params(TOKENS, CODES, NULL + 1))
LEARN = {
    "cond": jnp.array([0, 0, 1, 1]),
    "advantage": jnp.array([1.0, -0.7, 0.4, -1.3]),
    "keep": jnp.array([1.0, 1.0, 0.0, 1.0]),
    # Decisions count in other rollouts, with other advantages.
    "decision_advantage": jnp.array([0.6, -0.9, 0.8, -0.5]),
    "decision_keep": jnp.array([1.0, 0.0, 1.0, 1.0]),
    "prompt": jnp.array([7, 7, 8, 8]),
    "round": jnp.full(ROWS, 3),
}


def changed(tokens=None, policy=None, **fields):
    """Return the update with other settings; the head follows the policy."""
    speed = dataclasses.replace(SPEED, **fields)
    if policy:
        new = dataclasses.replace(POLICY, **policy)
        speed = dataclasses.replace(speed, policy=new, head=Head(new))
    return dataclasses.replace(speed, tokens=dataclasses.replace(SPEED.tokens, **(tokens or {})))


@functools.cache
def params_of(action="stride"):
    head = Head(dataclasses.replace(POLICY, action=action)).init(jax.random.key(1))
    out = head["params"]["out"]
    out["kernel"] = 0.3 * jax.random.normal(jax.random.key(2), out["kernel"].shape)
    return {"model": toy_model.tabular_params(TOKENS, CODES, NULL + 1), "head": head}


@functools.cache
def batch_of(action="stride", timesteps="clock"):
    """Roll out with predictions kept; the rollouts differ in their number of calls."""
    policy, params = dataclasses.replace(POLICY, action=action, timesteps=timesteps), params_of(action)
    sampler = policy.sampler(TOKENS, keep_predictions=True)

    @jax.jit
    def roll():
        logits, decide = (
            toy_model.logits_of(MODEL, params["model"]),
            Head(policy).decide(params["head"], jnp.zeros(ROWS)),
        )
        keys = jax.random.split(jax.random.key(6), ROWS)
        return adaptive.rollout(logits, decide, keys, LEARN["cond"], MODEL.null, sampler, TOKENS, MASK)

    record = roll()
    assert len(set(record.calls.tolist())) > 1
    return {name: getattr(record, name) for name in RECORD} | LEARN


@functools.partial(jax.jit, static_argnums=0)
def program(speed, params, batch, old, reference, entropy):
    return speed.gradients(params, old, reference, batch, entropy, ONE_DEVICE)


def gradients(speed, params, batch, old=None, reference=REFERENCE, entropy=0.0):
    """Call the program with all of its arguments: one left out would compile another."""
    return program(speed, params, batch, old, reference, entropy)


def policy_gradient(speed, params, batch, old=None):
    """Return (gradient, metrics) without KL (the policy is its own reference, gradient pi - ref = 0) and entropy."""
    return gradients(speed, params, batch, old, params["model"])


def calls_of(batch):
    """States and statistics of all calls, from the record alone; leading axes [calls, rollouts]."""
    record = adaptive.Record(**{name: batch[name] for name in RECORD})

    def one(call):
        state = record.state_before(jnp.full(ROWS, call), MASK)
        active = call < record.calls
        committed = (record.commit_step == call) & active[:, None]
        return {
            "call": call,
            "active": active,
            "state": state,
            "committed": committed,
            "remasked": (state == MASK) & ~committed & active[:, None],
            "drawn": record.predictions[:, call].astype(jnp.int32),
            "tick": record.tick[:, call],
            "z_star": record.z_star[:, call],
            "log_floor": record.log_floor[:, call],
            "features": record.features[:, call],
            "previous": record.decision[:, jnp.maximum(call - 1, 0)],
            "decision": record.decision[:, call],
            "action": record.action[:, call],
        }

    return jax.vmap(one)(jnp.arange(CALLS))


def branches(speed, params, x, cond):
    """Log-probabilities of the conditional branch and of the guided draw, [B,N,K] each."""
    logits, timestep = toy_model.logits_of(MODEL, params), jnp.asarray(speed.sampler.clock.timestep)[x["tick"]]
    conditional = logits(x["state"], timestep, cond)
    null = jax.lax.stop_gradient(logits(x["state"], timestep, jnp.full(ROWS, NULL)))
    guided = null + speed.policy.guidance * (conditional - null)
    return jax.nn.log_softmax(conditional), jax.nn.log_softmax(guided / speed.policy.temperature)


def reinforce(params, speed, batch):
    """Loss whose gradient is REINFORCE with A_j: -(sum_j omega_j A_j log p(rollout j)) / sum omega, 5.3's weights.

    Tokens and decisions have their own omega and A.
    """
    threshold = speed.sampler.action == "threshold"

    def call(x):
        _, logp = branches(speed, params["model"], x, batch["cond"])
        hard = speed.tokens.likelihood == "hard" and not threshold
        z_star = x["log_floor"] if hard else x["z_star"]
        tau = jnp.asarray(speed.sampler.clock.noise)[x["tick"]] * (not threshold)
        spread = [jnp.broadcast_to(v[:, None], x["state"].shape).ravel() for v in (z_star, tau)]
        flags = (x["drawn"].ravel(), x["committed"].ravel(), x["remasked"].ravel())
        new, _, scored = position_likelihood(
            speed.tokens.likelihood, logp.reshape(-1, CODES), logp.reshape(-1, CODES), *flags, *spread
        )
        token = (new * scored).reshape(ROWS, TOKENS).sum(-1) / TOKENS
        token *= jnp.where(x["call"] == 0, speed.first_call_tokens, 1.0)
        made = jnp.broadcast_to(x["call"], (ROWS,))
        parts = (x["features"], x["previous"], x["decision"], x["action"], made)
        free = x["active"] & (x["call"] < CALLS - 1) if threshold else x["active"]
        decision = jnp.where(free, speed.head.score(params["head"], *parts)[0], 0.0) / CALLS
        return token, decision

    total = 0.0
    for kind, score in zip(("", "decision_"), jax.vmap(call)(calls_of(batch)), strict=True):
        per_rollout = score.sum(0) * (CALLS / batch["calls"] if speed.per_rollout_mean else 1.0)
        keep = batch[f"{kind}keep"]
        total -= (keep * batch[f"{kind}advantage"] * per_rollout).sum() / keep.sum()
    return total


expected_gradient = jax.jit(jax.grad(reinforce), static_argnums=1)


def close(a, b, atol=1e-6):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol, rtol=1e-5), a, b)


def largest(tree):
    return max(float(np.abs(x).max()) for x in jax.tree.leaves(tree))
