"""The one exception that stands for a mistake of the user, not of the program."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Say in one line what is wrong and what to do; `main` prints it without a traceback and exits 1."""


def unknown(kind: str, name: str, known: Iterable[str]) -> UserError:
    """Build the error for a name that does not exist, with the nearest name that does."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"choose one of: {', '.join(known) or '(none)'}"
    return UserError(f"unknown {kind} {name!r}; {hint}")
