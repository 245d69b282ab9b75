"""MaskFocus and Mask-GRPO on the tiny base: every option trains, a run leaves what it should, resume is exact."""

import contextlib
import json

import jax
import numpy as np
import pytest
import tiny
from cluster import two_processes
from config_reads import ConfigReads, field_uses
from resumed import FIELDS, interrupted_and_resumed

from maskrl_jax import runner
from maskrl_jax.checkpoint import load_arrays
from maskrl_jax.data import shapes
from maskrl_jax.data.dataset import conditioning_of
from maskrl_jax.errors import UserError
from maskrl_jax.parallel import Parallel
from maskrl_jax.rewards.alarm import AlarmConfig
from maskrl_jax.rl.critical_steps import StepChoice
from maskrl_jax.rl.focus_update import FocusUpdate
from maskrl_jax.sampling.routing import RoutingConfig
from maskrl_jax.tasks import codecs, mask_grpo, maskfocus
from maskrl_jax.writers import read_metrics

STAGES = ("maskfocus", "mask_grpo")
SETTINGS = (AlarmConfig, StepChoice, FocusUpdate, RoutingConfig)
VARIANTS = {
    "all steps, accumulate, token mean": (
        "maskfocus",
        {"steps.select": "all", "loss.update_mode": "accumulate", "loss.norm": "token_mean"},
    ),
    "random steps and the first call, trajectory masks, full KL": (
        "maskfocus",
        {
            **{"steps.select": "random", "steps.scope": "sample", "steps.first_call": True},
            **{"loss.remask": "trajectory", "loss.kl": "full"},
        },
    ),
    "faithful": (
        "maskfocus",
        {
            **{"loss.clip_eps": 0.0, "zero_spread": "kl_only", "steps.timestep_offset": 0, "steps.first_call": False},
            **{"rollout_noise": "frozen", "energy_distance_scope": "all"},
        },
    ),
    "no KL, standardised rewards, exploring all, successes alone": (
        "maskfocus",
        {
            **{"loss.kl_coefficient": 0.0, "reward_scale": "group", "rollout.routing": "all_explore"},
            "negative_weight": 0.0,
        },
    ),
    "hard, first calls only, compounded noise": (
        "mask_grpo",
        {"loss.likelihood": "hard", "loss.reduction": "first", "rollout.noise_schedule": "compounded"},
    ),
    "all, last calls only, two inner updates, no KL": (
        "mask_grpo",
        {"loss.likelihood": "all", "loss.reduction": "last", "inner_updates": 2, "loss.kl_coefficient": 0.0},
    ),
}


@pytest.fixture(scope="module")
def runs(trained, tmp_path_factory):
    """Train both stages through the runner, reports included: (workdir of a stage, reads, unused fields)."""
    root, reads = tmp_path_factory.mktemp("quality"), ConfigReads()
    configs = {stage: tiny.get_config(stage) for stage in STAGES}
    with contextlib.ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        alone = jax.devices()[:1]
        patch.setattr(jax, "devices", lambda: alone)
        patch.setattr(shapes, "SPLIT_SIZES", tiny.SPLIT_SIZES)
        stack.enter_context(reads.recorded())
        unused = stack.enter_context(field_uses(*SETTINGS))
        for stage, config in configs.items():
            runner.run(config, str(root / stage), trained.store)
    return {stage: root / stage for stage in STAGES}, reads, unused


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_leaves_report_figures_and_every_tag(runs, stage):
    workdir = runs[0][stage]
    results = json.loads((workdir / "results.json").read_text())
    assert results["gain"]["comparison"]["setting"] == 4 and "gap closed at 4 calls" in results["headline"]
    figures = {path.stem for path in (workdir / "figures").iterdir()}
    assert {"quality_vs_calls", "samples", "training"} <= figures
    assert ({"chosen_steps", "information_gain", "exploring"} <= figures) == (stage == "maskfocus")
    lines = read_metrics(str(workdir))
    tags = {tag for line in lines for tag in line}
    assert tags >= {
        *("reward/judge", "reward/judge_std", "reward/quality", "reward_heldout/graded"),
        *("rl/kl", "rl/clip_frac", "rl/ratio_max_err", "rl/zero_std_ratio", "train/grad_norm"),
        *("pictures/edge_density", "pictures/group_diversity", "alarm/held_out", "alarm/pictures"),
    }
    assert "reward-hacking alarm" in (workdir / "report.md").read_text()
    # Before a rollout's first update nothing but rounding separates policy and behaviour.
    assert max(line.get("rl/ratio_max_err", 0) for line in lines) <= 1e-4
    if stage == "maskfocus":
        chosen = [sum(line[f"critical/chosen@{i:03d}"] for i in range(5)) for line in lines if "rl/kl" in line]
        np.testing.assert_allclose(chosen, 2)  # K


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_reads_every_key_of_its_config(runs, stage):
    every, read = runs[1].paths(stage)
    assert len(every) > 20 and every - read == set()


def test_every_field_of_the_settings_is_used(runs):
    assert {cls.__name__: fields for cls, fields in runs[2].items() if fields} == {}


@pytest.mark.parametrize("variant", VARIANTS)
def test_two_updates_of_a_variant(build, variant):
    stage, changes = VARIANTS[variant]
    config = tiny.changed(stage, changes)
    task = build(config)
    state = task.init(jax.random.key(0))
    before = jax.device_get(state.params)
    for step in range(2):
        state, metrics = task.step(state, task.batch(step))
    state, metrics = jax.device_get((state, metrics))
    assert int(state.step) == 2 and int(state.bad_total) == 0
    assert any(jax.tree.leaves(jax.tree.map(lambda a, b: not np.array_equal(a, b), before, state.params)))
    pairs = {name: value for name, value in metrics.items() if isinstance(value, tuple)}
    assert all(np.isfinite(value) for pair in pairs.values() for value in pair)
    assert ("rl/kl" in metrics) == (config.loss.kl_coefficient > 0)


@pytest.mark.parametrize("stage", STAGES)
def test_resume_equals_a_straight_run_bit_for_bit(trained, runs, one_device, tmp_path, stage):
    with one_device():
        found = interrupted_and_resumed(tiny.get_config(stage), str(tmp_path / "resumed"), trained.store)
    jax.tree.map(np.testing.assert_array_equal, found, load_arrays(str(runs[0][stage]), FIELDS))
    assert found["extra"]["alarm"]["count"] == 4 and found["extra"]["credit"]["history"]["count"] >= 4


@pytest.mark.slow
def test_two_processes_equal_one(trained, runs, tmp_path):
    """The report's own figures too: all processes roll out, one draws."""
    two_processes(trained, tmp_path / "two", "pmap", stage="maskfocus")
    expected, found = (load_arrays(str(path), FIELDS) for path in (runs[0]["maskfocus"], tmp_path / "two"))
    for name in ("params", "ema"):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), found[name], expected[name])
    assert (tmp_path / "two" / "figures" / "exploring.png").exists()


def test_whatever_steps_are_chosen_the_update_compiles_once(build):
    """The chosen steps differ from update to update."""
    traces, update = [], maskfocus.Wiring.update

    def counted(self, *arguments):
        traces.append(1)
        return update(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(maskfocus.Wiring, "update", counted)
        task = build(tiny.changed("maskfocus", {"steps.select": "random", "steps.count": 1}))
        state, seen = task.init(jax.random.key(0)), set()
        for step in range(4):
            state, metrics = task.step(state, task.batch(step))
            seen.add(tuple(metrics[f"critical/chosen@{i:03d}"] for i in range(5)))
    assert len(seen) > 1 and len(traces) == 1


@pytest.fixture(scope="module")
def rollout(trained):
    """Return (parallel, program, placed arguments at a round) of a MaskFocus rollout."""

    def rollout(strategy="pmap", number=0, **changes):
        config = tiny.changed("maskfocus", changes)
        parallel = Parallel(strategy, jax.local_devices()[:2])
        wiring = maskfocus.Wiring(config, conditioning_of("shapes"))
        params = parallel.init(wiring.init, jax.random.key(0), trained.parents["maskgit"].params).params
        codec = codecs.load(trained.parents["tokenizer"])
        frozen = parallel.replicate({"tokenizer": codec.params, "judge": trained.parents["judge"].params})
        count = np.arange(16, dtype=np.int32)
        request = {"cond": np.zeros((16, 8), np.int32), "target": np.ones((16, 3), np.int32)}
        request |= {"index": count + 16 * number, "round": np.full(16, number, np.int32)}
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


def test_frozen_noise_repeats_and_fresh_noise_does_not(rollout):
    """The official code's accident, kept for one ablation: every iteration and every group has the same noise."""
    for noise, same in (("frozen", True), ("fresh", False)):
        drawn = []
        for number in (0, 1):
            parallel, program, arguments = rollout(number=number, rollout_noise=noise)
            drawn.append(parallel.gather(program(*arguments))["ids"])
        assert np.array_equal(*drawn) == same
        assert np.array_equal(drawn[0][:2], drawn[0][2:4]) == same  # two groups of one caption


@pytest.mark.parametrize(
    ("stage", "changes", "message"),
    [
        ("maskfocus", {"steps.count": 5}, "leave 4 to choose from"),
        ("maskfocus", {"rollout.num_steps": 1}, "must lie in 2"),
        ("maskfocus", {"group": 1}, "do not fill groups of 1"),
        ("maskfocus", {"energy_distance_scope": "world"}, "energy_distance_scope 'world' is not one of all, prompt"),
        ("maskfocus", {"zero_spread": "keep"}, "zero_spread 'keep' is not one of drop, kl_only"),
        ("maskfocus", {"negative_weight": -1.0}, "negative_weight -1.0 must lie in"),
        ("maskfocus", {"rollout_noise": "old"}, "rollout_noise 'old' is not one of fresh, frozen"),
        ("maskfocus", {"reward_scale": "unit"}, "reward_scale 'unit' is not one of raw, group"),
        ("maskfocus", {"rewards_heldout": {"judge": 1.0}}, "trained on and held out"),
        ("maskfocus", {"rewards_heldout": {"beauty": 1.0}}, "unknown held-out reward 'beauty'"),
        ("maskfocus", {"alarm.fast": 0.99}, "must rise within"),
        ("maskfocus", {"loss.clip_eps": -0.1}, "loss.clip_eps -0.1 must lie in"),
        ("maskfocus", {"aim.closed_low": 0.9}, "must rise within"),
        ("mask_grpo", {"aim.diversity": -1.0}, "aim.diversity"),
        ("maskfocus", {"loss.kl": "k2"}, "'k2' is not one of"),
        ("mask_grpo", {"loss.reduction": "middle"}, "not one of none, first, last"),
        ("mask_grpo", {"loss.reduction": "last", "loss.reduced_calls": 9}, "must lie in 1..6"),
        ("mask_grpo", {"rollout.noise_schedule": "cubic"}, "not one of linear, compounded"),
    ],
)
def test_settings_that_cannot_be_are_named(stage, changes, message):
    config = tiny.changed(stage, changes)
    with pytest.raises((UserError, ValueError), match=message):
        {"maskfocus": maskfocus, "mask_grpo": mask_grpo}[stage].phases(config, Parallel("pmap", jax.devices()[:1]))


def test_a_device_needs_whole_groups():
    config = tiny.changed("maskfocus", {"group": 4})
    with pytest.raises(UserError, match="does not give each of 8 devices whole groups of 4; make it a multiple of 32"):
        maskfocus.phases(config, Parallel("pmap", jax.devices()))
