"""Gate, weight, filters and memory from qualities to advantages (speed_rl spec 4.5, 5.1; spec 9, oracle 13)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskrl_jax.rl import advantages, credit

CONFIG = credit.CreditConfig(
    max_calls=16, min_calls=4, lambda_value=0.5, lambda_zero_until=0, lambda_full_at=0, percentile=0.0
)
QUALITY = jnp.array([[1.0, 1.2, 0.8, 1.0]])
CALLS = jnp.array([[4, 10, 16, 10]])
REFERENCE = jnp.array([[1.0]])


def memory(config=CONFIG, sigma=0.2):
    return credit.create(config).replace(sigma=jnp.float32(sigma))


def assign(config=CONFIG, quality=QUALITY, calls=CALLS, reference=REFERENCE, state=None, step=9):
    return credit.assign(config, state or memory(config), jnp.int32(step), quality, calls, reference)


@pytest.mark.parametrize(
    ("settings", "reads"),
    [
        ({"gate": "off", "low_quality": "off"}, False),
        ({"gate": "hard", "low_quality": "off"}, True),
        ({"gate": "off", "low_quality": "drop"}, True),
        ({"gate": "off", "low_quality": "off", "speed": "dual"}, True),
    ],
)
def test_the_reference_counts_exactly_where_it_is_said_to_be_read(settings, reads):
    config = dataclasses.replace(CONFIG, **settings)
    assert config.reads_reference == reads
    weights, rewards = [], []
    for reference in (1.0, 5.0):
        found = assign(config, reference=jnp.array([[reference]]))
        kept = credit.remember(config, memory(config), found, QUALITY, jnp.array([[reference]]), jnp.int32(9))
        weights.append(float(kept.weight))
        rewards.append(np.where(found.dropped, np.nan, found.reward))
    assert (weights[0] != weights[1] or not np.array_equal(*rewards, equal_nan=True)) == reads


def test_reward_gate_and_advantage_by_hand():
    """sigma 0.2: qualities 5, 6, 4, 5; speed 1, 1/2, 0, 1/2; the third is below 1 - 0.1 and gets no speed."""
    found = assign()
    np.testing.assert_allclose(found.speed, [[1, 0.5, 0, 0.5]])
    np.testing.assert_array_equal(found.gate, [[1, 1, 0, 1]])
    np.testing.assert_allclose(found.reward, [[5.5, 6.25, 4.0, 5.25]], rtol=1e-6)
    std = np.sqrt((0.25**2 + 1 + 1.25**2) / 3)
    np.testing.assert_allclose(found.advantage, [np.array([0.25, 1, -1.25, 0]) / (std + 1e-4)], atol=1e-5)
    np.testing.assert_allclose(found.std, [std], rtol=1e-5)
    np.testing.assert_allclose(found.quality_std, [np.std([1.0, 1.2, 0.8, 1.0], ddof=1)], rtol=1e-5)
    assert found.keep.tolist() == [[1, 1, 1, 1]]
    assert not found.rejected.any() and not found.dropped.any()


def test_the_gate_refuses_speed_to_fast_garbage():
    garbage = jnp.array([[1.0, 1.0, 0.85, 1.0]])  # the fourth of a sigma too low, at the fewest calls
    calls = jnp.array([[10, 10, 4, 10]])
    assert float(assign(quality=garbage, calls=calls).advantage[0, 2]) < 0
    off = dataclasses.replace(CONFIG, gate="off", lambda_value=9.0)
    assert float(assign(off, garbage, calls).advantage[0, 2]) > 0


@pytest.mark.parametrize(
    ("speed", "step", "weight"),
    [("schedule", 2, 0.0), ("schedule", 5, 0.25), ("schedule", 99, 0.5), ("off", 99, 0.0), ("dual", 1, 0.0)]
    + [("dual", 2, 0.7)],
)
def test_weight_of_speed(speed, step, weight):
    config = dataclasses.replace(CONFIG, speed=speed, lambda_zero_until=2, lambda_full_at=8)
    state = memory(config).replace(weight=jnp.float32(0.7))  # read by the dual rule only
    found = assign(config, state=state, step=step)
    np.testing.assert_allclose(found.speed_weight, weight, rtol=1e-6)
    # Quality in units of sigma; in its own where there is no speed to weigh it against.
    np.testing.assert_allclose(found.reward[0, 0], 1.0 if speed == "off" else 5 + weight, rtol=1e-6)


def test_dual_weight_moves_with_the_surplus_once_the_ramp_is_over():
    config = dataclasses.replace(CONFIG, speed="dual", lambda_zero_until=2, lambda_full_at=2)
    state, quality = memory(config), jnp.array([[1.2, 1.4, 1.0, 1.2]])  # one sigma above the reference
    found = assign(config, quality, state=state)
    sigma = float(credit.remember(config, state, found, quality, REFERENCE, jnp.int32(1)).sigma)
    before, after = (credit.remember(config, state, found, quality, REFERENCE, jnp.int32(s)).weight for s in (1, 2))
    assert float(before) == 0.5
    np.testing.assert_allclose(after, 0.5 * np.exp(0.02 * 0.2 / sigma), rtol=1e-5)


@pytest.mark.parametrize(
    ("rule", "keep", "third"), [("drop", [1, 1, 0, 1], None), ("clip", [1, 1, 1, 1], 2.0), ("off", [1, 1, 1, 1], 1.5)]
)
def test_low_quality_is_dropped_clipped_or_kept(rule, keep, third):
    """The floor is 1 - 3 x 0.2 = 0.4; the third has 0.3."""
    config = dataclasses.replace(CONFIG, low_quality=rule)
    found = assign(config, QUALITY.at[0, 2].set(0.3))
    assert found.keep.tolist() == [keep]
    assert found.dropped.tolist() == [[False, False, rule == "drop", False]]
    if third is not None:
        np.testing.assert_allclose(found.reward[0, 2], third, rtol=1e-5)
    else:
        rest = np.array([5.5, 6.25, 5.25])
        expected = (rest - rest.mean()) / (rest.std(ddof=1) + 1e-4)
        np.testing.assert_allclose(found.advantage[0, [0, 1, 3]], expected, atol=1e-4)
        assert float(found.advantage[0, 2]) == 0.0


@pytest.mark.parametrize("score", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("rule", credit.LOW_QUALITY)
@pytest.mark.parametrize("gate", credit.GATES)
def test_a_failed_score_drops_its_group_and_nothing_else(score, rule, gate):
    """The other group is treated, and the memory left, as if the failed one had never been."""
    config = dataclasses.replace(CONFIG, speed="dual", low_quality=rule, gate=gate)
    quality, reference = jnp.concatenate([QUALITY.at[0, 2].set(score), QUALITY]), REFERENCE.repeat(2, 0)
    bonus = jnp.array([[score] * 4, [0.0] * 4])  # what spoilt the score may have spoilt the bonus, too
    found = credit.assign(config, memory(config), jnp.int32(9), quality, CALLS.repeat(2, 0), reference, bonus)
    clean = assign(config)
    for name in ("advantage", "keep", "decision_advantage", "decision_keep", "reward", "gate", "std"):
        np.testing.assert_allclose(getattr(found, name)[1], getattr(clean, name)[0], rtol=1e-6, err_msg=name)
    assert (found.scored.tolist(), found.rejected.tolist()) == ([False, True], [True, False])
    assert not found.dropped.any()
    for name in ("advantage", "keep", "decision_advantage", "decision_keep"):
        np.testing.assert_array_equal(getattr(found, name)[0], np.zeros(4), err_msg=name)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(found))
    left = credit.remember(config, memory(config), found, quality, reference, jnp.int32(9))
    kept = credit.remember(config, memory(config), clean, QUALITY, REFERENCE, jnp.int32(9))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), left, kept)
    assert int(left.history.count) == 1


@pytest.mark.parametrize(("bad", "rejected"), [(2, False), (3, True), (4, True)])
def test_a_group_needs_half_of_its_rollouts(bad, rejected):
    found = assign(quality=QUALITY.at[0, :bad].set(0.3))  # the floor is 1 - 3 x 0.2
    assert found.rejected.tolist() == [rejected]
    assert found.scored.tolist() == [True]
    assert float(found.keep.sum()) == (0 if rejected else 4 - bad)


def test_a_group_without_spread_is_rejected():
    config = dataclasses.replace(CONFIG, speed="off")
    found = assign(config, jnp.concatenate([jnp.ones((1, 4)), QUALITY]), CALLS.repeat(2, 0), jnp.ones((2, 1)))
    assert found.rejected.tolist() == [True, False]
    assert found.keep.tolist() == [[0] * 4, [1] * 4]


def spread(std):
    """Return two qualities around 1 whose unbiased std is the given one."""
    return [1 - std / np.sqrt(2), 1 + std / np.sqrt(2)]


def test_history_rejects_below_its_percentile_and_records_all_groups():
    """Stds 1..100: the tenth percentile is 10.9 (oracle 13)."""
    config = dataclasses.replace(CONFIG, speed="off", low_quality="off", percentile=10.0, history=128, history_min=64)
    history = advantages.history_create(128)
    full = memory(config, sigma=1.0).replace(
        history=advantages.history_push(history, jnp.arange(1.0, 101.0), jnp.ones(100, bool))
    )
    quality = jnp.array([spread(10.85), spread(10.95), [jnp.nan, jnp.nan]])
    calls, reference = jnp.full((3, 2), 4), jnp.ones((3, 1))
    found = assign(config, quality, calls, reference, full)
    assert found.rejected.tolist() == [True, False, True]
    assert found.keep.tolist() == [[0, 0], [1, 1], [0, 0]]
    after = credit.remember(config, full, found, quality, reference, jnp.int32(9))
    assert int(after.history.count) == 102  # the rejected one too, the unscored one not
    np.testing.assert_allclose(after.history.values[100:103], [10.85, 10.95, 0.0], rtol=1e-5)
    young = memory(config, sigma=1.0).replace(
        history=advantages.history_push(history, jnp.full(63, 50.0), jnp.ones(63, bool))
    )
    assert assign(config, quality, calls, reference, young).rejected.tolist() == [False, False, True]
    off = dataclasses.replace(config, percentile=0.0)
    assert assign(off, quality, calls, reference, full).rejected.tolist() == [False, False, True]


def test_a_round_of_resampling_enters_the_history_and_moves_no_average():
    config = dataclasses.replace(CONFIG, speed="dual")
    before = memory(config)
    after = credit.record(before, assign(config, QUALITY + 3.0))
    assert (int(before.history.count), int(after.history.count)) == (0, 1)
    assert (float(after.sigma), float(after.weight)) == (float(before.sigma), float(before.weight))


def test_statistic_of_the_surrogate_policy_is_the_spread_of_quality():
    """Otherwise the exogenous calls would keep groups whose pictures are all alike."""
    quality = jnp.ones((1, 4))
    of_reward, of_quality = (assign(dataclasses.replace(CONFIG, std_of_quality=q), quality) for q in (False, True))
    assert float(of_reward.std[0]) > 0 and not of_reward.rejected.any()
    assert float(of_quality.std[0]) == 0 and of_quality.rejected.all()


def test_a_bonus_enters_the_reward_and_nothing_else():
    bonus = jnp.array([[0.0, 0.0, 0.1, 0.0]])
    plain = assign()
    found = credit.assign(CONFIG, memory(), jnp.int32(9), QUALITY, CALLS, REFERENCE, bonus)
    np.testing.assert_allclose(found.reward - plain.reward, bonus / 0.2, atol=1e-5)
    np.testing.assert_array_equal(found.gate, plain.gate)
    np.testing.assert_array_equal(found.quality_std, plain.quality_std)


def test_down_sampling_updates_the_extremes_with_advantages_of_their_own():
    config = dataclasses.replace(CONFIG, speed="off", low_quality="off", percentile=0.0, down_sample=2)
    found = assign(config, jnp.array([[1.0, 4.0, 2.0, 3.0]]))
    assert found.keep.tolist() == [[1, 1, 0, 0]] and not found.rejected.any()
    np.testing.assert_allclose(found.advantage, [[-np.sqrt(0.5), np.sqrt(0.5), 0, 0]], rtol=1e-3)
    # Decisions cost no network calls: they learn from the whole group.
    assert found.decision_keep.tolist() == [[1, 1, 1, 1]]
    reward = np.asarray(found.reward[0])
    whole = (reward - reward.mean()) / (reward.std(ddof=1) + 1e-4)
    np.testing.assert_allclose(found.decision_advantage, [whole], rtol=1e-3)
    everyone = assign(dataclasses.replace(config, down_sample=0), jnp.array([[1.0, 4.0, 2.0, 3.0]]))
    np.testing.assert_array_equal(found.std, everyone.std)  # the filter of groups judges whole groups
    with pytest.raises(ValueError, match="down_sample 1 must be 0"):
        dataclasses.replace(CONFIG, down_sample=1)


def test_sigma_starts_with_the_first_batch_and_then_averages():
    first = assign(state=memory(sigma=0.0))
    std = np.std([1.0, 1.2, 0.8, 1.0], ddof=1)
    np.testing.assert_allclose(first.reward[0, 2], 0.8 / std, rtol=1e-5)
    after = credit.remember(CONFIG, memory(sigma=0.0), first, QUALITY, REFERENCE, jnp.int32(0))
    np.testing.assert_allclose(after.sigma, std, rtol=1e-5)
    later = credit.remember(CONFIG, memory(sigma=0.2), assign(), QUALITY, REFERENCE, jnp.int32(0))
    np.testing.assert_allclose(later.sigma, 0.99 * 0.2 + 0.01 * std, rtol=1e-5)


@pytest.mark.parametrize("nothing", [jnp.nan, 1.0])
def test_a_first_batch_without_spread_does_not_set_sigma(nothing):
    """A sigma at its floor would take hundreds of updates to recover."""
    quality = jnp.full((1, 4), nothing)
    state = memory(sigma=0.0)
    state = credit.remember(CONFIG, state, assign(quality=quality, state=state), quality, REFERENCE, jnp.int32(0))
    np.testing.assert_allclose(assign(state=state).reward, assign(state=memory(sigma=0.0)).reward, rtol=1e-6)
    after = credit.remember(CONFIG, state, assign(state=state), QUALITY, REFERENCE, jnp.int32(1))
    np.testing.assert_allclose(after.sigma, np.std([1.0, 1.2, 0.8, 1.0], ddof=1), rtol=1e-5)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"speed": "fast"}, "speed 'fast' is not one of schedule, dual, off"),
        ({"low_quality": "forgive"}, "low_quality 'forgive' is not one of drop, clip, off"),
        ({"gate": "ajar"}, "gate 'ajar' is not one of hard, soft, off"),
        ({"percentile": -1.0}, r"percentile -1.0 must lie in \[0, 100\]"),
        ({"percentile": 100.5}, r"percentile 100.5 must lie in \[0, 100\]"),
        ({"min_calls": 16}, "min_calls 16 must lie between 0 and max_calls 16"),
        ({"lambda_zero_until": 5}, "lambda_full_at 0 is before lambda_zero_until 5"),
    ],
)
def test_impossible_settings_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **wrong)
