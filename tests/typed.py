"""Commands as a user types them, in a process of their own."""

import os
import pathlib
import subprocess
import sys

SETTINGS = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "JAX_NUM_CPU_DEVICES": "1"}  # as tests/conftest.py
ROOT = pathlib.Path(__file__).parent.parent


def typed(module, workdir, *arguments):
    """Run a command in a process of its own; return (exit code, stdout, stderr)."""
    done = subprocess.run(
        [sys.executable, "-m", f"maskrl_jax.{module}", f"--workdir={workdir}", *arguments],
        env={**os.environ, **SETTINGS},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    return done.returncode, done.stdout, done.stderr
