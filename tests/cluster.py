"""Tiny stages in processes of their own."""

import os
import pathlib
import socket
import subprocess
import sys

TESTS = pathlib.Path(__file__).parent
# As in the tests' own process (tasks/conftest.QUICK), with one device.
SETTINGS = {
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_NUM_CPU_DEVICES": "1",
}


def start(trained, workdir, *arguments, program="tiny_main.py", stage="speed_rl"):
    """Start a tiny stage on the trained parents."""
    flags = [f"--config={TESTS / 'tiny.py'}:{stage}", f"--workdir={workdir}", f"--store={trained.store}", *arguments]
    return subprocess.Popen(
        [sys.executable, str(TESTS / program), *flags],
        env={**os.environ, **SETTINGS},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def two_processes(trained, workdir, strategy, stage="speed_rl"):
    """Train a tiny stage in two processes of one device each, to its end."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    flags = [
        "--distributed",
        f"--coordinator_address=localhost:{port}",
        "--num_processes=2",
        f"--config.parallel={strategy}",
    ]
    flags += ["--config.evaluation.timing_repeats=0"] if stage == "speed_rl" else []
    processes = [start(trained, workdir, *flags, f"--process_id={i}", stage=stage) for i in range(2)]
    for process in processes:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
