"""Gradient of an update from recorded rollouts (speed_rl spec 5.3, 5.4; spec 9, oracles 3, 10 and 12)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_model
from toy_update import (
    CALLS,
    LEARN,
    MASK,
    MODEL,
    NULL,
    ONE_DEVICE,
    REFERENCE,
    ROWS,
    SPEED,
    TOKENS,
    batch_of,
    branches,
    calls_of,
    changed,
    close,
    expected_gradient,
    gradients,
    largest,
    params_of,
    policy_gradient,
)

from maskrl_jax.parallel import Parallel
from maskrl_jax.rl import kl
from maskrl_jax.rl.speed_reward import speed_reward
from maskrl_jax.rl.speed_update import RECORD
from maskrl_jax.rl.token_terms import token_terms
from maskrl_jax.sampling import adaptive


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
    assert (
        float(metrics["rl/head_entropy"][1]) == (np.minimum(batch["calls"], CALLS - 1) * LEARN["decision_keep"]).sum()
    )
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
        calls, _ = build(pair, real)
        free = SPEED._free_decisions(record, batch)
        sums, *_ = token_terms(SPEED.tokens, MODEL, params["model"], None, REFERENCE, calls, ONE_DEVICE)
        return sums.token, SPEED._decision_terms(params["head"], None, record, batch, free)[0]

    made, commit = np.asarray(batch["calls"]), np.asarray(batch["commit_step"])
    remasked = np.array([(commit[j, None] > np.arange(t)[:, None]).sum() for j, t in enumerate(made)])
    gain, decided = (np.asarray(batch[f"{kind}keep"] * batch[f"{kind}advantage"]) for kind in ("", "decision_"))
    expected = (gain * (1 + remasked / TOKENS)).sum(), (decided * made / CALLS).sum()
    np.testing.assert_allclose(terms(), expected, rtol=1e-5)


@pytest.mark.parametrize("action", adaptive.ACTIONS)
def test_done_and_forced_calls_add_exactly_nothing_to_decisions_and_gradient(action):
    """Whatever the record holds there; the last call of the threshold action is forced."""
    speed, params, batch = changed(policy={"action": action}), params_of(action), batch_of(action)
    made = np.minimum(batch["calls"], CALLS - (action == "threshold"))
    idle = np.arange(CALLS)[None] >= made[:, None]
    assert idle.any(1).any() and not idle.all()
    wild = {"features": np.where(idle[..., None], 9.0, batch["features"])}
    wild |= {"decision": np.where(idle, 3, batch["decision"]), "action": np.where(idle, -7.0, batch["action"])}
    wild = {name: jnp.asarray(value, batch[name].dtype) for name, value in wild.items()}
    plain, found = (
        gradients(speed, params, b, OLD | {"head": params["head"]}, REFERENCE, 0.1) for b in (batch, batch | wild)
    )
    jax.tree.map(np.testing.assert_array_equal, found, plain)


@pytest.mark.parametrize(("likelihood", "biased"), [("transition", False), ("all", False), ("kept", True)])
def test_speed_alone_moves_no_token_where_the_calls_are_given(likelihood, biased):
    """Oracle 8 by Monte Carlo, with the sampler's noise: 100 rounds of 64 rollouts of 1, 2, 3 or 5 calls."""
    speed = changed({"likelihood": likelihood}, {"kind": "fixed", "target_calls": CALLS})
    params, rows = params_of() | {"head": {}}, 64
    cond, calls = jnp.resize(jnp.arange(NULL), rows), jnp.resize(jnp.array([1, 2, 3, CALLS]), rows).sort()
    gain = speed_reward(calls, CALLS, 1)
    learn = {"cond": cond, "advantage": gain, "decision_advantage": gain, "prompt": cond, "round": cond}
    learn |= dict.fromkeys(("keep", "decision_keep"), jnp.ones(rows))
    sampler = speed.policy.sampler(TOKENS, keep_predictions=True)
    logits, decide = toy_model.logits_of(MODEL, params["model"]), adaptive.given_strides(960 // calls)

    def round_of(number):
        keys = jax.random.split(jax.random.fold_in(jax.random.key(8), number), rows)
        record = adaptive.rollout(logits, decide, keys, cond, MODEL.null, sampler, TOKENS, MASK)
        batch = {name: getattr(record, name) for name in RECORD} | learn
        return speed.gradients(params, None, params["model"], batch, 0.0, ONE_DEVICE)[0]["model"]

    found = jax.jit(lambda: jax.lax.map(round_of, jnp.arange(100)))()
    found = np.concatenate([np.asarray(x).reshape(100, -1) for x in jax.tree.leaves(found)], axis=1)
    error = found.std(0, ddof=1) / 10
    away = np.abs(found.mean(0)) / np.maximum(error, 1e-7)  # the unconditional branch has no gradient, nor error
    assert away.max() > 6 if biased else away.max() < 4


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
    wild = batch_of() | {
        "advantage": LEARN["advantage"].at[2].set(99.0),
        "decision_advantage": LEARN["decision_advantage"].at[1].set(99.0),
    }
    close(policy_gradient(changed(), params_of(), wild)[0], found, 0)
    nobody = batch_of() | {"keep": jnp.zeros(ROWS), "decision_keep": jnp.zeros(ROWS)}
    np.testing.assert_allclose(largest(policy_gradient(changed(), params_of(), nobody)[0]), 0.0, atol=1e-7)


@pytest.mark.parametrize("first", [1.0, 5.0])
def test_kl_is_a_mean_over_calls_and_rollouts_and_entropy_one_over_decisions(first):
    """Both of the rollouts that are kept: mean_j (1/T_j) sum_k mean_i KL, and mean entropy of all decisions.

    The first call's KL counts `first` times in the loss, once in what is logged.
    """
    keep = jnp.array([1.0, 0.0, 1.0, 1.0])
    nothing = {"advantage": jnp.zeros(ROWS), "decision_advantage": jnp.zeros(ROWS)}
    batch, params = batch_of() | {"keep": keep, "decision_keep": keep} | nothing, params_of()

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


def test_update_tells_the_network_the_timesteps_that_the_sampler_told():
    batch = batch_of(timesteps="mask_ratio")
    gaps = [
        float(np.divide(*gradients(speed, params_of(), batch)[1]["rl/sampler_gap"]))
        for speed in (changed(policy={"timesteps": "mask_ratio"}), changed())
    ]
    assert abs(gaps[0]) < 1e-5 and gaps[1] > 1e-2


def test_old_parameters_make_the_ratio():
    again, metrics = policy_gradient(changed(), params_of(), batch_of(), params_of())
    np.testing.assert_allclose(metrics["rl/ratio_max_err"][0], 0.0, atol=1e-6)
    close(again, policy_gradient(changed(), params_of(), batch_of())[0])
    moved, metrics = policy_gradient(changed(), params_of(), batch_of(), OLD)
    assert float(metrics["rl/ratio_max_err"][0]) > 0.05
    clipped, terms = metrics["rl/clip_frac"]
    assert 0 < float(clipped) < float(terms)
    assert largest(jax.tree.map(jnp.subtract, moved, again)) > 1e-3


def test_the_largest_ratio_error_is_that_of_all_devices():
    """The second device has nothing to score, and an error of 0: a mean would be half of the first one's."""
    parallel, keep = Parallel("pmap", jax.devices()[:2]), {"keep": jnp.array([1.0, 1.0, 0.0, 0.0])}

    def fn(state, frozen, batch, axis):
        return state, SPEED.gradients(*frozen, batch, jnp.float32(0), axis)[1]

    batch, frozen = batch_of() | keep, parallel.replicate((params_of(), OLD, REFERENCE))
    error, weight = parallel.update(fn)({"step": jnp.zeros(())}, frozen, batch)[1]["rl/ratio_max_err"]
    expected = gradients(changed(), params_of(), batch, OLD)[1]["rl/ratio_max_err"][0]
    assert float(expected) > 0.05
    np.testing.assert_allclose(error / weight, expected, rtol=1e-5)


def test_decisions_have_ratios_of_their_own():
    """An old head beside the same network: token terms as before, decision terms clipped at 0.9 and 1.2."""
    params, batch = params_of(), batch_of()
    calls = calls_of(batch)

    def score(head, x):
        made = jnp.broadcast_to(x["call"], (ROWS,))
        return SPEED.head.score(head, x["features"], x["previous"], x["decision"], x["action"], made)[0]

    def expected(head):
        ratio = jnp.exp(jax.vmap(lambda x: score(head, x) - score(OLD["head"], x))(calls))
        gain = batch["decision_advantage"][None]
        objective = jnp.minimum(ratio * gain, jnp.clip(ratio, 0.9, 1.2) * gain) * calls["active"]
        return -(objective * batch["decision_keep"][None]).sum() / CALLS / batch["decision_keep"].sum()

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


def test_reduced_calls_sum_to_all():
    """The token gradients of the first two and of the other calls add up to that of all (no KL)."""
    batch, params = batch_of(), params_of()

    def tokens_of(scored_calls):
        found, metrics = gradients(changed(scored_calls=scored_calls), params, batch, None, None)
        assert "rl/kl" not in metrics
        return found["model"]

    first, last, every = (tokens_of(calls) for calls in ((0, 2), (2, CALLS), None))
    assert largest(first) > 1e-3 and largest(last) > 1e-3
    close(jax.tree.map(jnp.add, first, last), every)
