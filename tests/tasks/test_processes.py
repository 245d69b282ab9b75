"""Tiny stages in processes of their own: a signal, and processes that train together."""

import signal
import time

import jax
import numpy as np
import pytest
from cluster import start, two_processes
from resumed import FIELDS

from benchmarks import processes
from maskrl_jax.checkpoint import load_arrays


@pytest.mark.slow
def test_sigterm_saves_and_exits_143_and_the_same_command_ends_in_the_same_bits(trained, tmp_path):
    workdir = tmp_path / "stopped"
    process = start(trained, workdir)
    while not (workdir / "metrics.jsonl").exists():  # written at step 1
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 143, errors
    assert "run it again to resume" in out and not (workdir / "done").exists()
    assert 1 <= int(load_arrays(str(workdir), ("step",))["step"]) < 6
    process = start(trained, workdir)
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert "step 0/6" not in out and (workdir / "report.md").exists()
    expected, found = (load_arrays(str(path), FIELDS) for path in (trained.workdir, workdir))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["pmap", "sharded"])
def test_two_processes_equal_one(trained, tmp_path, strategy):
    workdir = tmp_path / "two"
    two_processes(trained, workdir, strategy)
    expected, found = (load_arrays(str(path), FIELDS) for path in (trained.workdir, workdir))
    for name in ("params", "ema"):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), found[name], expected[name])
    assert int(found["step"]) == int(expected["step"]) == 6
    assert (workdir / "report.md").exists()


@pytest.mark.slow
def test_two_processes_of_two_devices_equal_one_of_four(tmp_path):
    """The rest of the table, all tasks and four processes, is in benchmarks/processes.md."""
    rows = processes.run(tmp_path, minutes=5, stages=("tokenizer", "mask_grpo"), counts=(2,))
    assert [(row["task"], row["strategy"]) for row in rows] == [
        *[("tokenizer", "pmap"), ("mask_grpo", "pmap"), ("tokenizer", "sharded"), ("mask_grpo", "sharded")]
    ]
    assert max(row["parameters"] for row in rows) < 1e-6
    assert [row["tokens_equal"] for row in rows] == [None, True, None, True]
