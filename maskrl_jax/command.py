"""What the commands share: their flags, quiet libraries, and a user's mistake told in one line.

Exit codes: 0 done; 1 a user's mistake or a failure; 42 another process of the run, or the coordinator, was lost or did
not come: start the same command again; 130 and 143 stopped by SIGINT and SIGTERM with the state saved, likewise.
"""

import re
import signal
import sys
import warnings
from collections.abc import Callable, Sequence

from absl import app, flags, logging

from maskrl_jax.errors import UserError

DONE, FAILED, LOST, PREEMPTED = 0, 1, 42, 143
# What a mistyped flag or a config file that cannot be read raises.
MISTYPED = (flags.Error, UserError, AttributeError, ImportError, KeyError, OSError, SyntaxError, TypeError, ValueError)


def run(
    work: Callable[..., None],
    check: Callable[[], None] = lambda: None,
    mistakes: tuple[type[Exception], ...] = (),
    arguments: int = 0,
) -> None:
    """Parse the flags, `check` them, and call `work` with the `arguments` that are no flags.

    A UserError, and of `work` also what is in `mistakes`, is one line on stderr; so is Ctrl-C, with exit code 130.
    """

    def main(argv: list[str]) -> None:
        logging.set_verbosity(logging.WARNING)
        warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
        try:
            work(*argv[1:])
        except (UserError, *mistakes) as error:
            sys.exit(f"error: {_reason(error)}")
        except ImportError as error:
            if not isinstance(error.__cause__, ModuleNotFoundError):
                raise
            # A library's advice, such as to install the driver of a bucket.
            sys.exit(f"error: {_reason(error)} ({error.__cause__})")
        except KeyboardInterrupt:
            print("stopped; what is written stays", file=sys.stderr)
            sys.exit(128 + signal.SIGINT)

    def parse(argv: Sequence[str]) -> list[str]:
        try:
            rest = flags.FLAGS(argv)
            if len(rest) != 1 + arguments:
                wanted = f"{arguments} argument beside the flags" if arguments else "flags only"
                raise UserError(f"expected {wanted}, got {' '.join(rest[1:])!r}; see --help")
            check()
            return rest
        except MISTYPED as error:
            sys.exit(f"error: {_reason(error)}")

    app.run(main, flags_parser=parse)


def _reason(error: Exception) -> str:
    if isinstance(error, UserError):
        return str(error)
    while error.args and isinstance(error.args[0], Exception):
        error = error.args[0]
    if isinstance(error, SyntaxError):
        return f"{error.filename}, line {error.lineno}: {error.msg}"
    # str of an error about a key is a quoted string.
    text = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
    # A config that refuses its argument, or is no file, comes wrapped in the flag's own story.
    text = re.split(r"\nValueError: |\[Errno \d+\] ", text)[-1]
    text = f"the config has no key {text}" if isinstance(error, KeyError) else text
    return " ".join(text.split())
