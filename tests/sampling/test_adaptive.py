"""The clocked decode loop and its records (speed_rl spec 4.4 and 5.4; spec 9, oracles 2 and 12)."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_model

from maskrl_jax.sampling import adaptive, draws
from maskrl_jax.sampling.clock import Clock
from maskrl_jax.sampling.maskgit import SamplerConfig, decode, make_plan
from maskrl_jax.sampling.schedules import masked_after

CODES, TOKENS, ROWS = 4, 16, 4
MASK = CODES
CLOCK = Clock(TOKENS, noise_scale=3.0)
CONFIG = adaptive.AdaptiveConfig(clock=CLOCK, max_calls=8)
GUIDED = dataclasses.replace(CONFIG, guidance=1.5, keep_predictions=True)
COND, NULL = jnp.arange(ROWS) % 3, jnp.int32(3)


def keys():
    return jax.random.split(jax.random.key(0), ROWS)


def counts_of(num_steps):
    """Newly unmasked tokens of each call of a cosine schedule."""
    return -np.diff(masked_after("cosine", TOKENS, num_steps), prepend=TOKENS)


def wandering(state):
    """Choose among jumps of a half, a quarter and an eighth of the clock, by key and by features."""
    drawn = jax.vmap(lambda key: jax.random.randint(key, (), 0, 3))(state.keys)
    index = (drawn + (state.features[:, 3] > 0.5)) % 3
    return adaptive.Decision(index, jnp.zeros(index.shape), jnp.array([480, 240, 120])[index])


def sure_enough(state):
    """Threshold action: kappa 0.5, at least the counts of eight steps."""
    zero = jnp.zeros_like(state.previous)
    return adaptive.Decision(zero, zero.astype(jnp.float32), zero + 120)


def rollout(decide, config=CONFIG, early_stop=True, model=None):
    model = model or toy_model.contextual(CODES)
    return adaptive.rollout(model, decide, keys(), COND, NULL, config, TOKENS, MASK, early_stop=early_stop)


@functools.cache
def record_of(action="stride", early_stop=True):
    config = dataclasses.replace(GUIDED, action=action)
    decide = {"stride": wandering, "threshold": sure_enough}[action]
    return jax.jit(lambda: rollout(decide, config, early_stop))()


@pytest.mark.parametrize("action", adaptive.ACTIONS)
def test_scan_and_while_loop_are_equal_bit_for_bit(action):
    jax.tree.map(np.testing.assert_array_equal, record_of(action, True), record_of(action, False))


def test_constant_stride_is_the_fixed_sampler():
    """Same counts and, under one Gumbel law and one key, the same tokens (oracle 2)."""
    model, given = toy_model.contextual(CODES), jnp.full((ROWS, TOKENS), MASK)
    clocked = jax.jit(lambda jump: rollout(adaptive.given_strides(jump)))
    fixed = jax.jit(lambda plan: decode(model, keys(), COND, NULL, plan, given, MASK))
    for num_steps in (1, 4, 5, 8):
        record = clocked(jnp.full(ROWS, CLOCK.stride(num_steps)))
        plan = fixed(make_plan(SamplerConfig(num_steps=num_steps, gumbel=CLOCK.noise_scale), TOKENS))
        np.testing.assert_array_equal(record.ids, plan.ids)
        np.testing.assert_array_equal(record.commit_step, plan.commit_step)
        assert record.calls.tolist() == plan.calls.tolist() == [num_steps] * ROWS
        counts = np.bincount(record.commit_step[0], minlength=num_steps)
        np.testing.assert_array_equal(counts, counts_of(num_steps))


def test_rebuilt_states_are_what_the_network_saw_and_the_loop_ends_with_the_slowest():
    seen, model = [], toy_model.contextual(CODES)

    def watched(ids, timestep, cond):
        jax.debug.callback(lambda *call: seen.append([np.array(x) for x in call]), ids, timestep, ordered=True)
        return model(ids, timestep, cond)

    record = jax.jit(lambda: rollout(wandering, model=watched))()
    jax.effects_barrier()
    calls = np.asarray(record.calls)
    assert len(set(calls)) > 1
    assert len(seen) == calls.max()
    for call, (ids, timestep) in enumerate(seen):
        active = calls > call
        rebuilt = record.state_before(jnp.full(ROWS, call), MASK)
        np.testing.assert_array_equal(rebuilt[active], ids[active])
        np.testing.assert_array_equal(CLOCK.timestep[np.asarray(record.tick)[active, call]], timestep[active])
        assert (ids[~active] != MASK).all()


@pytest.mark.parametrize("action", adaptive.ACTIONS)
def test_every_call_commits_and_every_position_once(action):
    record = record_of(action)
    assert (record.ids < CODES).all()
    assert int(record.calls.max()) <= CONFIG.max_calls
    for row, calls in enumerate(record.calls.tolist()):
        counts = np.bincount(record.commit_step[row], minlength=CONFIG.max_calls)
        assert counts[:calls].min() >= 1
        assert counts[:calls].sum() == TOKENS


@pytest.mark.parametrize("action", adaptive.ACTIONS)
def test_finished_samples_write_nothing(action):
    record = record_of(action)
    done = np.arange(CONFIG.max_calls)[None] >= np.asarray(record.calls)[:, None]
    assert done.any()
    for name in ("tick", "decision", "action", "z_star", "log_floor", "features", "predictions"):
        assert (np.asarray(getattr(record, name))[done] == 0).all(), name


def test_decisions_move_the_clock_and_the_clock_sets_the_counts():
    record = record_of("stride")
    jumps = np.array([480, 240, 120])[np.asarray(record.decision)]
    for row, calls in enumerate(record.calls.tolist()):
        ticks = np.concatenate([[0], np.cumsum(jumps[row, :calls])])
        np.testing.assert_array_equal(record.tick[row, :calls], ticks[:-1])
        left = np.array([TOKENS - (record.commit_step[row] < call).sum() for call in range(calls + 1)])
        expected = np.clip(CLOCK.masked[np.minimum(ticks[1:-1], 960)], 1, left[:-2] - 1)
        np.testing.assert_array_equal(left[1:-1], expected)


def test_decisions_are_shown_the_one_before_and_the_first_call():
    """A policy that stays: it starts with a quarter and then repeats what it did."""

    def staying(state):
        index = jnp.where(state.call == 0, 2, state.previous)
        return adaptive.Decision(index, jnp.zeros(index.shape), jnp.array([960, 480, 240])[index])

    record = jax.jit(lambda: rollout(staying, model=toy_model.undecided(CODES)))()
    assert record.decision[:, :5].tolist() == [[2, 2, 2, 2, 0]] * ROWS
    assert record.calls.tolist() == [4] * ROWS


def test_z_star_separates_the_committed_from_the_masked():
    """Replay a call: z = log pi(y) + tau Gumbel, the committed are those with z >= z*."""
    record, call = record_of("stride"), 1
    state = record.state_before(jnp.full(ROWS, call), MASK)
    drawn = record.predictions[:, call].astype(jnp.int32)

    @jax.jit
    def replay():
        logp = adaptive.guided_logp(toy_model.contextual(CODES), state, record.tick[:, call], COND, NULL, GUIDED)
        noise = draws.gumbel(draws.step_keys(keys(), call, draws.NOISE), TOKENS)
        return jnp.take_along_axis(logp, drawn[..., None], -1)[..., 0], noise

    confidence, noise = map(np.asarray, replay())
    z = confidence + CLOCK.noise[np.asarray(record.tick)[:, call]][:, None] * noise
    committed = np.asarray(record.commit_step) == call
    masked = np.asarray(state) == MASK
    assert (masked & ~committed).any()
    np.testing.assert_array_equal(committed, masked & (z >= np.asarray(record.z_star)[:, call, None] - 1e-5))
    np.testing.assert_allclose(record.z_star[:, call], np.where(committed, z, np.inf).min(-1), rtol=1e-5)
    np.testing.assert_allclose(record.log_floor[:, call], np.where(committed, confidence, np.inf).min(-1), rtol=1e-5)


def test_predictions_hold_what_every_call_drew_where_asked_for():
    kept = record_of("stride")
    for row, calls in enumerate(kept.calls.tolist()):
        drawn = np.asarray(kept.predictions)[row, np.asarray(kept.commit_step)[row], np.arange(TOKENS)]
        np.testing.assert_array_equal(drawn, kept.ids[row])
        assert (kept.predictions[row, calls:] == 0).all()
    assert jax.eval_shape(lambda: rollout(wandering)).predictions.shape == (ROWS, 0, TOKENS)


@pytest.mark.parametrize(("tilt", "calls"), [(6.0, 1), (0.01, 8)])
def test_threshold_commits_the_sure_at_once_and_else_the_least(tilt, calls):
    """Code 0 is likelier by `tilt` at every position, a little more at each: no two confidences tie."""

    def model(ids, timestep, cond):
        lean = tilt * (1 + jnp.arange(TOKENS) / TOKENS)
        return jnp.broadcast_to(lean[None, :, None] * (jnp.arange(CODES) == 0)[None, None], (*ids.shape, CODES))

    config = dataclasses.replace(CONFIG, action="threshold", temperature=0.5)
    record = jax.jit(lambda: rollout(sure_enough, config, model=model))()
    assert record.calls.tolist() == [calls] * ROWS
    assert (np.asarray(record.z_star)[:, 0] <= np.log(0.5) + 1e-6).all()
    if calls == 8:
        counts = np.stack([np.bincount(row, minlength=8) for row in np.asarray(record.commit_step)])
        np.testing.assert_array_equal(counts, np.tile(counts_of(8), (ROWS, 1)))
        assert (np.asarray(record.z_star)[:, 7] == -np.inf).all()  # the last call is forced


def test_the_uncertain_order_asks_where_the_model_knows_least():
    """Position i has 1 + i mod 4 equally likely codes, and nobody is ever sure enough: the widest go first."""
    choices = 1 + np.arange(TOKENS) % 4

    def model(ids, timestep, cond):
        open_NK = np.arange(CODES)[None] < choices[:, None]
        return jnp.broadcast_to(jnp.where(open_NK, 0.0, -90.0)[None], (*ids.shape, CODES))

    def unsure(state):
        return adaptive.Decision(jnp.zeros_like(state.previous), jnp.full(ROWS, 50.0), jnp.full(ROWS, 120))

    still = dataclasses.replace(CONFIG, clock=Clock(TOKENS, noise_scale=0.0), action="threshold", order="uncertain")
    steps = np.asarray(jax.jit(lambda: rollout(unsure, still, model=model))().commit_step)
    assert (steps[:, choices == 1] == 0).all()  # certain: all at once
    assert (steps[:, choices == 4].max(-1) <= steps[:, choices == 3].min(-1)).all()
    assert (steps[:, choices == 3].max(-1) <= steps[:, choices == 2].min(-1)).all()


@pytest.mark.parametrize(("order", "mode"), [("confident", "threshold"), ("uncertain", "uncertain")])
def test_a_constant_kappa_is_the_fixed_threshold_sampler(order, mode):
    """Same noise, same keys, same tokens: what a control measures is what the policy starts from."""
    noise = 0.0 if order == "confident" else 0.7  # the surest draws are ordered without noise
    clock = Clock(TOKENS, noise_scale=noise)
    config = dataclasses.replace(CONFIG, clock=clock, action="threshold", order=order, temperature=0.6)
    record = jax.jit(lambda: rollout(sure_enough, config))()
    sampler = SamplerConfig(mode=mode, num_steps=8, gumbel=noise, temperature=0.6, threshold=0.5)
    given = jnp.full((ROWS, TOKENS), MASK)
    decoded = jax.jit(lambda plan: decode(toy_model.contextual(CODES), keys(), COND, NULL, plan, given, MASK))
    fixed = decoded(make_plan(sampler, TOKENS))
    np.testing.assert_array_equal(record.ids, fixed.ids)
    np.testing.assert_array_equal(record.commit_step, fixed.commit_step)
    assert len(np.unique(record.commit_step)) > 2
    if order == "uncertain":
        other = decoded(make_plan(dataclasses.replace(sampler, gumbel=0.0), TOKENS))
        assert (other.commit_step != fixed.commit_step).any()


def test_temperature_and_guidance_shape_what_is_drawn_from():
    """Conditional logits 2 and unconditional 1 on code 0: (1 + 3 (2 - 1)) / 2 = 2 at s = 3, temperature 2."""

    def model(ids, timestep, cond):
        lean = jnp.where(cond == 3, 1.0, 2.0)[:, None, None]
        return jnp.broadcast_to(lean * (jnp.arange(CODES) == 0)[None, None], (*ids.shape, CODES))

    config = dataclasses.replace(CONFIG, temperature=2.0, guidance=3.0)
    ids = jnp.full((ROWS, TOKENS), MASK)
    logp = adaptive.guided_logp(model, ids, jnp.zeros(ROWS, jnp.int32), COND, NULL, config)
    np.testing.assert_allclose(logp[0, 0], np.array([2.0, 0, 0, 0]) - np.log(np.exp(2) + 3), rtol=1e-5)


def test_guidance_follows_its_schedule_over_the_clock():
    config = dataclasses.replace(CONFIG, guidance=5.0, guidance_schedule="linear")
    np.testing.assert_allclose(adaptive.guidance_at(config, jnp.array([0, 240, 960])), [1, 2, 5])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"action": "skip"}, "'skip' is not one of stride, threshold"),
        ({"order": "bold"}, "'bold' is not one of confident, uncertain"),
        ({"guidance_schedule": "cubic"}, "'cubic' is not one of constant, linear, cosine"),
        ({"max_calls": 7}, "num_steps 7 does not divide"),
        ({"max_calls": 32}, "exceeds the 16 image tokens"),
    ],
)
def test_impossible_settings_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **wrong)
