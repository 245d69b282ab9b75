"""A run that was stopped ends in the same bits as one that was not."""

import jax
import numpy as np
import pytest
import tiny
from resumed import FIELDS, interrupted_and_resumed

from maskrl_jax.checkpoint import load_arrays


@pytest.mark.parametrize("stage", ["tokenizer", "speed_rl"])
def test_resume_equals_a_straight_run_bit_for_bit(trained, one_device, tmp_path, stage):
    straight = trained.workdir if stage == "speed_rl" else trained.parents[stage].workdir
    config = tiny.get_config(stage)
    with one_device():
        found = interrupted_and_resumed(config, str(tmp_path / "resumed"), trained.store)
    jax.tree.map(np.testing.assert_array_equal, found, load_arrays(straight, FIELDS))
    if stage == "speed_rl":  # filters' history and reward statistics are part of what came back
        assert found["extra"]["credit"]["history"]["count"] >= 4 * config.num_steps
        assert found["extra"]["credit"]["sigma"] > 0
        assert found["extra"]["alarm"]["count"] == config.num_steps
