"""Speed-RL on the tiny base: every policy and likelihood trains what it should and nothing else."""

import dataclasses
import fnmatch
import json
import pathlib
import types

import jax
import numpy as np
import pytest
import tiny
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from maskrl_jax import runner, stored
from maskrl_jax.checkpoint import load_arrays
from maskrl_jax.data.dataset import conditioning_of
from maskrl_jax.errors import UserError
from maskrl_jax.evaluate.bench import Evaluation
from maskrl_jax.parallel import Parallel
from maskrl_jax.rl.policy import Policy
from maskrl_jax.tasks import checks, codecs, speed_rl
from maskrl_jax.tasks.gallery import Gallery
from maskrl_jax.tasks.rollouts import Rollouts
from maskrl_jax.writers import read_metrics

BOTH, MODEL, HEAD = {"model", "head"}, {"model"}, {"head"}
VARIANTS = {
    "fixed, hard": ({"policy.kind": "fixed", "loss.tokens.likelihood": "hard", "credit.speed": "off"}, MODEL),
    # An untrained base shows nothing that was asked for; its rejection rule needs a spread of quality.
    "budget, two inner updates": (
        {"policy.kind": "budget", "inner_updates": 2, "rewards": {"judge": 0.0, "judge_whole": 1.0}},
        MODEL,
    ),
    "guided threshold, all": (
        {"policy.action": "threshold", "policy.guidance": 1.7, "loss.tokens.likelihood": "all"},
        BOTH,
    ),
    "uncertain threshold, the shipped default": (
        {
            **{"policy.action": "threshold", "policy.order": "uncertain", "policy.kappa": 0.2},
            **{"credit.gate": "off", "credit.low_quality": "off"},
        },
        BOTH,
    ),
    "head only, dual lambda, low quality dropped": (
        {"optimizer.rates": (("^model", 0.0),), "credit.speed": "dual", "credit.low_quality": "drop"},
        HEAD,
    ),
    "frozen head, kept, two inner updates": (
        {"optimizer.rates": (("^head", 0.0),), "loss.tokens.likelihood": "kept", "inner_updates": 2},
        MODEL,
    ),
}


def changed_config(changes):
    config = tiny.get_config("speed_rl")
    config.resample.rounds = 0  # one program less to compile
    config.credit.percentile = 0.0
    for path, value in changes.items():
        if path == "rewards":
            config.rewards = value
        else:
            config.update_from_flattened_dict({path: value})
    return config


@pytest.fixture
def collected(monkeypatch):
    """Collect what every batch of rollouts holds."""
    seen, collect = [], Rollouts.collect

    def noting(self, *args):
        seen.append(collect(self, *args))
        return seen[-1]

    monkeypatch.setattr(Rollouts, "collect", noting)
    return seen


def differs(before, after):
    return not all(jax.tree.leaves(jax.tree.map(np.array_equal, before, after)))


def distance(before, after):
    return max(jax.tree.leaves(jax.tree.map(lambda a, b: np.abs(a - b).max(), before, after)))


@pytest.mark.parametrize("variant", VARIANTS)
def test_two_updates_change_what_the_variant_trains_and_only_that(build, collected, variant):
    changes, trains = VARIANTS[variant]
    config = changed_config(changes)
    task = build(config)
    state = task.init(jax.random.key(0))
    start = jax.device_get(state.params)
    for step in range(2):
        state, metrics = task.step(state, task.batch(step))
    state, metrics = jax.device_get((state, metrics))
    for part in BOTH:
        assert differs(start[part], state.params[part]) == (part in trains)
        assert (distance(start[part], state.ema[part]) > 1e-6) == (part in trains)
    assert int(state.step) == 2 and int(state.bad_total) == 0
    values = {
        name: value[0] / max(value[1], 1) if isinstance(value, tuple) else value for name, value in metrics.items()
    }
    assert all(np.isfinite(value) for value in values.values())
    # The first update of a rollout is on policy, the second is not.
    assert (values["rl/ratio_max_err"] > 0) == (config.inner_updates == 2)
    # What the update recomputes is what the sampler drew from.
    assert values.get("rl/sampler_gap", 0.0) < 1e-4 or config.inner_updates == 2
    check_calls(config, [out["calls"] for out, *_ in collected])
    assert ("reward/surplus" in values) == (config.credit.gate != "off")
    if config.credit.speed == "dual":
        assert float(state.extra["credit"].weight) != config.credit.lambda_value


def check_calls(config, calls):
    for batch in calls:
        if config.policy.kind == "fixed":
            np.testing.assert_array_equal(batch, config.policy.target_calls)
        elif config.policy.kind == "budget":
            np.testing.assert_array_equal(batch.reshape(-1, 4), [config.policy.step_set * 2] * 4)
        else:
            assert batch.min() >= 1 and batch.max() <= config.policy.max_calls
            # An untrained base is never confident: the threshold waits for the last call.
            assert len(np.unique(batch)) > 1 or config.policy.action == "threshold"


def test_a_policy_without_a_head_is_measured_at_numbers_of_steps(build):
    config = changed_config(VARIANTS["fixed, hard"][0])
    task = build(config)
    values, pictures = task.evaluate(task.init(jax.random.key(0)), 0)
    assert values["glance/calls@2"] == values["raw/glance/calls@2"] == 2.0
    assert pictures["samples/grid"].dtype == np.uint8


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ({"kind": "fixed", "target_calls": 5}, (5, 8, 16)),
        ({"kind": "fixed", "target_calls": 5, "timesteps": "countdown"}, (5,)),
        ({"kind": "budget", "step_set": (6, 16)}, (6, 8, 16)),
        ({"kind": "adaptive", "action": "threshold"}, (-1.0, 0.0)),
    ],
)
def test_the_tuned_curve_holds_the_calls_that_were_trained(policy, expected):
    settings = Evaluation(steps=(7, 8, 16, 32), dials=(-1.0, 0.0))  # 7 does not divide the clock, 32 exceeds it
    policy = Policy(**policy, ticks=960, max_calls=16)
    owner = types.SimpleNamespace(
        bench=types.SimpleNamespace(settings=settings), wiring=types.SimpleNamespace(policy=policy)
    )
    assert Gallery.settings(owner) == expected


def test_two_conventions_of_timesteps_are_named_in_the_report():
    assert checks.timesteps_notes("clock", "clock") == ()
    (note,) = checks.timesteps_notes("mask_ratio", "clock")
    assert note.startswith("Rollouts tell the network its timesteps by `mask_ratio`, the base's sampler by `clock`")


def test_a_run_leaves_report_samples_and_every_tag(trained):
    workdir = pathlib.Path(trained.workdir)
    assert (workdir / "report.md").exists() and list((workdir / "figures").iterdir())
    assert list((workdir / "samples").iterdir())
    assert json.loads((workdir / "config.json").read_text())["task"] == "speed_rl"
    lines = read_metrics(trained.workdir)
    tags = {tag for line in lines for tag in line}
    assert {line["step"] for line in lines} >= set(range(1, 7))
    assert tags >= {
        *(
            "reward/judge",
            "reward/judge_whole",
            "reward/quality",
            "reward/speed",
            "reward/total",
            "reward_heldout/graded",
            "reward_heldout/strict",
        ),
        *("rl/kl", "rl/clip_frac", "rl/ratio_max_err", "rl/adv_std", "rl/zero_std_ratio", "rl/rejected"),
        *("sampling/calls", "sampling/images_per_sec", "perf/step_time", "train/grad_norm", "train/skipped"),
        *("glance/fd_judge@0", "glance/graded@0", "raw/glance/graded@0", "eval/strict@4", "tuned/eval/graded@0"),
    }
    events = EventAccumulator(trained.workdir, size_guidance={"images": 0}).Reload()
    assert {"samples/grid", "report/samples", "report/quality_vs_calls"} <= set(events.Tags()["images"])


def test_the_curve_of_the_base_is_measured_once_for_both_reports(trained):
    settings = tiny.get_config("speed_rl").evaluation
    # Besides, the untrained head once for each dial.
    assert len(fnmatch.filter(trained.measured, "point-*.npz")) == len(settings.steps) + len(settings.dials) == 3
    # The gate of the tiny run reads the base's quality.
    assert fnmatch.filter(trained.measured, "reference-*.npz")


def test_a_run_is_measured_again_into_a_folder_of_its_own(trained, one_device):
    workdir = pathlib.Path(trained.workdir)
    kept = {name: (workdir / name).read_bytes() for name in ("report.md", "results.json", "metrics.jsonl")}
    with one_device():
        context, params = runner.open_workdir(trained.workdir)
        out = pathlib.Path(stored.new_evaluation(trained.workdir))
        context.config.evaluation.update({"seed": 5, "timing_repeats": 0})
        runner.build(dataclasses.replace(context, out=str(out))).report(params)
    assert out == workdir / "evaluations" / "1"
    assert json.loads((out / "results.json").read_text())["points"][0]["seed"] == 5
    assert (out / "figures" / "training.png").exists()
    assert {name: (workdir / name).read_bytes() for name in kept} == kept


def test_a_run_trains_model_and_head(trained):
    found, base = load_arrays(trained.workdir, ("params",))["params"], trained.parents["maskgit"].params
    start = speed_rl.Wiring(tiny.get_config("speed_rl"), conditioning_of("shapes")).head.init(jax.random.key(0))
    assert distance(base, found["model"]) > 1e-5 and distance(start, found["head"]) > 1e-5


def test_the_base_is_the_start_and_the_head_its_prior(trained):
    config = tiny.get_config("speed_rl")
    wiring = speed_rl.Wiring(config, conditioning_of("shapes"))
    state = wiring.init(jax.random.key(0), trained.parents["maskgit"].params)
    jax.tree.map(np.testing.assert_array_equal, state.params["model"], trained.parents["maskgit"].params)
    logits, _, eta = wiring.head.module().apply(state.params["head"], np.ones((1, 15), np.float32))
    assert config.policy.divisors[int(logits.argmax())] == 2 and float(eta) == config.policy.stickiness


def test_the_entropy_weight_moves_linearly_over_the_run():
    ends = [float(speed_rl._linear((3.0, 1.0), step, 4)) for step in (0, 2, 4, 8)]
    assert ends == [3.0, 2.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"group": 3}, "do not fill groups of 3"),
        ({"group": 1}, "do not fill groups of 1"),
        ({"policy.kind": "budget", "policy.step_set": (2, 3, 4)}, "not divisible by the 3 step counts"),
        ({"credit.history": 3}, "does not hold the 4 groups"),
        ({"rewards": {"judge": 1.0, "juge": 2.0}}, "unknown reward 'juge'"),
        ({"parents.tokenizer.seed": 1}, "not the one that the base was trained with"),
    ],
)
def test_settings_that_cannot_be_are_named(changes, message):
    config = tiny.get_config("speed_rl")
    config.parents.tokenizer = tiny.get_config("tokenizer")  # an object of its own
    for path, value in changes.items():
        place, _, key = path.rpartition(".")
        owner = config
        for name in filter(None, place.split(".")):
            owner = owner[name]
        owner[key] = value
    with pytest.raises(UserError, match=message):
        speed_rl.Wiring(config, conditioning_of("shapes"))


def test_a_tokenizer_is_known_by_its_settings_not_by_whether_its_config_is_locked():
    config = tiny.get_config("speed_rl")
    config.parents.tokenizer = tiny.get_config("tokenizer").lock()
    config.parents.maskgit.parents.tokenizer = tiny.get_config("tokenizer").unlock()
    speed_rl.Wiring(config, conditioning_of("shapes"))


@pytest.fixture(scope="module")
def rollout(trained):
    """Return (program, placed arguments) of a rollout under a strategy."""

    def rollout(strategy):
        config, parents = tiny.get_config("speed_rl"), trained.parents
        parallel = Parallel(strategy, jax.local_devices()[:1])
        wiring = speed_rl.Wiring(config, conditioning_of("shapes"))
        params = parallel.init(wiring.init, jax.random.key(0), parents["maskgit"].params).params
        codec = codecs.load(parents["tokenizer"])
        frozen = parallel.replicate({"tokenizer": codec.params, "judge": parents["judge"].params})
        count = np.arange(16, dtype=np.int32)
        request = {"cond": np.zeros((16, 8), np.int32), "target": np.ones((16, 3), np.int32)}
        request |= {"index": count, "round": count * 0, "jump": count * 0 + 960}
        return parallel, parallel.map(wiring.rollout), (params, frozen, parallel.put(request))

    return rollout


@pytest.mark.parametrize("strategy", ["pmap", "sharded"])
def test_a_rollout_moves_nothing_between_host_and_devices(rollout, strategy):
    parallel, program, arguments = rollout(strategy)
    first = parallel.gather(program(*arguments))
    with jax.transfer_guard("disallow"):
        out = program(*arguments)
        jax.block_until_ready(out)
    np.testing.assert_array_equal(parallel.gather(out)["ids"], first["ids"])
    assert first["ids"].max() < 16 and (first["commit_step"] < first["calls"][:, None]).all()
