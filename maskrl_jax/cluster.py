"""The processes of a run: how one finds the others, and how it ends when one of them is lost.

Flags come before the environment (MASKRL_COORDINATOR_ADDRESS, MASKRL_NUM_PROCESSES, MASKRL_PROCESS_ID), and both
before what the cluster itself tells (Cloud TPU, Slurm, Open MPI; see `jax.distributed.initialize`).
"""

import contextlib
import ctypes
import dataclasses
import os
import re
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from maskrl_jax.command import DONE, FAILED, LOST
from maskrl_jax.errors import UserError

FIELDS = ("coordinator_address", "num_processes", "process_id")
HEARTBEAT = 30  # seconds without one until a process counts as lost
FAREWELL = 10  # seconds that a process waits for the others at its end
# What JAX, its transports and its coordination service say of a peer that is gone.
LOST_SIGNS = (
    *("Gloo", "NCCL", "Connection closed by peer", "Connection reset by peer", "Socket closed", "heartbeat"),
    *("coordination", "CoordinationService", "BarrierError", "UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED"),
)


@dataclasses.dataclass(frozen=True)
class Place:
    """Say where process 0 listens (host:port), how many processes there are, and which one this is; None: unknown."""

    coordinator_address: str | None = None
    num_processes: int | None = None
    process_id: int | None = None

    def __post_init__(self):
        missing = [name for name in FIELDS if getattr(self, name) is None]
        if missing and len(missing) < len(FIELDS):
            raise UserError(
                f"{_flags(missing)} missing; give {_flags(FIELDS)} together, or none where the cluster tells"
            )
        if missing:
            return
        host, _, port = self.coordinator_address.rpartition(":")
        if not re.fullmatch(r"[^\s/]+", host) or not port.isdecimal() or not 0 < int(port) < 2**16:
            raise UserError(
                f"--coordinator_address={self.coordinator_address} is not host:port of process 0, a port below 65536"
            )
        if self.num_processes < 1 or not 0 <= self.process_id < self.num_processes:
            raise UserError(
                f"--process_id={self.process_id} is not one of --num_processes={self.num_processes}; they count from 0"
            )


def place(flags: Mapping[str, Any], environment: Mapping[str, str], distributed: bool) -> Place | None:
    """Read a process' place from flags and environment; None for a run of one process. UserError if they disagree."""
    given = {name: value for name, value in flags.items() if value is not None}
    if not distributed:
        if given:
            raise UserError(f"{_flags(given)} without --distributed; add it, or leave the flag out")
        return None
    found = {name: environment.get(f"MASKRL_{name.upper()}") or None for name in FIELDS}
    for name in FIELDS[1:]:
        if found[name] is not None and name not in given:
            try:
                found[name] = int(found[name])
            except ValueError as error:
                raise UserError(f"MASKRL_{name.upper()}={found[name]} is not a number") from error
    return Place(**found | given)


def join(here: Place, timeout: int) -> None:
    """Join the other processes, waiting `timeout` seconds for them; say which process this is.

    Raises UserError where there is no cluster. Exits with LOST where others are missing: they may still come.
    """
    # In front of JAX's own end of waiting, which is an abort that names nothing.
    watch = threading.Timer(timeout, _give_up, (here, timeout))
    watch.daemon = True
    watch.start()
    try:
        if here.coordinator_address:
            _look_at_address(here)
        jax.distributed.initialize(
            **dataclasses.asdict(here),
            initialization_timeout=timeout + HEARTBEAT,
            heartbeat_timeout_seconds=HEARTBEAT,
            shutdown_timeout_seconds=FAREWELL,
        )
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"--distributed found no cluster to join ({reason}); give {_flags(FIELDS)}") from error
    finally:
        watch.cancel()
    if here.num_processes not in (None, jax.process_count()):
        raise UserError(
            f"--num_processes={here.num_processes} here, and {jax.process_count()} for process 0; give all the same"
        )
    _exit_on_abort(_lost("the coordinator or another process stopped answering"), LOST)
    own, all_ = jax.local_device_count(), jax.device_count()
    print(f"process {jax.process_index()} of {jax.process_count()}, {own} devices of {all_}", flush=True)


def _look_at_address(here: Place) -> None:
    """Say what is wrong with the coordinator's address as soon as it can be known."""
    host, _, port = here.coordinator_address.rpartition(":")
    try:
        socket.getaddrinfo(host.strip("[]"), port)
    except UnicodeError as error:
        raise UserError(f"--coordinator_address={here.coordinator_address}: {host} is no name of a machine") from error
    except socket.gaierror:  # the name of a Pod comes with the Pod
        print(f"warning: the name {host} has no address yet; waiting for it", file=sys.stderr, flush=True)
    if here.process_id == 0 and "JAX_COORDINATOR_BIND_ADDRESS" not in os.environ:
        # As JAX will: at all addresses, also those of IPv4.
        both = socket.has_dualstack_ipv6()
        with socket.socket(socket.AF_INET6 if both else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if both:
                probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            try:
                probe.bind(("", int(port)))
            except OSError as error:
                reason = os.strerror(error.errno)
                raise UserError(
                    f"process 0 cannot listen at port {port} ({reason}); give all another port, unless two are number 0"
                ) from error


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Exit with LOST and one line where the work inside fails because another process is gone."""
    code = DONE
    try:
        yield
    except BaseException as error:
        if jax.distributed.is_initialized() and lost(error):
            sys.stdout.flush()
            os.write(2, _lost(" ".join(str(error).split())[:160]))
            os._exit(LOST)  # at once: an ordinary exit waits for the others
        code = _code(error)
        raise
    finally:
        # The others may be gone by the time that this one says farewell, which is no failure any more.
        _exit_on_abort(b"", code)


def _code(error: BaseException) -> int:
    if isinstance(error, SystemExit) and isinstance(error.code, int):
        return error.code
    return 128 + signal.SIGINT if isinstance(error, KeyboardInterrupt) else FAILED


def lost(error: BaseException | None) -> bool:
    """Say if an error, or one that it came from, tells of a process that is gone."""
    while error is not None:
        if isinstance(error, jax.errors.JaxRuntimeError) and any(sign in str(error) for sign in LOST_SIGNS):
            return True
        error = error.__cause__ or error.__context__
    return False


def _lost(reason: str) -> bytes:
    who = f"process {jax.process_index()} of {jax.process_count()}"
    return (
        f"error: {who} lost another one ({reason}); all end, and the same command on each of them resumes "
        f"(exit code {LOST})\n"
    ).encode()


def _exit_on_abort(line: bytes, code: int) -> None:
    """Turn the abort by which JAX's runtime ends a process that lost the others into a line and an exit code."""
    if not jax.distributed.is_initialized():
        return
    _on_abort[:] = [ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda _: (os.write(2, line), os._exit(code)))]
    # Not signal.signal, whose handlers wait for the main thread: after an abort it never runs again.
    ctypes.pythonapi.PyOS_setsig(signal.SIGABRT, _on_abort[0])


_on_abort = []  # keeps the handler alive


def _give_up(here: Place, timeout: int) -> None:
    known = here.coordinator_address is not None
    port = int(here.coordinator_address.rpartition(":")[2]) if known else 0
    advice = "see that all were started with the same address and number, and that none ended with an error"
    if known and here.process_id:
        waited = f"for the coordinator at {here.coordinator_address} and the others"
        advice += "; that this machine reaches the address"
    elif known and _connected(port):
        missing = here.num_processes - _connected(port)
        waited = f"for {missing} of {here.num_processes} processes, which are missing"
        advice += f"; that firewalls let port {port} through"
    else:
        waited = "for the other processes"
    sys.stdout.flush()
    os.write(2, f"error: waited {timeout} s {waited}; {advice} (--startup_timeout; exit code {LOST})\n".encode())
    os._exit(LOST)


def _connected(port: int) -> int:
    """How many connections to a port of this machine are open, this process' own included; 0 where nobody tells."""
    count = 0
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(OSError), open(table) as file:
            rows = [line.split() for line in file.readlines()[1:]]
            count += sum(int(row[1].rpartition(":")[2], 16) == port and row[3] == "01" for row in rows)
    return count


def _flags(names) -> str:
    return ", ".join(f"--{name}" for name in names)
