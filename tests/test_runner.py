"""The stage graph: parents trained once, what a config may not do."""

import dataclasses
import fcntl
import json
import threading

import jax
import jax.numpy as jnp
import pytest
import toy_task

from configs import sizes
from maskrl_jax import roofline, runner, stored
from maskrl_jax.errors import UserError
from maskrl_jax.parallel import Parallel
from maskrl_jax.phase import Phase
from maskrl_jax.target import local_target


@pytest.fixture(autouse=True)
def toy_is_known(monkeypatch):
    monkeypatch.setitem(runner.TASKS, "toy", "toy_task")


@pytest.fixture
def trained(monkeypatch):
    """Collect the workdirs that are really trained, with a loop that only leaves a checkpoint."""
    from maskrl_jax.checkpoint import Checkpoints

    calls = []

    def train(task, config, workdir, parallel):
        calls.append(workdir)
        checkpoints = Checkpoints(workdir, parallel)
        checkpoints.save(config.num_steps, task.init(jax.random.key(config.seed)))
        checkpoints.close()

    monkeypatch.setattr(runner.loop, "train", train)
    return calls


def test_a_missing_parent_is_trained_once_and_reused(tmp_path, trained, capsys):
    config, store = toy_task.get_config("child"), str(tmp_path / "store")
    runner.run(config, str(tmp_path / "a"), store)
    base = stored.stage_workdir(config.parents.base, store)
    assert trained == [base, str(tmp_path / "a")]
    config.seed = 1
    runner.run(config, str(tmp_path / "b"), store)
    runner.run(config, str(tmp_path / "b"), store)
    assert trained[2:] == [str(tmp_path / "b")]
    assert f"toy ({base}): finished before" in capsys.readouterr().out


def test_init_replaces_a_parent(tmp_path, trained):
    runner.run(toy_task.get_config(), str(tmp_path / "mine"), str(tmp_path / "store"))
    config = toy_task.get_config("child")
    config.init.base = str(tmp_path / "mine")
    runner.run(config, str(tmp_path / "a"), str(tmp_path / "store"))
    assert trained == [str(tmp_path / "mine"), str(tmp_path / "a")]


def refused(config, tmp_path, workdir="a"):
    with pytest.raises(UserError) as error:
        runner.run(config, str(tmp_path / workdir), str(tmp_path / "store"))
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": "tokeniser"}, "unknown task 'tokeniser'; did you mean 'tokenizer'?"),
        ({"batch_size": 12}, "batch of 12 does not divide by 8 devices"),
        ({"num_steps": 0}, "num_steps=0"),
        ({"parallel": "pmpa"}, "did you mean 'pmap'"),
        ({"optimizer": {"learning_rat": 1.0}}, "did you mean 'learning_rate'"),
        ({"init": {"bas": "x"}}, "unknown parent in init 'bas'; did you mean 'base'?"),
        ({"init": {"base": "/nowhere"}}, "init.base=/nowhere has no config.json"),
        ({"parents": {"base": {"batch_size": 12}}}, "batch of 12"),
    ],
)
def test_a_config_that_cannot_run_is_refused_before_any_training(tmp_path, trained, change, message):
    config = toy_task.get_config("child")
    config.update(change)
    assert message in refused(config, tmp_path)
    assert trained == []


def test_a_config_without_a_key_is_named(tmp_path):
    config = toy_task.get_config()
    del config.max_bad_steps
    assert "has no max_bad_steps" in refused(config, tmp_path)


def test_a_key_that_a_stage_misses_or_does_not_know_is_one_line(tmp_path, monkeypatch):
    def phases(config, parallel):
        return config.model.depth

    monkeypatch.setattr(toy_task, "phases", phases)
    assert "the config of task 'toy' cannot run: no key 'depth'" in refused(toy_task.get_config(), tmp_path)


def test_an_init_of_another_task_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"task": "judge"}')
    config = toy_task.get_config("child")
    config.init.base = str(tmp_path)
    assert "holds a 'judge' stage" in refused(config, tmp_path)


def test_an_unfinished_init_or_one_without_checkpoint_is_named(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(stored.plain(toy_task.get_config())))
    config = toy_task.get_config("child")
    config.init.base = str(tmp_path)
    assert "is not trained to its end; run its training command again" in refused(config, tmp_path)
    stored.finish(str(tmp_path), 6, "lost")
    assert "no checkpoint under" in refused(config, tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"model": {"width": 8}},
        {"parents": {"base": {"seed": 3}}},
        {"seed": 1},
        {"optimizer": {"name": "sgd"}},  # its state would not fit the checkpoint
    ],
)
def test_another_architecture_or_seed_in_the_workdir_is_refused(tmp_path, trained, change):
    runner.run(toy_task.get_config("child"), str(tmp_path / "a"), str(tmp_path / "store"))
    config = toy_task.get_config("child")
    config.update(change)
    assert "was begun with another config" in refused(config, tmp_path)


def test_a_finished_workdir_refuses_other_settings_but_goes_on_with_more_steps(tmp_path, trained, capsys):
    config = toy_task.get_config()
    runner.run(config, str(tmp_path / "a"), str(tmp_path / "store"))
    config.batch_size = 32
    assert "finished with another config: batch_size: 16 -> 32" in refused(config, tmp_path)
    config.num_steps = 8
    runner.run(config, str(tmp_path / "a"), str(tmp_path / "store"))
    assert "config changed since the last run: batch_size: 16 -> 32" in capsys.readouterr().out
    assert len(trained) == 2
    config.num_steps = 6
    assert "is at step 8, num_steps is 6" in refused(config, tmp_path)


def test_a_second_run_waits_for_the_first_and_does_not_train_again(tmp_path, trained, capsys):
    config, workdir = toy_task.get_config(), tmp_path / "a"
    workdir.mkdir()
    with open(workdir / ".lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        other = threading.Thread(target=runner.run, args=(config, str(workdir), str(tmp_path / "store")))
        other.start()
        other.join(1.0)
        assert other.is_alive()
        (workdir / "config.json").write_text(json.dumps(stored.plain(config)))
        stored.finish(str(workdir), 6, "by another run")
    other.join(20)
    assert not other.is_alive() and trained == []
    assert "waiting for another run" in capsys.readouterr().out


def test_seconds_at_peak_come_from_the_programs_of_a_stage(monkeypatch):
    config, parallel = toy_task.get_config(), Parallel("pmap")
    assert runner._peak_seconds(config, parallel) is None  # this machine's devices have no published figures
    chip = roofline.Chip("toy", flops=1e6, hbm_bytes=1e9, hbm_bandwidth=1e12, interconnect=1e12)
    target = dataclasses.replace(local_target(), chip=chip)
    monkeypatch.setattr(runner, "local_target", lambda: target)

    def product(params, frozen, batch, axis):
        return {"y": batch["x"] @ params}

    x, w = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((16, 32), (32, 8)))
    monkeypatch.setattr(toy_task, "phases", lambda *_: [Phase("product", product, (w, {}, {"x": x}), kind="map")])
    assert runner._peak_seconds(config, parallel) == pytest.approx(2 * 16 * 32 * 8 / 8 / 1e6, rel=0.1)
    adaptive = [Phase("rollout", product, (w, {}, {"x": x}), kind="map", loop_trips=5)]
    monkeypatch.setattr(toy_task, "phases", lambda *_: adaptive)
    assert runner._peak_seconds(config, parallel) is None


@pytest.mark.parametrize(
    ("probe", "named"), [("", "service.probe is empty"), ("none.json", "no probe of a reward service in none.json")]
)
def test_a_service_that_cannot_be_used_is_told_before_parents_are_trained(tmp_path, probe, named):
    config = toy_task.get_config("child")
    config.service = sizes.SERVICE | {"url": "http://127.0.0.1:9", "probe": probe}
    with pytest.raises(UserError, match=named):
        runner.run(config, str(tmp_path / "run"), str(tmp_path / "stages"))
    assert not (tmp_path / "stages").exists()
