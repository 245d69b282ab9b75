"""Gradient of an update from recorded rollouts (speed_rl spec 5.3, 5.4; spec 9, oracles 3, 10 and 12)."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_model

from maskrl_jax.rl import kl
from maskrl_jax.rl.policy import Head, Policy
from maskrl_jax.rl.speed_update import RECORD, SpeedUpdate
from maskrl_jax.rl.step_likelihood import position_likelihood
from maskrl_jax.rl.token_terms import TokenLoss, token_terms
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
ONE_DEVICE = types.SimpleNamespace(size=1, all_reduce=lambda tree: tree, split=lambda tree: tree)
REFERENCE = jax.tree.map(lambda x: x - 0.2 * jnp.sin(9 * x), toy_model.tabular_params(TOKENS, CODES, NULL + 1))
LEARN = {
    "cond": jnp.array([0, 0, 1, 1]),
    "advantage": jnp.array([1.0, -0.7, 0.4, -1.3]),
    "keep": jnp.array([1.0, 1.0, 0.0, 1.0]),
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
def batch_of(action="stride"):
    """Roll out with predictions kept; the rollouts differ in their number of calls."""
    policy, params = dataclasses.replace(POLICY, action=action), params_of(action)
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
    """Loss whose gradient is REINFORCE with A_j: -(sum_j omega_j A_j log p(rollout j)) / sum omega, 5.3's weights."""
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
        return token + decision

    per_rollout = jax.vmap(call)(calls_of(batch)).sum(0)
    if speed.per_rollout_mean:
        per_rollout *= CALLS / batch["calls"]
    return -(batch["keep"] * batch["advantage"] * per_rollout).sum() / batch["keep"].sum()


expected_gradient = jax.jit(jax.grad(reinforce), static_argnums=1)


def close(a, b, atol=1e-6):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol, rtol=1e-5), a, b)


def largest(tree):
    return max(float(np.abs(x).max()) for x in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    ("tokens", "fields"),
    [
        ({"likelihood": "transition", "kl": "forward"}, {}),
        ({"likelihood": "hard", "kl": "reverse"}, {"micro_batch": 3}),
        ({"likelihood": "kept", "kl": "k3"}, {"per_rollout_mean": True}),
        ({"likelihood": "all", "kl": "forward"}, {}),
        ({"likelihood": "transition", "kl": "forward"}, {"first_call_tokens": 0.3}),
    ],
)
def test_gradient_of_the_first_update_is_reinforce(tokens, fields):
    """One of the four rollouts is dropped: it counts neither in the sum nor in its weight."""
    speed, params = changed(tokens, **fields), params_of()
    found, metrics = policy_gradient(speed, params, batch_of())
    close(found, expected_gradient(params, speed, batch_of()))
    assert largest(found["model"]) > 1e-3 and largest(found["head"]) > 1e-3
    assert float(metrics["rl/ratio_max_err"][0]) == 0.0
    np.testing.assert_allclose(metrics["rl/kl"][0], 0.0, atol=1e-5)
    far, metrics = gradients(speed, params, batch_of())  # from another reference
    assert float(metrics["rl/kl"][0]) > 1e-3
    assert largest(jax.tree.map(jnp.subtract, far["model"], found["model"])) > 1e-3
    close(far["head"], found["head"], 0)


def test_threshold_action_is_scored_exactly_and_its_forced_call_holds_no_decision():
    speed, params, batch = changed(policy={"action": "threshold"}), params_of("threshold"), batch_of("threshold")
    assert int(batch["calls"].max()) == CALLS  # some rollout was forced
    plain, _ = policy_gradient(speed, params, batch)
    close(plain, expected_gradient(params, speed, batch))
    found, metrics = gradients(speed, params, batch, None, params["model"], 1.0)
    assert float(metrics["rl/head_entropy"][1]) == (np.minimum(batch["calls"], CALLS - 1) * LEARN["keep"]).sum()
    # The entropy of a normal law is ln sigma + c; ln sigma has gradient 1 on its bias at every decision.
    gain = np.asarray(plain["head"]["params"]["out"]["bias"] - found["head"]["params"]["out"]["bias"])
    np.testing.assert_allclose(gain, [0.0, 1.0], atol=1e-5)


def test_loss_of_the_first_update_counts_the_terms():
    """sum_j A_j omega_j (1 + sum_k |R_k| / N + D_j / T_max), oracle 3."""
    batch, params = batch_of(), params_of()
    record = adaptive.Record(**{name: batch[name] for name in RECORD})

    @jax.jit
    def terms():
        valid, build = SPEED._policy_calls(record, batch)
        pair, real = jnp.arange(ROWS * CALLS), valid.ravel()
        row, calls, _ = build(pair, real)
        sums, *_ = token_terms(SPEED.tokens, MODEL, params["model"], None, REFERENCE, calls)
        return sums.token, SPEED._decision_terms(params["head"], None, record, batch, row, pair, real)[0]

    made, commit = np.asarray(batch["calls"]), np.asarray(batch["commit_step"])
    remasked = np.array([(commit[j, None] > np.arange(t)[:, None]).sum() for j, t in enumerate(made)])
    gain = np.asarray(batch["keep"] * batch["advantage"])
    expected = (gain * (1 + remasked / TOKENS)).sum(), (gain * made / CALLS).sum()
    np.testing.assert_allclose(terms(), expected, rtol=1e-5)


OLD = jax.tree.map(lambda x: x + 0.05 * jnp.cos(5 * x), params_of())


def test_micro_batch_size_changes_nothing():
    """With padding in the last one, with KL and entropy, behind old parameters."""
    whole, split = (gradients(changed(micro_batch=m), params_of(), batch_of(), OLD, REFERENCE, 0.1) for m in (64, 3))
    close(split[0], whole[0])
    close(split[1], whole[1], 1e-4)


def test_order_of_rollouts_changes_nothing():
    order = np.array([2, 0, 3, 1])
    shuffled = jax.tree.map(lambda x: x[order], batch_of())
    close(*(gradients(changed(), params_of(), b, None, REFERENCE, 0.1)[0] for b in (batch_of(), shuffled)))


def test_dropped_rollouts_add_nothing():
    found = policy_gradient(changed(), params_of(), batch_of())[0]
    wild = batch_of() | {"advantage": LEARN["advantage"].at[2].set(99.0)}
    close(policy_gradient(changed(), params_of(), wild)[0], found, 0)
    nobody = batch_of() | {"keep": jnp.zeros(ROWS)}
    np.testing.assert_allclose(largest(policy_gradient(changed(), params_of(), nobody)[0]), 0.0, atol=1e-7)


@pytest.mark.parametrize("first", [1.0, 5.0])
def test_kl_is_a_mean_over_calls_and_rollouts_and_entropy_one_over_decisions(first):
    """Both of the rollouts that are kept: mean_j (1/T_j) sum_k mean_i KL, and mean entropy of all decisions.

    The first call's KL counts `first` times in the loss, once in what is logged.
    """
    keep = jnp.array([1.0, 0.0, 1.0, 1.0])
    batch, params = batch_of() | {"keep": keep, "advantage": jnp.zeros(ROWS)}, params_of()

    def expected(params):
        def call(x):
            logp, _ = branches(SPEED, params["model"], x, batch["cond"])
            ref, _ = branches(SPEED, REFERENCE, x, batch["cond"])
            masked = (x["committed"] | x["remasked"]).astype(jnp.float32)
            divergence = (kl.forward_kl(logp, ref) * masked).sum(-1) / jnp.maximum(masked.sum(-1), 1)
            made = jnp.broadcast_to(x["call"], (ROWS,))
            parts = (x["features"], x["previous"], x["decision"], x["action"], made)
            return divergence, jnp.where(x["active"], SPEED.head.score(params["head"], *parts)[1], 0.0)

        divergence, entropy = jax.vmap(call)(calls_of(batch))
        share = keep / keep.sum() / batch["calls"]
        mean_kl, entropy = (divergence.sum(0) * share).sum(), (entropy.sum(0) * keep).sum()
        penalty = mean_kl + (first - 1) * (divergence[0] * share).sum()
        return 0.3 * penalty - 0.1 * entropy / (batch["calls"] * keep).sum(), (mean_kl, entropy)

    (found, metrics), (wanted, (mean_kl, entropy)) = (
        gradients(changed(first_call_kl=first), params, batch, None, REFERENCE, 0.1),
        jax.jit(jax.grad(expected, has_aux=True))(params),
    )
    close(found, wanted)
    np.testing.assert_allclose(metrics["rl/kl"][0] / metrics["rl/kl"][1], mean_kl, rtol=1e-5)
    np.testing.assert_allclose(metrics["rl/head_entropy"][0], entropy, rtol=1e-5)
    assert float(metrics["rl/head_entropy"][1]) == float((batch["calls"] * keep).sum())


def test_update_sees_the_probabilities_that_the_sampler_saw():
    metrics = gradients(changed(), params_of(), batch_of())[1]
    total, count = metrics["rl/sampler_gap"]
    assert float(count) == float((batch_of()["calls"] * LEARN["keep"]).sum())
    np.testing.assert_allclose(total / count, 0.0, atol=1e-5)
    moved = params_of() | {"model": REFERENCE}
    total, count = gradients(changed(), moved, batch_of())[1]["rl/sampler_gap"]
    assert float(total / count) > 1e-2


def test_old_parameters_make_the_ratio():
    again, metrics = policy_gradient(changed(), params_of(), batch_of(), params_of())
    np.testing.assert_allclose(metrics["rl/ratio_max_err"][0], 0.0, atol=1e-6)
    close(again, policy_gradient(changed(), params_of(), batch_of())[0])
    moved, metrics = policy_gradient(changed(), params_of(), batch_of(), OLD)
    assert float(metrics["rl/ratio_max_err"][0]) > 0.05
    clipped, terms = metrics["rl/clip_frac"]
    assert 0 < float(clipped) < float(terms)
    assert largest(jax.tree.map(jnp.subtract, moved, again)) > 1e-3


def test_decisions_have_ratios_of_their_own():
    """An old head beside the same network: token terms as before, decision terms clipped at 0.9 and 1.2."""
    params, batch = params_of(), batch_of()
    calls = calls_of(batch)

    def score(head, x):
        made = jnp.broadcast_to(x["call"], (ROWS,))
        return SPEED.head.score(head, x["features"], x["previous"], x["decision"], x["action"], made)[0]

    def expected(head):
        ratio = jnp.exp(jax.vmap(lambda x: score(head, x) - score(OLD["head"], x))(calls))
        gain = batch["advantage"][None]
        objective = jnp.minimum(ratio * gain, jnp.clip(ratio, 0.9, 1.2) * gain) * calls["active"]
        return -(objective * batch["keep"][None]).sum() / CALLS / batch["keep"].sum()

    found = policy_gradient(changed(), params, batch, params | {"head": OLD["head"]})[0]
    close(found["head"], jax.jit(jax.grad(expected))(params["head"]))
    fresh = policy_gradient(changed(), params, batch, params)[0]
    close(found["model"], fresh["model"])
    assert largest(jax.tree.map(jnp.subtract, found["head"], fresh["head"])) > 1e-3


def test_fixed_policy_has_no_decision_terms_and_no_action():
    """A policy without a head commits by counts, whatever `action` says."""
    speed = changed(policy={"kind": "fixed", "action": "threshold", "target_calls": 3})
    found = policy_gradient(speed, params_of() | {"head": {}}, batch_of())[0]
    close(found["model"], policy_gradient(changed(), params_of(), batch_of())[0]["model"])


BUDGET = {"kind": "budget", "step_set": (5, 3), "levels": 3, "temperature": 1.0}


def budget():
    return changed(policy=BUDGET, tokens={"distribution": "cond", "temperature": 1.0})


@jax.jit
def budget_calls(batch):
    return budget()._budget_calls(batch)[1](jnp.arange(ROWS * 3), jnp.ones(ROWS * 3, bool))[1]


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
