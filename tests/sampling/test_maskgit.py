"""The fixed-plan decode loop, with models of three lines."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_model

from maskrl_jax.sampling import schedules
from maskrl_jax.sampling.maskgit import GIVEN, MODES, SamplerConfig, decode, make_plan

CODES, TOKENS = 4, 16
MASK = CODES
COND = jnp.array([0, 1, 2])


@functools.partial(jax.jit, static_argnames="model")
def program(model, plan, given, rows):
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(0), i))(rows)
    return decode(model, keys, COND[rows], jnp.int32(3), plan, given[rows], MASK)


def run(model, config, given=None, rows=(0, 1, 2)):
    """Decode with keys and conditions that belong to the row; programs are shared over tests."""
    given = jnp.full((3, TOKENS), MASK, jnp.int32) if given is None else given
    return program(model, make_plan(config, TOKENS), given, jnp.asarray(rows))


def counts(rollout, steps):
    """Count the tokens that each call committed, [B, steps]."""
    return np.stack([(np.asarray(rollout.commit_step) == step).sum(-1) for step in range(steps)], -1)


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_makes_the_calls_and_commits_the_counts_of_its_plan(mode):
    """A model without any confidence gives the threshold modes nothing beyond 14, 11, 6, 0 left of 16."""
    rollout = run(toy_model.undecided(CODES), SamplerConfig(mode=mode, num_steps=4))
    assert counts(rollout, 4).tolist() == [[2, 3, 5, 6]] * 3
    assert rollout.calls.tolist() == [4, 4, 4]
    assert (rollout.ids < MASK).all()
    assert (rollout.commit_step.dtype, rollout.ids.dtype) == (jnp.uint8, jnp.int32)


@pytest.mark.parametrize("mode", ["threshold", "uncertain", "entropy"])
def test_threshold_modes_stop_when_the_model_is_sure(mode):
    rollout = run(toy_model.confident(CODES), SamplerConfig(mode=mode))
    assert rollout.calls.tolist() == [1, 1, 1]
    np.testing.assert_array_equal(rollout.ids, (np.arange(TOKENS)[None] + np.asarray(COND)[:, None]) % CODES)


@pytest.mark.parametrize(("threshold", "more"), [(0.89, True), (0.91, False)])
def test_threshold_is_a_probability(threshold, more):
    """Code 0 has probability 0.9: at 0.89 all draws of it are committed at once, at 0.91 the plan's five."""

    def logits(ids, timestep, cond):
        law = jnp.log(jnp.array([0.9, 0.1 / 3, 0.1 / 3, 0.1 / 3]))
        return jnp.broadcast_to(law[None, None], (*ids.shape, CODES))

    rollout = run(logits, SamplerConfig(mode="threshold", num_steps=2, threshold=threshold))
    assert (counts(rollout, 1) > 5).all() == more
    assert (counts(rollout, 1) == 5).all() != more
    assert (rollout.ids[rollout.commit_step == 0] == 0).all()


@pytest.mark.parametrize(("threshold", "first"), [(0.68, 5), (0.70, 16)])
def test_entropy_threshold_is_in_nats(threshold, first):
    """Two equally likely codes have ln 2 = 0.693 nats; below it only the plan's five are committed."""

    def logits(ids, timestep, cond):
        return jnp.broadcast_to(jnp.array([0.0, 0.0, -40.0, -40.0])[None, None], (*ids.shape, CODES))

    rollout = run(logits, SamplerConfig(mode="entropy", num_steps=2, threshold=threshold))
    assert counts(rollout, 1).tolist() == [[first]] * 3


@pytest.mark.parametrize("mode", MODES)
def test_given_tokens_never_change(mode):
    given = jnp.full((3, TOKENS), MASK, jnp.int32).at[0, 2:9].set(3).at[1, :].set(1)
    rollout = run(toy_model.undecided(CODES), SamplerConfig(mode=mode, num_steps=4), given)
    known = np.asarray(given) != MASK
    np.testing.assert_array_equal(np.asarray(rollout.ids)[known], np.asarray(given)[known])
    assert (rollout.ids != MASK).all()
    np.testing.assert_array_equal(np.asarray(rollout.commit_step) == GIVEN, known)
    assert rollout.calls[1] == 0


def test_given_tokens_shrink_every_share():
    """8 of 16 masked, cosine in 4 steps: 14, 11, 6, 0 of 16 become 7, 5, 3, 0 of 8."""
    given = jnp.full((3, TOKENS), MASK, jnp.int32).at[:, ::2].set(0)
    rollout = run(toy_model.undecided(CODES), SamplerConfig(num_steps=4), given)
    assert counts(rollout, 4).tolist() == [[1, 2, 2, 3]] * 3


def test_the_loop_ends_when_nothing_is_masked():
    """Eight steps for at most two tokens: two network calls, and none for a row that has no MASK."""
    seen = []

    def counted(ids, timestep, cond):
        jax.debug.callback(lambda: seen.append(1), ordered=True)
        return jnp.zeros((*ids.shape, CODES))

    given = jnp.full((3, TOKENS), 0, jnp.int32).at[:2, :2].set(MASK)
    rollout = run(counted, SamplerConfig(num_steps=8), given)
    jax.effects_barrier()
    assert rollout.calls.tolist() == [2, 2, 0]
    assert len(seen) == 2


def test_one_program_serves_all_steps_temperatures_and_scales():
    chex.clear_trace_counter()
    model, empty = toy_model.contextual(CODES), jnp.full((3, TOKENS), MASK)
    once = jax.jit(chex.assert_max_traces(lambda plan: program.__wrapped__(model, plan, empty, jnp.arange(3)), n=1))
    configs = [SamplerConfig(num_steps=t, guidance=2.0, max_steps=8) for t in (1, 4, 8)]
    assert [once(make_plan(c, TOKENS)).calls.tolist() for c in configs] == [[t] * 3 for t in (1, 4, 8)]
    tables = [
        {"temperature": 0.01},
        {"guidance": 5.0},
        {"schedule": "arccos"},
        {"gumbel": 0.0},
    ]
    base = np.asarray(once(make_plan(configs[1], TOKENS)).ids)
    for table in tables:
        changed = SamplerConfig(**{"num_steps": 4, "guidance": 2.0, "max_steps": 8} | table)
        assert (np.asarray(once(make_plan(changed, TOKENS)).ids) != base).any(), table


def test_temperature_divides_the_logits():
    """At temperature 0.05 the likeliest code is drawn, at 1000 all are alike."""

    def logits(ids, timestep, cond):
        return jnp.broadcast_to(jnp.array([0.0, 1.0, 0.0, 0.0])[None, None], (*ids.shape, CODES))

    cold, hot = (run(logits, SamplerConfig(temperature=t, num_steps=1)).ids for t in (0.05, 1e3))
    assert (cold == 1).all()
    assert (hot == 1).mean() < 0.5


def test_guidance_pulls_away_from_the_null_condition():
    """The condition prefers code 1 over 0 by a little, the null condition 0: guidance 20 settles it."""

    def logits(ids, timestep, cond):
        lean = jnp.where(cond == 3, -1.0, 1.0)[:, None, None]
        return lean * jnp.broadcast_to(jnp.array([-1.0, 1.0, -90.0, -90.0])[None, None], (*ids.shape, CODES))

    plain, guided = (run(logits, SamplerConfig(guidance=g, num_steps=1)).ids for g in (1.0, 20.0))
    assert (guided == 1).all()
    assert (plain == 0).any()


def test_uncertain_goes_first_where_the_model_knows_least():
    """Position i has 1 + i mod 4 equally likely codes; those with one are certain and come at once."""
    choices = 1 + np.arange(TOKENS) % 4

    def logits(ids, timestep, cond):
        open_NK = np.arange(CODES)[None] < choices[:, None]
        return jnp.broadcast_to(jnp.where(open_NK, 0.0, -90.0)[None], (*ids.shape, CODES))

    config = SamplerConfig(mode="uncertain", num_steps=TOKENS, gumbel=0.0, threshold=0.9)
    rollout = run(logits, config)
    steps = np.asarray(rollout.commit_step)
    assert (steps[:, choices == 1] == 0).all()
    assert rollout.calls.tolist() == [12] * 3
    open_order = np.argsort(steps[:, choices > 1], -1, kind="stable")
    np.testing.assert_array_equal(choices[choices > 1][open_order], np.tile([4] * 4 + [3] * 4 + [2] * 4, (3, 1)))


@pytest.mark.parametrize(("mode", "threshold"), [("confidence", 0.9), ("threshold", 1.0), ("entropy", 0.0)])
def test_without_noise_the_surest_go_first(mode, threshold):
    """Position i has 2 + i mod 3 equally likely codes: the fewer the surer, whichever is drawn."""
    choices = 2 + np.arange(TOKENS) % 3

    def logits(ids, timestep, cond):
        open_NK = np.arange(CODES)[None] < choices[:, None]
        return jnp.broadcast_to(jnp.where(open_NK, 0.0, -90.0)[None], (*ids.shape, CODES))

    config = SamplerConfig(mode=mode, num_steps=TOKENS, gumbel=0.0, threshold=threshold)
    steps = np.asarray(run(logits, config).commit_step)
    np.testing.assert_array_equal(np.argsort(steps, -1), np.tile(np.argsort(choices, kind="stable"), (3, 1)))


def test_noise_falls_to_the_share_of_the_step():
    plan = make_plan(SamplerConfig(num_steps=4, max_steps=6, gumbel=8.0), TOKENS)
    np.testing.assert_allclose(plan.noise, [8, 6, 4, 2, 0, 0])
    np.testing.assert_array_equal(plan.timestep, [63, 47, 31, 15, 0, 0])
    ramp = make_plan(SamplerConfig(num_steps=3, max_steps=3, guidance=5.0, guidance_schedule="linear"), TOKENS)
    np.testing.assert_allclose(ramp.guidance, [1, 3, 5])
    assert (make_plan(SamplerConfig(mode="halton"), TOKENS).noise == 0).all()
    pair = make_plan(SamplerConfig(num_steps=4, max_steps=6, gumbel=2.0, last_gumbel=0.5, noise_ends="at"), TOKENS)
    np.testing.assert_allclose(pair.noise, [2, 1.5, 1, 0.5, 0, 0])


def test_a_mask_ratio_is_no_whole_number_and_reaches_the_model():
    plan = make_plan(SamplerConfig(num_steps=2, max_steps=3, timesteps="mask_ratio"), TOKENS)
    np.testing.assert_allclose(plan.timestep, [1000, 707.1068, 0], rtol=1e-6)
    seen = []

    def told(ids, timestep, cond):
        jax.debug.callback(lambda t: seen.append(t.tolist()), timestep, ordered=True)
        return jnp.zeros((*ids.shape, CODES))

    run(told, SamplerConfig(num_steps=2, timesteps="mask_ratio"))
    jax.effects_barrier()
    np.testing.assert_allclose(seen, [[1000] * 3, [707.1068] * 3], rtol=1e-6)


@pytest.mark.parametrize("steps", [7, 49])
def test_a_countdown_ends_at_zero(steps):
    """49 (1 - 1/49) is 48.00000000000001 in floating point."""
    plan = make_plan(SamplerConfig(num_steps=steps, max_steps=64, timesteps="countdown"), 64)
    np.testing.assert_array_equal(plan.timestep, [*range(steps - 1, -1, -1), *[0] * (64 - steps)])


def test_halton_order_follows_the_table_with_a_roll_per_sample():
    rollout = run(toy_model.undecided(CODES), SamplerConfig(mode="halton", num_steps=TOKENS))
    order = np.argsort(np.asarray(rollout.commit_step), axis=-1)  # one token a step
    table = schedules.halton_order(4)
    starts = [int(np.flatnonzero(table == row[0])[0]) for row in order]
    np.testing.assert_array_equal(order, [np.roll(table, -start) for start in starts])
    assert len(set(starts)) > 1


def test_random_order_does_not_ask_the_model():
    steps = [
        np.asarray(run(model, SamplerConfig(mode="random", num_steps=8)).commit_step)
        for model in (toy_model.undecided(CODES), toy_model.confident(CODES))
    ]
    np.testing.assert_array_equal(*steps)
    assert (steps[0][0] != steps[0][1]).any()


@pytest.mark.parametrize("mode", ["confidence", "halton", "random"])
def test_a_sample_is_the_same_in_any_batch(mode):
    config = SamplerConfig(mode=mode, num_steps=6, guidance=1.5)
    everyone, some = (run(toy_model.contextual(CODES), config, rows=rows) for rows in ((0, 1, 2), (2, 0)))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b[np.array([2, 0])]), some, everyone)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"mode": "beam"}, "'beam' is not one of confidence, halton, random, threshold, uncertain, entropy"),
        ({"num_steps": 17}, "num_steps 17 must lie in 1..max_steps"),
        ({"num_steps": 0}, "num_steps 0 must lie in"),
        ({"max_steps": 255}, "below 255"),
        ({"temperature": 0.0}, "temperature 0.0 must be positive"),
        ({"gumbel": -1.0}, "gumbel -1.0 is a noise scale"),
        ({"last_gumbel": -0.5}, "last_gumbel -0.5 is a noise scale"),
        ({"timesteps": "ratio"}, "'ratio' is not one of clock, countdown"),
        ({"mode": "threshold", "threshold": 5.0}, "threshold 5.0 of mode threshold is a probability"),
        ({"mode": "uncertain", "threshold": 0.0}, "threshold 0.0 of mode uncertain is a probability"),
        ({"mode": "entropy", "threshold": -0.1}, "threshold -0.1 of mode entropy is in nats"),
    ],
)
def test_impossible_settings_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        SamplerConfig(**wrong)


def test_more_steps_than_tokens_are_refused():
    with pytest.raises(ValueError, match="num_steps 20 must lie in 1..16, the number of image tokens"):
        make_plan(SamplerConfig(num_steps=20, max_steps=20), TOKENS)
