"""The clocked decode loop and its records (speed_rl spec 4.4 and 5.4; spec 9, oracles 2 and 12)."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_model

from maskrl_jax.sampling import adaptive
from maskrl_jax.sampling.clock import Clock
from maskrl_jax.sampling.maskgit import SamplerConfig, decode, make_plan

CODES, TOKENS, ROWS = 4, 16, 4
MASK = CODES
CLOCK = Clock(TOKENS, noise_scale=3.0)
CONFIG = adaptive.AdaptiveConfig(clock=CLOCK, max_calls=8)
COND = jnp.arange(ROWS) % 3


def keys():
    return jax.random.split(jax.random.key(0), ROWS)


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
    return adaptive.rollout(
        model, decide, keys(), COND, jnp.int32(3), config, TOKENS, MASK, early_stop=early_stop
    )


@functools.cache
def record_of(action="stride", early_stop=True):
    config = dataclasses.replace(CONFIG, action=action, guidance=1.5, keep_predictions=True)
    decide = {"stride": wandering, "threshold": sure_enough}[action]
    return jax.jit(lambda: rollout(decide, config, early_stop))()


@pytest.mark.parametrize("action", adaptive.ACTIONS)
def test_scan_and_while_loop_are_equal_bit_for_bit(action):
    jax.tree.map(np.testing.assert_array_equal, record_of(action, True), record_of(action, False))


@pytest.mark.parametrize("num_steps", [1, 4, 5, 8])
def test_constant_stride_is_the_fixed_sampler(num_steps):
    """Same counts and, under one Gumbel law and one key, the same tokens (oracle 2)."""
    model, config = toy_model.contextual(CODES), dataclasses.replace(CONFIG, max_calls=16)
    jump = jnp.full(ROWS, CLOCK.stride(num_steps))
    given = jnp.full((ROWS, TOKENS), MASK)
    clocked = jax.jit(lambda: rollout(adaptive.given_strides(jump), config))()
    plan = make_plan(SamplerConfig(num_steps=num_steps, gumbel=CLOCK.noise_scale), TOKENS)
    fixed = jax.jit(lambda plan: decode(model, keys(), COND, jnp.int32(3), plan, given, MASK))(plan)
    np.testing.assert_array_equal(clocked.ids, fixed.ids)
    np.testing.assert_array_equal(clocked.commit_step, fixed.commit_step)
    assert clocked.calls.tolist() == fixed.calls.tolist() == [num_steps] * ROWS
    counts = np.bincount(np.ravel(clocked.commit_step[0]), minlength=num_steps)
    np.testing.assert_array_equal(counts, CLOCK.constant_stride_counts(num_steps))


def test_the_loop_runs_as_often_as_the_slowest_sample_needs():
    """Without jit the loop is python's, and the model can count."""
    seen, model = [], toy_model.undecided(CODES)

    def counting(*call):
        seen.append(call)
        return model(*call)

    jump = jnp.array([960, 480, 320, 960])
    with jax.disable_jit():
        record = rollout(adaptive.given_strides(jump), model=counting)
    assert record.calls.tolist() == [1, 2, 3, 1]
    assert len(seen) == 3
    # t(c) at ticks 0, 320, 640 of the sample with three calls: ceil((960 - c) / 15) - 1
    assert [int(timestep[2]) for _, timestep, _ in seen] == [63, 42, 21]


def test_rebuilt_states_are_those_that_the_network_saw():
    seen, model = [], toy_model.contextual(CODES)

    def watching(ids, timestep, cond):
        seen.append((np.array(ids), np.array(timestep)))
        return model(ids, timestep, cond)

    with jax.disable_jit():
        record = rollout(wandering, model=watching)
    assert len(set(record.calls.tolist())) > 1
    for call, (ids, timestep) in enumerate(seen):
        active = np.asarray(record.calls) > call
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
        index = jnp.where(state.first, 2, state.previous)
        return adaptive.Decision(index, jnp.zeros(index.shape), jnp.array([960, 480, 240])[index])

    record = jax.jit(lambda: rollout(staying, model=toy_model.undecided(CODES)))()
    assert record.decision[:, :5].tolist() == [[2, 2, 2, 2, 0]] * ROWS
    assert record.calls.tolist() == [4] * ROWS


def test_recorded_confidences_are_those_of_the_committed():
    """With uniform codes every log-probability is -ln 4; z* adds noise, and none is left at the last call."""
    record = jax.jit(lambda: rollout(adaptive.given_strides(jnp.full(ROWS, 240)), model=toy_model.undecided(CODES)))()
    np.testing.assert_allclose(record.log_floor[:, :4], -np.log(4), rtol=1e-6)
    assert len(np.unique(record.z_star[:, 0])) == ROWS
    late = dataclasses.replace(CONFIG, clock=Clock(TOKENS, noise_scale=0.0))
    silent = jax.jit(lambda: rollout(adaptive.given_strides(jnp.full(ROWS, 240)), late, model=toy_model.undecided(4)))()
    np.testing.assert_array_equal(silent.z_star, silent.log_floor)


def test_z_star_separates_the_committed_from_the_masked():
    """Replay a call: z = log pi(y) + tau Gumbel, the committed are those with z >= z*."""
    config = dataclasses.replace(CONFIG, keep_predictions=True)
    record = jax.jit(lambda: rollout(wandering, config))()
    call = 1
    state = record.state_before(jnp.full(ROWS, call), MASK)
    logp = adaptive.guided_logp(toy_model.contextual(CODES), state, record.tick[:, call], COND, None, config)
    drawn = record.predictions[:, call].astype(jnp.int32)
    confidence = np.asarray(jnp.take_along_axis(logp, drawn[..., None], -1)[..., 0])
    noise = adaptive.draws.gumbel(adaptive.draws.step_keys(keys(), call, adaptive.draws.NOISE), TOKENS)
    z = confidence + np.asarray(CLOCK.noise[np.asarray(record.tick)[:, call]])[:, None] * np.asarray(noise)
    committed = np.asarray(record.commit_step) == call
    masked = np.asarray(state) == MASK
    np.testing.assert_array_equal(committed, masked & (z >= np.asarray(record.z_star)[:, call, None] - 1e-5))
    np.testing.assert_allclose(
        record.log_floor[:, call], np.where(committed, confidence, np.inf).min(-1), rtol=1e-5
    )
    np.testing.assert_array_equal(np.asarray(record.ids)[committed], np.asarray(drawn)[committed])


def test_predictions_hold_what_every_call_drew_where_asked_for():
    kept = record_of("stride")
    for row, calls in enumerate(kept.calls.tolist()):
        drawn = np.asarray(kept.predictions)[row, np.asarray(kept.commit_step)[row], np.arange(TOKENS)]
        np.testing.assert_array_equal(drawn, kept.ids[row])
        assert (kept.predictions[row, calls:] == 0).all()
    assert jax.eval_shape(lambda: rollout(wandering)).predictions.shape == (ROWS, 0, TOKENS)


@pytest.mark.parametrize(("model", "calls"), [(toy_model.confident, 1), (toy_model.undecided, 8)])
def test_threshold_commits_the_sure_at_once_and_else_the_least(model, calls):
    config = dataclasses.replace(CONFIG, action="threshold")
    record = jax.jit(lambda: rollout(sure_enough, config, model=model(CODES)))()
    assert record.calls.tolist() == [calls] * ROWS
    if calls == 8:  # all log-probabilities tie at -ln 4: ties with the n_min-th are committed together
        pytest.fail("unreachable")
