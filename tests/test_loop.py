"""The loop: its order, exact resume, what stops it."""

import contextlib
import dataclasses
import os
import signal
import threading

import jax
import numpy as np
import pytest
import toy_task

from maskrl_jax import loop
from maskrl_jax.checkpoint import load_arrays
from maskrl_jax.errors import UserError
from maskrl_jax.parallel import Parallel
from maskrl_jax.tasks.task import Context
from maskrl_jax.writers import read_metrics

FIELDS = ("step", "params", "opt_state", "ema", "extra")


def run(workdir, change=lambda task: task, **settings):
    """Train the toy stage; `change` replaces functions of the task."""
    config = toy_task.get_config()
    config.data.update(settings.pop("data", {}))
    devices = settings.pop("devices", None)
    config.update(settings)
    parallel = Parallel(config.parallel, jax.devices()[:devices])
    workdir.mkdir(exist_ok=True)
    task = toy_task.build(Context(config, {}, parallel, "", str(workdir)))
    return loop.train(change(task), config, str(workdir), parallel)


def arrays(workdir):
    return load_arrays(str(workdir), FIELDS)


def stopping_at(number, stop):
    """Return a change of the task that calls `stop` while the batch of step `number` is used."""

    def change(task):
        def step(state, batch):
            if int(jax.device_get(state.step)) == number:
                stop()
            return task.step(state, batch)

        return dataclasses.replace(task, step=step)

    return change


@pytest.mark.parametrize("stop_at", [3, 4])
def test_resume_equals_a_straight_run_bit_for_bit(tmp_path, stop_at):
    run(tmp_path / "straight")

    def die():
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError):
        run(tmp_path / "resumed", stopping_at(stop_at, die))
    assert int(arrays(tmp_path / "resumed")["step"]) == stop_at // 2 * 2
    run(tmp_path / "resumed")
    jax.tree.map(np.testing.assert_array_equal, arrays(tmp_path / "resumed"), arrays(tmp_path / "straight"))
    steps = [[line["step"] for line in read_metrics(str(tmp_path / name))] for name in ("straight", "resumed")]
    assert steps[0] == steps[1] == [2, 4, 6, 6]


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize(("before", "after"), [("pmap", "pmap"), ("sharded", "sharded"), ("sharded", "pmap")])
def test_what_eight_devices_saved_goes_on_with_fewer_to_the_same_end(tmp_path, devices, before, after):
    run(tmp_path / "straight", parallel=before)
    run(tmp_path / "moved", parallel=before, num_steps=4, devices=8)
    run(tmp_path / "moved", parallel=after, devices=devices)
    found, expected = arrays(tmp_path / "moved"), arrays(tmp_path / "straight")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), found, expected)


@pytest.mark.parametrize(("at", "traces"), [(0, 0), (2, 1), (5, 1)])
def test_three_steps_are_traced_where_that_is_asked_for(tmp_path, at, traces):
    """From step 5 on only one step is left: the trace ends with the run."""
    run(tmp_path, profile_at=at)
    assert len(list((tmp_path / "profile").rglob("*.xplane.pb"))) == traces
    assert int(arrays(tmp_path)["step"]) == 6


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_exits(tmp_path, number, code):
    earlier = signal.getsignal(number)
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path, stopping_at(2, lambda: os.kill(os.getpid(), number)), save_every=100)
    assert stopped.value.code == code
    assert int(arrays(tmp_path)["step"]) == 3  # the step in flight is finished, not lost
    assert signal.getsignal(number) is earlier
    run(tmp_path)
    assert int(arrays(tmp_path)["step"]) == 6


def test_a_signal_does_not_wait_for_an_evaluation(tmp_path):
    def change(task):
        def evaluate(state, step):
            os.kill(os.getpid(), signal.SIGTERM)
            threading.Event().wait(30)

        return dataclasses.replace(task, evaluate=evaluate)

    with pytest.raises(SystemExit):
        run(tmp_path, change, eval_every=2)
    assert not any(loop.EVAL_TIME in line for line in read_metrics(str(tmp_path)))


def test_evaluation_comes_before_save_before_batch_before_step(tmp_path, monkeypatch):
    seen = []

    def change(task):
        def noting(name, function):
            def noted(*args):
                seen.append((name, args[-1] if name != "step" else int(jax.device_get(args[0].step))))
                return function(*args)

            return noted

        return dataclasses.replace(task, step=noting("step", task.step), evaluate=noting("evaluate", task.evaluate))

    save = loop.Checkpoints.save
    monkeypatch.setattr(
        loop.Checkpoints,
        "save",
        lambda self, step, state: (seen.append(("save", step)), save(self, step, state)),
    )
    run(tmp_path, change, num_steps=4, eval_every=2)
    assert seen == [
        *[("evaluate", 0), ("step", 0), ("step", 1)],
        *[("evaluate", 2), ("save", 2), ("step", 2), ("step", 3)],
        *[("evaluate", 4), ("save", 4)],
    ]


def test_many_bad_updates_stop_the_run_and_spare_the_checkpoint(tmp_path):
    with pytest.raises(UserError, match="3 updates in a row .* not finite"):
        run(tmp_path, num_steps=20, save_every=4, log_every=1, data={"bad_from": 4})
    saved = arrays(tmp_path)
    assert int(saved["step"]) == 4
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(saved["params"]))


def test_a_report_is_written_with_the_last_state(tmp_path):
    state = run(tmp_path)
    assert (tmp_path / "report.md").read_text() == "parents: []\n"
    assert int(state.step) == 6


def test_means_divide_sums_by_weights_once():
    means = loop._means([{"a": (2.0, 1.0), "b": 1.0, "c": (0.0, 0.0)}, {"a": (4.0, 3.0), "b": 2.0, "c": (0.0, 0.0)}])
    assert means == {"a": 1.5, "b": 1.5}


def test_batches_are_made_ahead_in_order_and_errors_reach_the_loop():
    def batch(step):
        if step == 4:
            raise ValueError("broken record")
        return step

    with contextlib.closing(loop.Prefetch(batch, 2, 6)) as batches:
        assert [batches.next(), batches.next()] == [2, 3]
        with pytest.raises(ValueError, match="broken record"):
            batches.next()


@pytest.mark.parametrize("peak_seconds", [None, 1e-3])
def test_utilisation_is_logged_where_the_peak_is_known(tmp_path, peak_seconds):
    run(tmp_path / "a", lambda task: dataclasses.replace(task, peak_seconds=peak_seconds), log_every=1)
    lines = [line for line in read_metrics(str(tmp_path / "a")) if "perf/step_time" in line]
    assert lines and all(("perf/mfu" in line) == (peak_seconds is not None) for line in lines)
    if peak_seconds:
        np.testing.assert_allclose([x["perf/mfu"] * x["perf/step_time"] for x in lines], peak_seconds)
