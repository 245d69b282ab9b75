"""Train the stage that a config describes: `python -m maskrl_jax.main --config=configs/speed_rl.py`."""

import os
import sys

from absl import flags
from ml_collections import config_flags

from maskrl_jax import cluster, command
from maskrl_jax.errors import UserError

CONFIG = config_flags.DEFINE_config_file("config", None, "config file, or file:argument", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "where this run goes; by default runs/<config>[-<argument>]")
STORE = flags.DEFINE_string("store", "runs/stages", "where trained parents go, shared by all runs")
DRY_RUN = flags.DEFINE_string("dry_run", None, "compile only, for the local devices or e.g. v5e:4x4")
DISTRIBUTED = flags.DEFINE_bool("distributed", False, "join the other processes of a cluster")
COORDINATOR = flags.DEFINE_string(
    "coordinator_address", None, "host:port of process 0, if the cluster does not tell; or the variable MASKRL_<FLAG>"
)
NUM_PROCESSES = flags.DEFINE_integer(
    "num_processes", None, "processes, if the cluster does not tell; or the variable MASKRL_<FLAG>"
)
PROCESS_ID = flags.DEFINE_integer(
    "process_id", None, "this process' number, if the cluster does not tell; or the variable MASKRL_<FLAG>"
)
STARTUP_TIMEOUT = flags.DEFINE_integer("startup_timeout", 300, "seconds to wait for the other processes", 1)


def check() -> None:
    """Raise where there is no config, or its file could not be loaded, which it says only when it is used."""
    if CONFIG.value is None:
        raise UserError("expected --config=<file>; see --help")
    _ = "task" in CONFIG.value
    _place()


def _place():
    given = {flag.name: flag.value for flag in (COORDINATOR, NUM_PROCESSES, PROCESS_ID)}
    return cluster.place(given, os.environ, DISTRIBUTED.value)


def main() -> None:
    """Run what the flags say."""
    if DISTRIBUTED.value:
        cluster.join(_place(), STARTUP_TIMEOUT.value)
    from maskrl_jax import dry_run, runner, stored  # late: a mistyped flag need not wait, a cluster is joined first

    runner.compilation_cache(STORE.value)
    if DRY_RUN.value is not None:
        runner.check_keys(CONFIG.value)
        dry_run.run(CONFIG.value, runner.phases, DRY_RUN.value)
        return
    file = config_flags.get_config_filename(flags.FLAGS["config"])
    with cluster.together():
        runner.run(CONFIG.value, WORKDIR.value or stored.default_workdir(file), STORE.value)


def cli() -> None:
    """Run as a program; a bare --dry_run stands for the local devices."""
    sys.argv = ["--dry_run=" if argument == "--dry_run" else argument for argument in sys.argv]
    command.run(main, check)


if __name__ == "__main__":
    cli()
