"""The three policies' settings, and the head that decides (speed_rl spec 4)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_model

from maskrl_jax.rl.policy import Head, Policy
from maskrl_jax.sampling import adaptive, observation

POLICY = Policy(max_calls=8, divisors=(8, 4, 2, 1), centre=4.0, stickiness=1.5)
CODES, TOKENS, DRAWS = 4, 16, 4000


def head_and_params(policy=POLICY):
    """Return a head that also reads its features: at the start its output weights are zero."""
    head = Head(policy)
    params = head.init(jax.random.key(1))
    out = params["params"]["out"]
    out["kernel"] = 0.3 * jax.random.normal(jax.random.key(2), out["kernel"].shape)
    return head, params


def state(previous=1, call=2):
    features = jnp.broadcast_to(
        jnp.linspace(-1.0, 1.0, observation.NUM_FEATURES)[None], (DRAWS, observation.NUM_FEATURES)
    )
    keys = jax.random.split(jax.random.key(3), DRAWS)
    return adaptive.State(features, jnp.full(DRAWS, previous), jnp.full(DRAWS, call), keys)


def score_all(head, params, seen):
    """Log-probability of each of the four decisions in a state, [4]."""
    one = [x[:1].repeat(4, 0) for x in (seen.features, seen.previous)]
    return np.asarray(head.score(params, *one, jnp.arange(4), jnp.zeros(4), seen.call[:1].repeat(4, 0))[0])


@pytest.mark.parametrize(("previous", "call", "dial"), [(1, 1, 0.0), (3, 2, 0.0), (3, 0, 0.0), (0, 1, 1.5)])
def test_decisions_follow_the_law_that_scores_them(previous, call, dial):
    """A dial multiplies the probability of T_d by T_d ** -dial."""
    (head, params), seen = head_and_params(), state(previous, call)
    decision = head.decide(params, jnp.full(DRAWS, dial))(seen)
    law = np.exp(score_all(head, params, seen))
    np.testing.assert_allclose(law.sum(), 1.0, rtol=1e-5)
    law = law * np.array(POLICY.divisors) ** -dial
    law /= law.sum()
    share = np.bincount(decision.index, minlength=4) / DRAWS
    assert (np.abs(share - law) <= 4 * np.sqrt(law * (1 - law) / DRAWS)).all()
    np.testing.assert_array_equal(decision.jump, np.array([120, 240, 480, 960])[np.asarray(decision.index)])
    assert (decision.action == 0).all()


def test_the_head_stays_with_its_last_decision_but_not_at_the_first_call():
    (head, params) = head_and_params()
    fresh = [score_all(head, params, state(previous, call=0)) for previous in (1, 3)]
    np.testing.assert_array_equal(*fresh)
    stuck = score_all(head, params, state(3))
    np.testing.assert_allclose((stuck - stuck[0])[3] - (fresh[0] - fresh[0][0])[3], 1.5, rtol=1e-5)


def test_entropy_is_that_of_the_decision():
    head, params = head_and_params()
    seen = state()
    logp = score_all(head, params, seen)
    zero = jnp.zeros(DRAWS, jnp.int32)
    entropy = head.score(params, seen.features, seen.previous, zero, jnp.zeros(DRAWS), seen.call)[1]
    np.testing.assert_allclose(entropy, np.full(DRAWS, -(np.exp(logp) * logp).sum()), rtol=1e-5)


@pytest.mark.parametrize("dial", [0.0, 1.0])
def test_thresholds_follow_the_law_that_scores_them(dial):
    """A dial lowers the logit of the threshold, so that more is committed."""
    head, params = head_and_params(dataclasses.replace(POLICY, action="threshold"))
    seen = state()
    mean, std = (float(x[0]) for x in head.module().apply(params, seen.features[:1]))
    decision = head.decide(params, jnp.full(DRAWS, dial))(seen)
    np.testing.assert_allclose(decision.action.mean(), mean - dial, atol=4 * std / np.sqrt(DRAWS))
    np.testing.assert_allclose(decision.action.std(), std, rtol=4 / np.sqrt(2 * DRAWS))
    assert (decision.jump == 120).all() and (decision.index == 0).all()
    logp, entropy = head.score(params, *seen[:2], decision.index, decision.action, seen.call)
    deviation = (np.asarray(decision.action) - mean) / std
    np.testing.assert_allclose(logp, -0.5 * deviation**2 - np.log(std * np.sqrt(2 * np.pi)), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(entropy[0], np.log(std * np.sqrt(2 * np.pi * np.e)), rtol=1e-5)


def test_thresholds_start_at_the_given_confidence():
    policy = dataclasses.replace(POLICY, action="threshold", kappa=0.95, kappa_std=0.25)
    head, params = head_and_params(policy)
    (mean,), (std,) = Head(policy).module().apply(Head(policy).init(jax.random.key(0)), state().features[:1])
    np.testing.assert_allclose([jax.nn.sigmoid(mean), std], [0.95, 0.25], rtol=1e-5)
    assert policy.sampler(TOKENS).order == "confident"
    assert dataclasses.replace(policy, order="uncertain").sampler(TOKENS).order == "uncertain"


def test_the_dial_trades_calls_for_speed_in_one_program():
    head, params = head_and_params()
    keys, cond = jax.random.split(jax.random.key(0), 64), jnp.zeros(64, jnp.int32)

    @jax.jit
    def calls(dial):
        decide = head.decide(params, jnp.full(64, dial))
        model = toy_model.undecided(CODES)
        record = adaptive.rollout(model, decide, keys, cond, jnp.int32(0), POLICY.sampler(TOKENS), TOKENS, CODES)
        return record.calls.mean()

    slow, plain, fast = (float(calls(jnp.float32(dial))) for dial in (-3.0, 0.0, 3.0))
    assert fast + 1 < plain < slow - 1
    assert calls._cache_size() == 1


def test_recorded_decisions_have_the_likelihood_that_they_were_drawn_with():
    """Scoring a record needs nothing but the record: previous decisions and features are in it."""
    head, params = head_and_params()
    seen = []

    def watched(now):
        decision = head.decide(params, jnp.zeros(4))(now)
        logits, _, eta = head.module().apply(params, now.features)
        sticky = eta * jnp.where(now.call[:, None] == 0, 0.0, jax.nn.one_hot(now.previous, 4))
        logp = jnp.take_along_axis(jax.nn.log_softmax(logits + sticky), decision.index[:, None], -1)[:, 0]
        jax.debug.callback(lambda x: seen.append(np.array(x)), logp, ordered=True)
        return decision

    @jax.jit
    def roll():
        keys, cond = jax.random.split(jax.random.key(0), 4), jnp.zeros(4, jnp.int32)
        model = toy_model.contextual(CODES)
        return adaptive.rollout(model, watched, keys, cond, jnp.int32(0), POLICY.sampler(TOKENS), TOKENS, CODES)

    record = roll()
    jax.effects_barrier()
    for call, logp in enumerate(seen):
        previous, made = record.decision[:, max(call - 1, 0)], jnp.full(4, call)
        parts = (record.features[:, call], previous, record.decision[:, call], record.action[:, call], made)
        active = np.asarray(record.calls) > call
        np.testing.assert_allclose(head.score(params, *parts)[0][active], logp[active], rtol=1e-5)


@pytest.mark.parametrize(("kind", "steps"), [("adaptive", (8, 4, 2, 1)), ("fixed", (5,)), ("budget", (2, 4))])
def test_step_counts_of_a_policy(kind, steps):
    policy = dataclasses.replace(POLICY, kind=kind, target_calls=5, step_set=[2, 4], divisors=[8, 4, 2, 1])
    assert policy.steps() == steps
    assert isinstance(hash(policy), int)  # lists of a config become tuples


def test_sampler_takes_over_the_settings():
    policy = dataclasses.replace(
        POLICY, noise=1.5, temperature=0.7, guidance=2.0, guidance_schedule="cosine", action="threshold"
    )
    sampler = policy.sampler(TOKENS, keep_predictions=True)
    assert (sampler.clock.num_tokens, sampler.clock.ticks, sampler.clock.noise_scale) == (TOKENS, 960, 1.5)
    assert (sampler.temperature, sampler.guidance, sampler.guidance_schedule) == (0.7, 2.0, "cosine")
    assert (sampler.max_calls, sampler.action, sampler.keep_predictions) == (8, "threshold", True)
    assert dataclasses.replace(policy, kind="fixed").sampler(TOKENS).action == "stride"  # no head, no action
    ratio = dataclasses.replace(policy, timesteps="mask_ratio").sampler(TOKENS).clock
    assert (ratio.timesteps, sampler.clock.timesteps) == ("mask_ratio", "clock")
    counted = dataclasses.replace(POLICY, kind="fixed", target_calls=4, timesteps="countdown").sampler(TOKENS).clock
    assert counted.timestep[::240].tolist() == [3, 2, 1, 0, 0]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"kind": "greedy"}, "policy.kind 'greedy' is not one of adaptive, fixed, budget"),
        ({"divisors": (4, 2, 1)}, r"largest of policy.divisors \(4\) must be max_calls \(8\)"),
        ({"action": "skip"}, "'skip' is not one of stride, threshold"),
        ({"divisors": (8, 7)}, "num_steps 7 does not divide the clock"),
        ({"max_calls": 20, "divisors": (20, 1)}, "num_steps 20 exceeds the 16 image tokens"),
        ({"kind": "fixed", "target_calls": 10}, "a policy of 10 calls exceeds max_calls 8"),
        ({"opening": 8}, r"policy.opening 8 must lie in 0..7 \(max_calls - 1\)"),
        ({"timesteps": "countdown"}, "timesteps 'countdown' counts the calls of a fixed plan"),
        ({"kind": "budget", "step_set": (2, 4), "timesteps": "countdown"}, "use clock, mask_ratio or const"),
        ({"timesteps": "sundial"}, "timesteps 'sundial' is not one of clock"),
        ({"kind": "budget", "step_set": (2, 12)}, "a policy of 12 calls exceeds max_calls 8"),
    ],
)
def test_impossible_policies_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(POLICY, **wrong).sampler(TOKENS)


def test_the_opening_starts_at_the_smallest_stride_and_does_not_stick():
    policy = dataclasses.replace(POLICY, opening=2)
    head = Head(policy)
    params = head.init(jax.random.key(1))
    features = jnp.zeros((1, observation.NUM_FEATURES))
    laws = [
        [
            np.exp(jax.nn.log_softmax(head.logits(params, features, jnp.array([p]), jnp.array([call]))[0]))
            for p in (0, 3)
        ]
        for call in range(4)
    ]
    for call in range(3):
        np.testing.assert_array_equal(*laws[call])  # whatever was decided before
    assert [int(np.argmax(laws[call][0])) for call in range(3)] == [0, 0, 1]  # T_d 8, 8, then the centre
    np.testing.assert_allclose(laws[3][1][3] / laws[3][1][1], laws[2][1][3] / laws[2][1][1] * np.exp(1.5), rtol=1e-5)
