"""One device, eight devices, both strategies: the same tokens, the same parameters."""

import jax
import numpy as np
import pytest
import tiny

from maskrl_jax.tasks.rollouts import Rollouts

# Plain gradient descent, for all: Adam turns the rounding of a gradient near zero into a full step.
OPTIMIZER = tiny.SGD | {"learning_rate": 0.02, "ema_decay": 0.5}
TUNING = ("speed_rl", "mask_grpo", "maskfocus")
STAGES = ("tokenizer", "judge", "maskgit", "shortcut", *TUNING)


@pytest.fixture
def rollouts(monkeypatch):
    """Collect what every batch of rollouts holds."""
    seen, collect = [], Rollouts.collect

    def noting(self, *args):
        result = collect(self, *args)
        seen.append(result[0])
        return result

    monkeypatch.setattr(Rollouts, "collect", noting)
    return seen


def updated(build, stage, strategy, devices, steps=3):
    """Return the state after a few updates, as numpy."""
    config = tiny.get_config(stage)
    config.optimizer = OPTIMIZER
    if stage == "speed_rl":  # the shipped action; the tiny base is never surer than this
        config.policy.update({"action": "threshold", "order": "uncertain", "kappa": 0.2})
    if stage == "shortcut":  # the loss that draws tokens of its own
        config.loss.update({"chain": 2, "student_tokens": True})
    task = build(config, strategy, devices)
    state = task.init(jax.random.key(0))
    for step in range(steps):
        state, _ = task.step(state, task.batch(step))
    return jax.device_get({"params": state.params, "ema": state.ema, "extra": state.extra})


@pytest.fixture(scope="module")
def alone(build):
    """The state of each stage on one device, and the rollouts that led there."""
    found = {}

    def on_one_device(stage, rollouts):
        if stage not in found:
            found[stage] = updated(build, stage, "pmap", 1), list(rollouts)
            rollouts.clear()
        return found[stage]

    return on_one_device


@pytest.mark.parametrize(("strategy", "devices"), [("pmap", 8), ("sharded", 8)])
@pytest.mark.parametrize("stage", STAGES)
def test_devices_and_strategy_do_not_matter(build, alone, rollouts, stage, strategy, devices):
    expected, expected_rollouts = alone(stage, rollouts)
    found = updated(build, stage, strategy, devices)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), found["params"], expected["params"])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, expected)
    assert len(rollouts) == len(expected_rollouts) == (3 if stage in TUNING else 0)
    for ours, theirs in zip(rollouts, expected_rollouts, strict=True):
        for name in {"ids", "commit_step", "calls", "decision", "explored"} & set(ours):
            np.testing.assert_array_equal(ours[name], theirs[name])
