"""The shortcut stage on the tiny base: every option trains, a run leaves what it should, resume is exact."""

import contextlib
import dataclasses
import json
import re

import jax
import numpy as np
import pytest
import tiny
from absl import flags
from absl.testing import flagsaver
from config_reads import ConfigReads, field_uses
from PIL import Image
from resumed import FIELDS, interrupted_and_resumed
from typed import typed

from maskrl_jax import runner, stored
from maskrl_jax import sample as sample_command
from maskrl_jax.checkpoint import load_arrays, load_params
from maskrl_jax.data import shapes
from maskrl_jax.distill.feature_shortcut import ShortcutLoss
from maskrl_jax.errors import UserError
from maskrl_jax.evaluate import latency
from maskrl_jax.evaluate.systems import Costs
from maskrl_jax.evaluate.timing import Spread
from maskrl_jax.models.shortcut import ShortcutConfig
from maskrl_jax.parallel import Parallel
from maskrl_jax.sampling.maskgit import SamplerConfig
from maskrl_jax.tasks import shortcut
from maskrl_jax.tasks.shortcut import Teacher
from maskrl_jax.tasks.shortcut_systems import Curve
from maskrl_jax.tasks.shortcut_times import ShortcutTimes
from maskrl_jax.tasks.task import Context, Parent
from maskrl_jax.writers import read_metrics

SETTINGS = (ShortcutConfig, ShortcutLoss, Teacher, Curve)
BESIDE = ("frozen", "linear", "calibrated", "adaptive")
VARIANTS = {
    "a chain of two with its gradient stopped, all positions, KL": {
        "loss.chain": 2,
        "loss.through": False,
        "loss.positions": "all",
        "loss.kl": 0.1,
        "loss.kl_temperature": 2.0,
    },
    "a chain of three": {"loss.chain": 3},
    "a chain of two on its own tokens": {"loss.chain": 2, "loss.student_tokens": True, "teacher.num_steps": (4, 3)},
    "several numbers of steps, a buffer used twice": {"teacher.num_steps": (4, 3), "teacher.epochs": 2},
    "no controls, no time": {"model.controls": False, "model.embed_t": False},
    "as published": {
        "model.local_mixing": False,
        "model.kv_prenorm": False,
        "model.zero_init_out": False,
        "loss.kl": 0.0,
        "optimizer.name": "adamw",
    },
    "two blocks, full width, no zero": {"model.n_block": 2, "model.ratio": 1.0, "model.zero_init_out": False},
}


def changed(changes):
    return tiny.changed("shortcut", changes)


@pytest.fixture(scope="module")
def run(trained, tmp_path_factory):
    """Train through the runner, with a report of every system: (workdir, reads, unused fields)."""
    workdir, reads = tmp_path_factory.mktemp("shortcut") / "run", ConfigReads()
    config = changed({"curve.beside": BESIDE, "evaluation.timing_repeats": 1})
    with contextlib.ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        alone = jax.devices()[:1]
        patch.setattr(jax, "devices", lambda: alone)
        patch.setattr(shapes, "SPLIT_SIZES", tiny.SPLIT_SIZES)
        measure = latency.measure
        patch.setattr(latency, "measure", lambda runs, repeats: measure(runs, warm_up=1, repeats=repeats))
        stack.enter_context(reads.recorded())
        unused = stack.enter_context(field_uses(*SETTINGS))
        runner.run(config, str(workdir), trained.store)
    return workdir, reads, unused


def full_step(results):
    """Cost of a full step in the shortcut's loop, in steps of the base."""
    return float(re.search(r"in the shortcut's loop ([\d.]+)", results["facts"]["a step's cost"])[1])


def test_a_run_leaves_report_figures_and_every_tag(run):
    workdir = run[0]
    results = json.loads((workdir / "results.json").read_text())
    systems = {point["system"] for point in results["points"]}
    assert systems == {"base", "shortcut", *BESIDE}
    points = [point for point in results["points"] if point["system"] == "shortcut"]
    assert [point["setting"] for point in points] == [2, 3]
    # A budget of B costs B f + (4 - B) c calls, with one f and c for both.
    two, three = (point["calls_mean"] for point in points)
    full = full_step(results)
    light = full - (three - two)
    assert light >= -1e-3 and two == pytest.approx(2 * full + 2 * light, abs=1e-2)
    calls = [point["calls_mean"] for point in results["points"] if point["system"] != "base"]
    equal = {n for n in (int(np.ceil(one - 1e-6)) for one in calls) if n <= 4}  # a tiny base is cheap
    assert {p["setting"] for p in results["points"] if p["system"] == "base"} == {2, 4} | equal
    timed = {(one["system"], one["setting"]) for one in results["latencies"]}
    assert timed == {(p["system"], p["setting"]) for p in results["points"]}
    assert results["reference"][0]["setting"] == 4
    figures = {path.stem for path in (workdir / "figures").iterdir()}
    assert {"quality_vs_calls", "quality_vs_time", "drift", "budget", "samples", "training"} <= figures
    tags = {tag for line in read_metrics(str(workdir)) for tag in line}
    assert tags >= {"train/loss", "train/mse", "train/mse_frozen", "train/grad_norm"}
    assert tags >= {f"drift{of}/{m}@{s:02d}" for of in ("", "_frozen") for m in ("mse", "cosine", "kl") for s in (1, 3)}
    report = (workdir / "report.md").read_text()
    assert "linear extrapolation" in report and "of a step of the base" in report


def test_a_run_writes_nothing_but_checkpoints_and_the_report(run):
    names = {path.name.split(".")[0] for path in run[0].iterdir()}
    kept = {"checkpoints", "config", "parents", "done", "metrics", "report", "results", "figures", "points", "samples"}
    assert names - kept - {"events", "", "profile"} == set()


def test_a_run_reads_every_key_of_its_config(run):
    every, read = run[1].paths("shortcut")
    assert len(every) > 20 and every - read == set()


def test_every_field_of_the_settings_is_used(run):
    assert {cls.__name__: fields for cls, fields in run[2].items() if fields} == {}


@pytest.mark.parametrize("variant", VARIANTS)
def test_two_buffers_of_a_variant(build, variant):
    config = changed(VARIANTS[variant])
    task = build(config)
    state = task.init(jax.random.key(0))
    before = jax.device_get(state.params)
    for step in range(2):
        state, metrics = task.step(state, task.batch(step))
    state, metrics = jax.device_get((state, metrics))
    assert int(state.step) == 2 and int(state.bad_total) == 0
    assert any(jax.tree.leaves(jax.tree.map(lambda a, b: not np.array_equal(a, b), before, state.params)))
    assert all(np.isfinite(value) for pair in metrics.values() for value in pair)
    assert ("train/kl" in metrics) == (config.loss.kl > 0)


def test_a_step_costs_its_share_of_one_of_the_base(build, monkeypatch):
    """The base's four steps take 4 s, as many in the shortcut's loop 4.4 s; one of them and three light ones 2 s."""
    task = build(changed({}))
    systems, state = task.report.__self__.systems, task.init(jax.random.key(0))
    seconds = {"base": 4.0, ("shortcut", "all"): 4.4, ("shortcut", "first"): 2.0}
    seconds |= {("frozen", "all"): 4.0, ("frozen", "first"): 1.3}
    monkeypatch.setattr(latency, "measure", lambda runs, repeats: {name: Spread(*3 * [seconds[name]]) for name in runs})
    step, costs = ShortcutTimes(systems).costs(state.ema, ("shortcut", "calibrated", "frozen"))
    assert step == 1.0 and costs["shortcut"] == costs["calibrated"]
    assert (costs["shortcut"].full, costs["shortcut"].light) == (pytest.approx(1.1), pytest.approx(0.3))
    assert costs["frozen"] == Costs(1.0, pytest.approx(0.1))
    system = systems.system(state.ema, "shortcut", systems.evenly, costs["shortcut"])
    cond = np.zeros((2, 8), np.int32)
    made = system.generate(3, cond, np.arange(2, dtype=np.int32), 0)
    assert made.calls.tolist() == pytest.approx([3.6, 3.6]) and made.taken.tolist() == [4, 4]


def test_a_buffer_of_bad_gradients_counts_once(build):
    """The loop counts buffers; one of them has three minibatches."""
    task = build(changed({"teacher.pairs": 1}))
    state = task.init(jax.random.key(0))
    state = state.replace(params=jax.tree.map(lambda x: x * np.nan, state.params))
    state, metrics = task.step(state, task.batch(0))
    assert int(state.bad_steps) == 1 and int(state.bad_total) == 3 and int(state.step) == 1


def test_training_beats_the_frozen_feature(build):
    """That is where it starts: with a zero output projection the network is the identity."""
    config = changed({"optimizer.name": "adamw", "optimizer.learning_rate": 3e-3, "num_steps": 40})
    task = build(config)
    state, ratios = task.init(jax.random.key(0)), []
    for step in range(40):
        state, metrics = task.step(state, task.batch(step))
        ratios.append(float(metrics["train/mse"][0]) / float(metrics["train/mse_frozen"][0]))
    assert ratios[0] <= 1.0 + 1e-3 and np.mean(ratios[-5:]) < 0.9


def test_the_loop_compiles_two_programs_once(build, monkeypatch):
    """Also where the number of steps changes from buffer to buffer; here with both branches of guidance."""
    guided = SamplerConfig(num_steps=4, max_steps=4, guidance=1.7)
    monkeypatch.setattr(shortcut, "read_sampler", lambda *_: guided)
    traces = {"rollout": 0, "update": 0}
    with pytest.MonkeyPatch.context() as patch:
        for name in traces:
            original = getattr(shortcut.Wiring, name)

            def counted(self, *arguments, name=name, original=original):
                traces[name] += 1
                return original(self, *arguments)

            patch.setattr(shortcut.Wiring, name, counted)
        task = build(changed({"teacher.num_steps": (4, 3, 2)}))
        state = task.init(jax.random.key(0))
        for step in range(4):
            state, metrics = task.step(state, task.batch(step))
            assert int(metrics["train/mse"][1]) == 8 * 2 * 3  # samples, pairs, minibatches: six pairs of two branches
    assert traces == {"rollout": 1, "update": 1}


def test_own_tokens_are_drawn_with_both_branches(build, monkeypatch):
    """A pair then stands for both: as many rows in half the minibatches; not in modes whose order a rollout has drawn."""
    guided = SamplerConfig(num_steps=4, max_steps=4, guidance=1.7)
    monkeypatch.setattr(shortcut, "read_sampler", lambda *_: guided)
    task = build(changed({"loss.chain": 2, "loss.student_tokens": True, "teacher.pairs": 1}))
    state, metrics = task.step(task.init(jax.random.key(0)), task.batch(0))
    assert int(metrics["train/mse"][1]) == 8 * 2 * 3  # samples, branches, pairs
    assert np.isfinite(metrics["train/loss"][0]) and int(state.bad_total) == 0
    monkeypatch.setattr(shortcut, "read_sampler", lambda *_: dataclasses.replace(guided, mode="halton"))
    with pytest.raises(UserError, match="loss.student_tokens does not know the order .* 'halton'"):
        build(changed({"loss.chain": 2, "loss.student_tokens": True}))


def test_resume_equals_a_straight_run_bit_for_bit(trained, run, one_device, tmp_path):
    config = changed({"curve.beside": BESIDE, "evaluation.timing_repeats": 1})
    with one_device():
        found = interrupted_and_resumed(config, str(tmp_path / "resumed"), trained.store)
    jax.tree.map(np.testing.assert_array_equal, found, load_arrays(str(run[0]), FIELDS))


@pytest.fixture
def sample(run, one_device, tmp_path, capsys):
    """Sample from the run in this process: sample(*flags) -> what it printed."""

    def sample(*arguments):
        with flagsaver.flagsaver(), one_device():
            flags.FLAGS(["sample", f"--workdir={run[0]}", f"--out={tmp_path / 'grid.png'}", *arguments])
            sample_command.main()
        return capsys.readouterr().out

    return sample


def test_sample_runs_the_full_network_as_often_as_asked(sample, tmp_path):
    prompt = ["--prompt=a green cross", "--num_images=2"]
    out = sample(*prompt)
    assert "full steps: 3, evenly spread: confidence, 4 steps at most" in out
    assert "3.0 network calls an image, 1.0 shortcut steps" in out
    out = sample(*prompt, "--num_steps=8", "--full_steps=2")
    assert "full steps: 2, evenly spread: confidence, 8 steps at most" in out
    assert "2.0 network calls an image, 6.0 shortcut steps" in out
    out = sample(*prompt, "--num_steps=8")
    assert "full steps: 6" in out  # the usual share
    Image.fromarray(np.full((32, 32, 3), 200, np.uint8)).save(tmp_path / "photo.png")
    out = sample(*prompt, f"--image={tmp_path / 'photo.png'}", "--box=0,16,32,32", "--full_steps=1")
    assert "1.0 network calls an image" in out


def test_all_steps_full_draws_what_the_base_draws(sample, run, trained, one_device, tmp_path):
    prompt = ["--prompt=a green cross", "--num_images=2", "--num_steps=4"]
    sample(*prompt, "--full_steps=4")
    with flagsaver.flagsaver(), one_device():
        base, out = trained.parents["maskgit"].workdir, tmp_path / "base.png"
        flags.FLAGS(["sample", f"--workdir={base}", f"--out={out}", *prompt])
        sample_command.main()
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "grid.png")), np.asarray(Image.open(out)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--full_steps=5"], "--full_steps=5 must lie in 1..4"),
        (["--full_steps=0"], "--full_steps=0 must lie in 1..4"),
        (["--dial=1"], "--dial is for a tuned policy alone"),
    ],
)
def test_sample_refuses_in_one_line(sample, arguments, message):
    with pytest.raises(UserError, match=message):
        sample(*arguments)


def test_evaluate_measures_other_budgets(run, tmp_path):
    code, out, error = typed("evaluate", run[0], "--budgets=1,4", f"--out={tmp_path / 'again'}")
    assert code == 0, error
    results = json.loads((tmp_path / "again" / "results.json").read_text())
    found = {p["setting"]: p for p in results["points"] if p["system"] == "shortcut"}
    assert set(found) == {1, 4}
    # With all steps full it is the base, sample by sample.
    base = next(p for p in results["points"] if (p["system"], p["setting"]) == ("base", 4))
    assert found[4]["metrics"] == base["metrics"]
    assert found[4]["calls_mean"] == pytest.approx(4 * full_step(results), abs=1e-2)


def test_a_shortcut_on_a_tuned_policy(trained, tmp_path, monkeypatch):
    """Its network and its order; the base stays what it is compared with."""
    elsewhere = tmp_path / "elsewhere"
    config = changed({"curve.budgets": (2, 4)})
    config.parents.speed_rl = trained.config
    params, extra = load_params(trained.workdir)
    policy = Parent(trained.config, params, extra, trained.workdir)
    parallel = Parallel("pmap", jax.local_devices()[:1])
    context = Context(config, trained.parents | {"speed_rl": policy}, parallel, trained.store, str(tmp_path))
    network, sampler = shortcut.teacher_of(context)
    assert sampler.gumbel == trained.config.policy.noise
    jax.tree.map(np.testing.assert_array_equal, network, params["model"])
    task = runner.build(context)
    state = task.init(jax.random.key(0))
    for step in range(2):
        state, metrics = task.step(state, task.batch(step))
    assert np.isfinite(float(metrics["train/mse"][0]))
    measure = latency.measure
    monkeypatch.setattr(latency, "measure", lambda runs, repeats: measure(runs, warm_up=1, repeats=repeats))
    task.report(jax.device_get(state.ema))
    results = json.loads((tmp_path / "results.json").read_text())
    assert {point["system"] for point in results["points"]} == {"base", "tuned", "policy", "shortcut", "frozen"}
    full = float(re.search(r"one of the tuned network alone ([\d.]+)", results["facts"]["a step's cost"])[1])
    plain = next(p for p in results["points"] if (p["system"], p["setting"]) == ("tuned", 4))
    assert plain["calls_mean"] == pytest.approx(4 * full, rel=0.01)  # in steps of the base
    other = dataclasses.replace(policy, workdir=str(elsewhere))
    elsewhere.mkdir()
    other_base = trained.parents["tokenizer"].workdir
    stored.write_places(str(elsewhere), {"maskgit": other_base, "tokenizer": other_base}, trained.store)
    with pytest.raises(UserError, match="was tuned on another base"):
        runner.build(dataclasses.replace(context, parents=trained.parents | {"speed_rl": other}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher.num_steps": (1,)}, "needs numbers of steps of at least 2"),
        ({"teacher.pairs": 0}, "teacher.pairs 0"),
        ({"teacher.pairs": 99}, "exceeds the"),
        ({"loss.chain": 4}, "loss.chain 4 exceeds the 3 pairs"),
        ({"loss.positions": "some"}, "loss.positions 'some' is not one of masked, all"),
        ({"loss.kl": -1.0}, "loss.kl -1.0 must be at least 0"),
        ({"curve.budgets": (3, 2)}, "curve.budgets"),
        ({"curve.budgets": (9,)}, "9 full steps must lie in 1..4"),
        ({"curve.beside": ("adaptive",), "curve.budgets": (1, 2), "curve.longest": 1}, "go below the 2 full steps"),
        ({"evaluation.steps": (4, 2)}, "evaluation.steps"),
        ({"evaluation.steps": (2, 99)}, "num_steps 99"),
        ({"curve.beside": ("shortcut",)}, "is not among frozen, linear, calibrated, adaptive"),
        ({"model.heads": 3}, "not divisible by heads 3"),
        ({"model.ratio": 0.5}, "ratio 0.5 must be at least 1"),
    ],
)
def test_settings_that_cannot_be_are_named(changes, message):
    with pytest.raises((UserError, ValueError), match=message):
        shortcut.phases(changed(changes), Parallel("pmap", jax.devices()[:1]))
