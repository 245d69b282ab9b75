"""A run that dies in a step and is started again."""

import dataclasses

import jax
import pytest

from maskrl_jax import runner
from maskrl_jax.checkpoint import load_arrays

FIELDS = ("step", "params", "opt_state", "ema", "extra", "bad_steps", "bad_total")


def _dying(build, step_of_death):
    """Return a build whose task dies in a step, and measures nothing."""

    def changed(context):
        task = build(context)

        def step(state, batch):
            if int(jax.device_get(state.step)) == step_of_death:
                raise RuntimeError("power cut")
            return task.step(state, batch)

        return dataclasses.replace(task, step=step, evaluate=lambda state, step: ({}, {}), report=None)

    return changed


def interrupted_and_resumed(config, workdir, store):
    """Run a stage that saves every two steps, cut it off in step 3, run it again; return its arrays."""
    module = runner.task_module(config)
    with pytest.MonkeyPatch.context() as patch:
        build = module.build
        patch.setattr(module, "build", _dying(build, 3))
        with pytest.raises(RuntimeError, match="power cut"):
            runner.run(config, workdir, store)
        assert int(load_arrays(workdir, ("step",))["step"]) == 2
        patch.setattr(module, "build", _dying(build, -1))
        runner.run(config, workdir, store)
    return load_arrays(workdir, FIELDS)
