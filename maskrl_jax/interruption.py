"""Stop between two steps, so that the state can be saved, when a signal asks to stop."""

import itertools
import signal
import threading
from collections.abc import Callable

import jax
from jax.experimental import multihost_utils

# The coordination service stops all processes at one number. Steps will not do: the next stage counts from 0 again.
_CALLS = itertools.count()


class Interruption:
    """Note SIGTERM and SIGINT, to be acted on between two steps or, inside `attempt`, immediately.

    Under `jax.distributed` the coordination service watches SIGTERM, and all processes stop at one step.
    """

    def __init__(self):
        self._signal, self._earlier, self._at_once = 0, {}, False
        self._together = jax.distributed.is_initialized()

    def __enter__(self):
        if not self._together and threading.current_thread() is threading.main_thread():
            self._earlier = {s: signal.signal(s, self._note) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_):
        for number, handler in self._earlier.items():
            signal.signal(number, handler)

    def _note(self, number, _):
        if self._signal and number == signal.SIGINT:
            raise KeyboardInterrupt  # asked twice: do not wait for the step to end
        self._signal = number
        if self._at_once:
            raise _AtOnceError

    def attempt(self, work: Callable[[], None]) -> None:
        """Call work, unless a signal has come, and abandon it when one does.

        For what may take long and changes nothing that is saved: a cloud machine gets half a minute.
        """
        if self._signal:
            return
        try:
            self._at_once = True
            work()
            self._at_once = False
        except _AtOnceError:
            pass
        finally:
            self._at_once = False

    def requested(self) -> int:
        """Return the signal that asks to stop now, 0 if none does; all processes ask equally often."""
        if self._together and multihost_utils.reached_preemption_sync_point(next(_CALLS)):
            return signal.SIGTERM
        return self._signal


class _AtOnceError(Exception):
    """Carries a signal out of `Interruption.attempt`."""
