"""The command line with the toy stage added, for tests that need a process of their own."""

import os
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent))
sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import jax  # noqa: E402

from maskrl_jax import main, runner  # noqa: E402

if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", int(os.environ.get("TOY_DEVICES", "2")))
    runner.TASKS["toy"] = "toy_task"
    main.cli()
