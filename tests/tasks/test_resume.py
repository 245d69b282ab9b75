"""A run that was stopped ends in the same bits as one that was not."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny

from maskrl_jax import runner
from maskrl_jax.checkpoint import load_arrays

FIELDS = ("step", "params", "opt_state", "ema", "extra", "bad_steps", "bad_total")


def dying(build, step_of_death):
    """Return a build whose task dies in a step, and measures nothing."""

    def changed(context):
        task = build(context)

        def step(state, batch):
            if int(jax.device_get(state.step)) == step_of_death:
                raise RuntimeError("power cut")
            return task.step(state, batch)

        return dataclasses.replace(task, step=step, evaluate=lambda state, step: ({}, {}), report=None)

    return changed


@pytest.mark.parametrize("stage", ["tokenizer", "speed_rl"])
def test_resume_equals_a_straight_run_bit_for_bit(trained, one_device, monkeypatch, tmp_path, stage):
    straight = trained.workdir if stage == "speed_rl" else trained.parents[stage].workdir
    config, workdir = tiny.get_config(stage), str(tmp_path / "resumed")
    module = runner.task_module(config)
    build = module.build
    with one_device():
        monkeypatch.setattr(module, "build", dying(build, 3))
        with pytest.raises(RuntimeError, match="power cut"):
            runner.run(config, workdir, trained.store)
        assert int(load_arrays(workdir, ("step",))["step"]) == 2
        monkeypatch.setattr(module, "build", dying(build, -1))
        runner.run(config, workdir, trained.store)
    expected, found = (load_arrays(path, FIELDS) for path in (straight, workdir))
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    if stage == "speed_rl":  # filters' history and reward statistics are part of what came back
        assert found["extra"]["credit"]["history"]["count"] >= 4 * config.num_steps
        assert found["extra"]["credit"]["sigma"] > 0
