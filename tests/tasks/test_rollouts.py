"""Filters with resampling and the base's reference quality, on made-up rollouts."""

import dataclasses
import types

import jax
import numpy as np
import pytest
import tiny

from maskrl_jax.data.dataset import open_dataset
from maskrl_jax.errors import UserError
from maskrl_jax.evaluate.measure import Generated, Scorer, System
from maskrl_jax.rewards import energy_distance
from maskrl_jax.tasks import speed_rl
from maskrl_jax.tasks.rollouts import Rollouts, memory_of, reference_quality

GROUP = 4
QUIET = {"gate": "off", "low_quality": "off"}  # nothing reads the base's quality
ONES = np.ones((1, 32, 32, 3), np.float32)


class Alone:
    """Stands for the devices: calls programs as they are."""

    num_devices = 1

    def rows(self, size):
        return slice(0, size)

    def gather(self, outputs):
        return outputs

    def whole(self, tree):
        return jax.device_get(tree)

    def of_first(self, numbers):
        return numbers

    def map(self, fn):
        return lambda state, frozen, batch: fn(state, frozen, batch, None)


@pytest.fixture(scope="module")
def train(trained):
    return open_dataset("shapes", "train", f"{trained.store}/data", 32)


def made_up(quality_of):
    """Return a rollout program that notes in `ids` which round made a row, and scores by `quality_of`."""

    def rollout(params, frozen, batch, axis):
        place = batch["index"] % 16
        quality = np.array([quality_of(r, i) for r, i in zip(batch["round"], place, strict=True)], np.float32)
        images = np.zeros((len(place), 32, 32, 3), np.float32)
        out = {"quality": quality, "reward/judge": quality, "calls": 1 + place % 4}
        return out | {"ids": batch["round"].copy(), "images": images}

    return rollout


@pytest.fixture
def make(train):
    """Return make(rollout, change of the config, devices, set) -> Rollouts whose base has quality 0 everywhere."""

    def make(rollout=None, change=(), devices=1, train=train):
        config = tiny.get_config("speed_rl")
        config.update(dict(change))
        wiring = speed_rl.Wiring(config, train.conditioning)
        wiring.rollout = rollout
        parallel = Alone()
        parallel.num_devices = devices
        judge = types.SimpleNamespace(config=config.parents.judge, workdir="")
        context = types.SimpleNamespace(config=config, parallel=parallel, workdir="", parents={"judge": judge})
        return Rollouts(context, wiring, train, {}, np.zeros(len(train.pool(held_out=False))))

    return make


def collect(rollouts, step=0):
    """Roll out with an empty memory."""
    return jax.device_get(rollouts.collect(empty(rollouts), rollouts.batch(step), step))


def empty(rollouts):
    """Return a state that has seen nothing."""
    return types.SimpleNamespace(params={}, extra=memory_of(rollouts.wiring.credit))


def some_rejected(number, place):
    """Group 0 is always good; 1 only in odd rounds; 2 has no score in even ones; 3 never differs."""
    group, spread = place // GROUP, place % GROUP
    good = (group == 0, number % 2 == 1, number % 2 == 1, False)[group]
    if group == 2 and not good:
        return np.nan
    return 0.5 + 0.1 * spread * good + 0.01 * number


def test_only_rejected_groups_are_rolled_out_anew_and_at_most_as_many_as_asked_for(make):
    out, result, memory, shares = collect(make(made_up(some_rejected)))
    np.testing.assert_array_equal(out["ids"].reshape(4, GROUP)[:, 0], [0, 1, 1, 0])
    np.testing.assert_array_equal(out["ids"].reshape(4, GROUP), out["ids"].reshape(4, GROUP)[:, :1].repeat(GROUP, 1))
    np.testing.assert_array_equal(result.rejected, [False, False, False, True])
    assert shares == {"rejected_first": 0.75, "rejected": 0.25}


def test_the_history_sees_every_group_with_a_score_also_those_rejected(make):
    _, result, memory, _ = collect(make(made_up(some_rejected)))
    # Groups 0, 1 and 3 of the first round, then 1 and 2: the one without a score leaves no trace.
    assert memory.history.count == 5
    np.testing.assert_allclose(memory.history.values[[1, 2]], 0)
    np.testing.assert_allclose(memory.history.values[[0, 3, 4]], result.std[[0, 1, 2]], rtol=1e-6)


def test_resampling_changes_nothing_for_the_other_groups(make):
    def changed(rounds):
        return make(made_up(some_rejected), {"resample": {"rounds": rounds, "groups": 2}})

    with_it, without = collect(changed(1)), collect(changed(0))
    assert without[3] == {"rejected_first": 0.75, "rejected": 0.75}
    for field in ("advantage", "keep", "reward"):
        np.testing.assert_array_equal(getattr(with_it[1], field)[[0, 3]], getattr(without[1], field)[[0, 3]])


def test_rounds_of_all_steps_and_attempts_have_their_own_keys(make):
    rollouts = make(made_up(some_rejected), {"resample": {"rounds": 2, "groups": 4}})
    assert set(np.unique(collect(rollouts, step=1)[0]["ids"])) <= {3, 4, 5}
    assert set(np.unique(collect(rollouts, step=2)[0]["ids"])) <= {6, 7, 8}


class Judging:
    """Stands for a reward service: scores a place of a batch by a function, NaN where it fails."""

    def __init__(self, score_of):
        self.score_of, self.asked = score_of, []

    def score(self, images, prompts):
        assert len(images) == len(prompts)
        self.asked.append(prompts)
        return np.array([self.score_of(place) for place in range(len(prompts))], np.float32)


@pytest.fixture
def served(make, monkeypatch):
    """Return served(score_of, change) -> Rollouts with a service of weight 2 whose judge gives 0.1 a place."""

    def served(score_of, change=()):
        service = Judging(score_of)
        monkeypatch.setattr("maskrl_jax.tasks.rollouts.opened_service", lambda known: service)
        named = {"service": {"url": "http://localhost:1", "name": "outside", "weight": 2.0}}
        quiet = {"resample": {"rounds": 0, "groups": 1}, "credit": QUIET}
        return make(made_up(lambda number, place: 0.1 * place), named | quiet | dict(change)), service

    return served


def test_a_service_adds_its_score_and_gets_the_prompts_of_the_rows(served):
    rollouts, service = served(lambda place: place % 3)
    out, *_ = collect(rollouts)
    np.testing.assert_array_equal(out["reward/outside"], np.arange(16) % 3)
    np.testing.assert_allclose(out["quality"], 0.1 * np.arange(16) + 2 * (np.arange(16) % 3), rtol=1e-6)
    assert service.asked == [rollouts.train.describe(rollouts.batch(0)["cond"])]


@pytest.mark.parametrize("scale", ["raw", "group"])
def test_a_failed_score_of_the_service_drops_its_group_and_no_other(served, scale):
    """The group has weight 0 and enters no memory; the logs tell its share, and means are of the others."""
    rollouts, _ = served(lambda place: np.nan if place == 5 else place % 3, {"reward_scale": scale})
    out, result, memory, filtered = collect(rollouts)
    assert np.isnan(out["quality"].reshape(4, GROUP)).any(axis=1).tolist() == [False, True, False, False]
    np.testing.assert_array_equal(result.scored, [True, False, True, True])
    np.testing.assert_array_equal(result.rejected, [False, True, False, False])
    np.testing.assert_array_equal(result.keep[1], 0)
    assert np.isfinite(result.advantage).all() and memory.history.count == 3
    out["ids"] = np.zeros((16, 4), np.int32)
    values, _ = rollouts.statistics(empty(rollouts), out, result, memory, filtered, rollouts.batch(0))
    assert values["reward/failed"] == 0.25
    np.testing.assert_allclose(values["reward/outside"], np.delete(np.arange(16) % 3, range(4, 8)).mean())
    assert np.isfinite(list(values.values())).all()


def test_a_service_that_never_answers_leaves_nothing_to_learn_from(served):
    rollouts, _ = served(lambda place: np.nan, {"resample": {"rounds": 1, "groups": 2}})
    _, result, memory, _ = collect(rollouts)
    assert result.rejected.all() and not result.keep.any() and memory.history.count == 0


def test_a_service_is_tested_at_the_first_rollout_to_learn_from_and_not_before(make):
    service = {"url": "http://127.0.0.1:9", "probe": "none.json"}
    rollouts = make(made_up(lambda number, place: 0.5), {"service": service, "credit": QUIET})
    assert rollouts.shown({})
    with pytest.raises(UserError, match="no probe of a reward service"):
        collect(rollouts)


def test_all_processes_stop_where_the_first_lost_the_service(served):
    rollouts, _ = served(lambda place: 0.0)
    rollouts.parallel.of_first = lambda numbers: np.insert(numbers[1:], 0, 1)
    with pytest.raises(UserError, match="at http://localhost:1 stopped process 0"):
        collect(rollouts)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"service": {"url": "http://a", "name": "judge"}, "credit": QUIET}, "name 'judge' is that of another reward"),
        ({"service": {"url": "http://a", "name": "total"}, "credit": QUIET}, "'total' cannot be told from"),
        ({"service": {"url": "http://a", "name": "judge_std"}, "credit": QUIET}, "'judge_std' cannot be told from"),
        ({"service": {"url": "http://a", "name": "a/b"}, "credit": QUIET}, "'a/b' cannot be told from"),
        ({"service": {"url": "http://a", "weight": 0.0}, "credit": QUIET}, "service.weight 0.0"),
        ({"service": {"url": "http://a", "weight": float("nan")}, "credit": QUIET}, "service.weight nan"),
        ({"service": {"url": "http://a"}, "credit": {"gate": "hard"}}, "for which a service is not asked"),
    ],
)
def test_services_that_do_not_go_together_are_refused(make, change, named):
    with pytest.raises(UserError, match=named):
        make(change=change)


def test_a_trained_judge_can_be_served(trained):
    from maskrl_jax.rewards.serving import local_reward

    score = local_reward("judge_whole", workdir=trained.parents["judge"].workdir)
    found = np.asarray(score(np.zeros((2, 32, 32, 3), np.float32), ["a red circle", "a blue cross"]))
    assert found.shape == (2,) and np.isfinite(found).all()
    with pytest.raises(ValueError, match="pictures of 32 x 32"):
        score(np.zeros((1, 16, 16, 3), np.float32), ["a red circle"])
    with pytest.raises(UserError, match="holds no judge of captions"):
        local_reward("judge", workdir=trained.parents["tokenizer"].workdir)


def test_the_same_step_gives_the_same_rollouts(make):
    rollouts = make(made_up(some_rejected))
    jax.tree.map(np.testing.assert_array_equal, collect(rollouts, 3), collect(rollouts, 3))


def test_a_resampling_program_has_rows_that_the_devices_divide(make):
    assert make(change={"resample": {"rounds": 1, "groups": 1}}, devices=8).resampled == 2  # 2 groups of 4
    assert make(change={"resample": {"rounds": 1, "groups": 3}}, devices=4).resampled == 3


def test_requests_are_a_pure_function_of_the_step(make):
    rollouts = make()
    batch = rollouts.batch(5)
    jax.tree.map(np.testing.assert_array_equal, batch, make().batch(5))
    np.testing.assert_array_equal(batch["index"], 5 * 16 + np.arange(16))
    for name in ("cond", "target", "prompt", "reference"):
        grouped = batch[name].reshape(4, GROUP, *batch[name].shape[1:])
        np.testing.assert_array_equal(grouped, grouped[:, :1].repeat(GROUP, 1))
    assert (batch["prompt"] != rollouts.batch(6)["prompt"]).all()


@pytest.mark.parametrize(("kind", "jumps"), [("fixed", [480] * 4), ("budget", [480, 240, 480, 240])])
def test_every_group_holds_the_step_counts_of_the_policy(make, kind, jumps):
    config = tiny.get_config("speed_rl")
    config.policy.kind = kind
    batch = make(change=config).batch(0)
    np.testing.assert_array_equal(batch["jump"].reshape(4, GROUP), [jumps] * 4)


def test_the_numbers_of_a_batch_leave_failed_scores_out(make):
    rollouts = make(made_up(lambda number, place: np.nan if place // GROUP == 2 else 0.1 * (place % GROUP)))
    out, result, memory, shares = collect(rollouts)
    values, _ = rollouts.statistics(empty(rollouts), out, result, memory, shares, rollouts.batch(0))
    assert values["reward/quality"] == pytest.approx(0.15)
    assert values["sampling/images_per_sec"] > 0
    assert values["sampling/calls"] == 2.5 and values["sampling/calls_max"] == 4
    assert values["rl/rejected"] == values["reward/failed"] == 0.25 and values["rl/dropped"] == 0
    assert values["reward_heldout/strict"] == 0.0
    assert all(np.isfinite(value) for value in values.values())


def test_what_is_generated_too_often_earns_less(make):
    plain = made_up(lambda number, place: 0.5 - 0.1 * (place % GROUP))

    def rollout(params, frozen, batch, axis):
        out = plain(params, frozen, batch, axis)
        out["images"][:] = 0.9
        out["images"][batch["index"] % GROUP == 1] = 0.4
        return out

    rewards = {}
    for weight in (0.0, 2.0):
        rollouts = make(rollout, {"energy_distance": weight})
        rollouts.real = energy_distance.blocks(np.repeat(np.float32([0.4, 0.9]), 8)[:, None, None, None] * ONES)
        out, result, memory, shares = collect(rollouts)
        rewards[weight] = np.asarray(result.reward)
    gain = (rewards[2.0] - rewards[0.0])[0] * float(memory.sigma)
    # Distances to the 15 others less those to the real ones: half of either kind, 0.5 apart.
    common, rare = 0.5 * 4 / 15 - 0.25, 0.5 * 12 / 15 - 0.25
    np.testing.assert_allclose(gain, 2 * np.array([common, rare, common, common]), atol=2e-3)
    values, _ = rollouts.statistics(empty(rollouts), out, result, memory, shares, rollouts.batch(0))
    assert values["reward/energy_distance"] > 0.02


def test_within_prompts_a_picture_is_compared_with_real_ones_of_its_prompt(make, train):
    plain = made_up(lambda number, place: 0.5)

    def rollout(params, frozen, batch, axis):
        out = plain(params, frozen, batch, axis)
        out["images"][:] = 0.9
        out["images"][batch["index"] % GROUP == 1] = 0.4
        return out

    rollouts = make(rollout, {"energy_distance_scope": "prompt"})
    pictures = rollouts.batch(0)["cond"][GROUP]  # the second group's prompt
    real = train.take(train.positions_of(train.describe(pictures[None]), 32))["image"]
    np.testing.assert_array_equal(rollouts.real_of[pictures.tobytes()], energy_distance.blocks(np.float32(real) / 255))
    shades = np.linspace(0, 1, len(rollouts.real_of), dtype=np.float32)
    for shade, prompt in zip(shades, rollouts.real_of, strict=True):
        rollouts.real_of[prompt] = energy_distance.blocks(shade * ONES)
    out, *_ = collect(rollouts)
    shade = {prompt: shade for shade, prompt in zip(shades, rollouts.real_of, strict=True)}
    shade = np.array([shade[cond.tobytes()] for cond in rollouts.batch(0)["cond"]])
    tone = np.where(np.arange(len(shade)) % GROUP == 1, 0.4, 0.9)
    to_others = np.where(tone == 0.4, 0.5, 0.5 / (GROUP - 1))
    np.testing.assert_allclose(out["witness"], to_others - np.abs(tone - shade), atol=1e-5)


def test_real_pictures_are_read_only_where_they_are_rewarded(make, train, monkeypatch):
    plain = made_up(lambda number, place: 0.1 * place)
    monkeypatch.setattr(type(train), "positions_of", lambda *_: pytest.fail("read for nothing"))
    rollouts = make(plain, {"energy_distance": 0.0})
    out, result, memory, shares = collect(rollouts)
    assert rollouts.real is None and not out["witness"].any()
    values, _ = rollouts.statistics(empty(rollouts), out, result, memory, shares, rollouts.batch(0))
    assert "reward/energy_distance" not in values


def test_a_set_without_pictures_has_none_to_be_like(make, train):
    bare = dataclasses.replace(train, columns={"cond": train.columns["cond"]})
    make(made_up(lambda number, place: 0.5), {"energy_distance": 0.0}, train=bare)
    with pytest.raises(UserError, match="shapes has no pictures to be like; set energy_distance=0"):
        make(made_up(lambda number, place: 0.5), {"energy_distance": 2.0}, train=bare)


@pytest.fixture
def context(tmp_path):
    config = tiny.get_config("speed_rl")
    config.reference_samples = 2
    return types.SimpleNamespace(config=config, measured_dir=str(tmp_path))


def base(value=1.0, identity="known"):
    """A base whose pictures are the brighter the higher the number of the sample."""

    def generate(setting, cond, ids, seed):
        images = np.broadcast_to((value * ids)[:, None, None, None], (len(ids), 2, 2, 3))
        return Generated(images, np.full(len(ids), setting), np.zeros((len(ids), 1)))

    return System("base", "base", generate, identity)


SCORER = Scorer(lambda images, prompts: {"judge": images[:, 0, 0, 0], "other": -images[:, 0, 0, 0]}, identity="judge")


def reference(context, train, system, rewards=types.MappingProxyType({"judge": 1.0}), steps=4):
    return reference_quality(context, train, system, steps, SCORER, dict(rewards))


def test_reference_quality_is_the_mean_over_the_samples_of_each_prompt(context, train):
    count = len(train.pool(held_out=False))
    np.testing.assert_allclose(reference(context, train, base()), 2 * np.arange(count) + 0.5)
    np.testing.assert_allclose(reference(context, train, base(), {"judge": 1.0, "other": 0.5}), np.arange(count) + 0.25)


def test_reference_quality_is_measured_once_for_all_seeds_of_a_policy(context, train):
    first = reference(context, train, base())
    context.config.seed = 5
    np.testing.assert_array_equal(reference(context, train, base(0.0)), first)  # read, so not zero
    assert not reference(context, train, base(0.0, "another")).any()
    assert not reference(context, train, base(0.0), steps=5).any()
    context.config.reference_samples = 1
    assert not reference(context, train, base(0.0)).any()


def test_prompts_of_rollouts_are_never_held_out(make, train):
    held_out = {cond.tobytes() for cond in train.pool(held_out=True)}
    rollouts = make()
    drawn = {cond.tobytes() for step in range(8) for cond in rollouts.batch(step)["cond"]}
    assert held_out and drawn and not held_out & drawn
