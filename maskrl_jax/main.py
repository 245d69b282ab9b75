"""Train the stage that a config describes: `python -m maskrl_jax.main --config=configs/speed_rl.py`."""

import sys

from absl import app, flags, logging
from ml_collections import config_flags

from maskrl_jax import parallel
from maskrl_jax.errors import UserError

CONFIG = config_flags.DEFINE_config_file("config", None, "config file, or file:argument", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "where this run goes; by default runs/<config>[-<argument>]")
STORE = flags.DEFINE_string("store", "runs/stages", "where trained parents go, shared by all runs")
DRY_RUN = flags.DEFINE_string("dry_run", None, "compile only, for the local devices or e.g. v5e:4x4")
DISTRIBUTED = flags.DEFINE_bool("distributed", False, "join the other processes of a cluster")
COORDINATOR = flags.DEFINE_string("coordinator", None, "host:port of process 0, if the cluster does not tell")
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "processes, if the cluster does not tell")
PROCESS_ID = flags.DEFINE_integer("process_id", None, "this process' number, if the cluster does not tell")


def parse(argv: list[str]) -> list[str]:
    """Parse the flags, where a bare --dry_run stands for the local devices; bad input is one line, exit 1."""
    try:
        rest = flags.FLAGS(["--dry_run=" if arg == "--dry_run" else arg for arg in argv])
        if len(rest) > 1 or CONFIG.value is None:
            raise UserError(f"expected --config=<file> and flags only, got {rest[1:]}; see --help")
        _ = "task" in CONFIG.value  # a file that could not be loaded says so only when it is used
        return rest
    except (flags.Error, UserError, AttributeError, KeyError, OSError, TypeError, ValueError) as error:
        while error.args and isinstance(error.args[0], Exception):
            error = error.args[0]
        # The text of args, since str of an error about a key is a quoted string; of a config that refuses its
        # argument, the flag gives the traceback.
        text = str(error.args[0] if error.args else error).rpartition("\nValueError: ")[2]
        text = f"the config has no key {text}" if isinstance(error, KeyError) else text
        sys.exit(f"error: {' '.join(text.split())}")


def main(_: list[str]) -> None:
    """Run what the flags say; a mistake of the user is one line on stderr and exit code 1."""
    logging.set_verbosity(logging.WARNING)
    try:
        if DISTRIBUTED.value:
            parallel.join(COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value)
        from maskrl_jax import dry_run, runner, stored  # late: a mistyped flag need not wait, a cluster is joined first

        runner.compilation_cache(STORE.value)
        if DRY_RUN.value is not None:
            dry_run.run(CONFIG.value, runner.phases, DRY_RUN.value)
            return
        file = config_flags.get_config_filename(flags.FLAGS["config"])
        runner.run(CONFIG.value, WORKDIR.value or stored.default_workdir(file), STORE.value)
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
