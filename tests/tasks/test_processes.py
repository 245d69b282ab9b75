"""Tiny speed_rl in processes of its own: a signal, and two processes that train together."""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from maskrl_jax.checkpoint import load_arrays

TESTS = pathlib.Path(__file__).parent.parent
FIELDS = ("step", "params", "opt_state", "ema", "extra", "bad_steps", "bad_total")
# As in this process (conftest.QUICK), with one device.
SETTINGS = {
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_NUM_CPU_DEVICES": "1",
}


def start(trained, workdir, *arguments, program="tiny_main.py"):
    flags = [f"--config={TESTS / 'tiny.py'}:speed_rl", f"--workdir={workdir}", f"--store={trained.store}", *arguments]
    return subprocess.Popen(
        [sys.executable, str(TESTS / program), *flags],
        env={**os.environ, **SETTINGS},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


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
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    cluster = ["--distributed", f"--coordinator=localhost:{port}", "--num_processes=2", f"--config.parallel={strategy}"]
    workdir = tmp_path / "two"
    quick = ["--config.evaluation.timing_repeats=0"]
    processes = [start(trained, workdir, *cluster, *quick, f"--process_id={i}") for i in range(2)]
    for process in processes:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    expected, found = (load_arrays(str(path), FIELDS) for path in (trained.workdir, workdir))
    for name in ("params", "ema"):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), found[name], expected[name])
    assert int(found["step"]) == int(expected["step"]) == 6
    assert (workdir / "report.md").exists()
