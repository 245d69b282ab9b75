"""Stop one of two processes that train together at a random moment, start both again, compare with a run in peace.

    python benchmarks/kill_processes.py --out=runs/kill_processes -- --config=configs/tokenizer.py:smoke

What follows `--` goes to maskrl_jax.main. In every round SIGTERM or SIGKILL hits process 0 or 1, drawn with the moment;
then the same commands run to the end. Writes benchmarks/kill_processes.json and .md; exit code 1 where a state differs
bit for bit, where an exit code is none of those documented, or where a process outlived the signal by a minute.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

import jax
import numpy as np

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.kill_resume import FIELDS  # noqa: E402
from maskrl_jax.checkpoint import load_arrays  # noqa: E402
from maskrl_jax.command import DONE, LOST, PREEMPTED  # noqa: E402

PROCESSES, DEVICES = 2, 2
ATTEMPTS = 3  # on a machine that is busy, a process may come too late for another
LIMIT = 60  # seconds that a process may outlive the signal to another


@dataclasses.dataclass
class Round:
    """What happened in one round; `codes` of both processes, after the signal; a process it kills has minus it."""

    number: str
    victim: int
    moment: float
    trained: bool
    codes: list[int]
    seconds: float
    lost: int  # how often the run that resumed had to be started again
    difference: float = 0.0

    def ends_well(self) -> bool:
        """Whether all ended in time with a documented code and the resumed run's state is that of a run in peace."""
        # Whom a signal kills before it has joined, or kill -9 at any time, ends by the signal itself.
        own = {DONE, PREEMPTED, LOST, -signal.Signals[self.number]}
        other = {DONE, PREEMPTED, LOST}
        fine = self.codes[self.victim] in own and self.codes[1 - self.victim] in other
        return fine and self.seconds < LIMIT and self.difference == 0


def start(command: Sequence[str], log: pathlib.Path) -> list[subprocess.Popen]:
    """Start all processes of a run, on a free port; what they say goes to <log>.<process>."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    flags = ["--distributed", f"--coordinator_address={address}", f"--num_processes={PROCESSES}"]
    flags += ["--startup_timeout=30"]
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": str(DEVICES), "JAX_PLATFORMS": "cpu"}
    processes = []
    for i in range(PROCESSES):
        with open(f"{log}.{i}", "w") as file:
            one = [*command, *flags, f"--process_id={i}"]
            processes.append(subprocess.Popen(one, env=environment, stdout=file, stderr=subprocess.STDOUT))
    return processes


def finish(command: Sequence[str], log: pathlib.Path) -> int:
    """Run a command in all processes to its end, again where that is asked for; return how often it was lost.

    RuntimeError with the log where it failed.
    """
    for lost in range(ATTEMPTS):
        codes = [process.wait(timeout=600) for process in start(command, log)]
        if not any(codes):
            return lost
        if LOST not in codes:
            break
    raise RuntimeError(f"{codes}: " + "\n".join(pathlib.Path(f"{log}.{i}").read_text() for i in range(PROCESSES)))


def stop_one(processes: Sequence[subprocess.Popen], number: int, victim: int, after: float) -> tuple[list[int], float]:
    """Signal a process after some seconds; return the exit codes and the seconds until the last one ended."""
    time.sleep(after)
    processes[victim].send_signal(number)
    began = time.monotonic()
    for process in processes:
        try:
            process.wait(timeout=max(2 * LIMIT - (time.monotonic() - began), 0))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    return [process.returncode for process in processes], time.monotonic() - began


def difference(one: str, other: str) -> float:
    """Largest difference of the newest checkpoints of two workdirs."""
    trees = [load_arrays(workdir, FIELDS) for workdir in (one, other)]
    gaps = jax.tree.map(lambda a, b: np.abs(np.float64(a) - np.float64(b)).max(initial=0), *trees)
    return float(max(jax.tree.leaves(gaps)))


def rounds(command: Sequence[str], out: pathlib.Path, count: int, seed: int) -> list[Round]:
    """Play the rounds; parents are trained, and programs compiled, by a run before them."""
    out.mkdir(parents=True, exist_ok=True)
    straight, seconds = [f"{out / 'straight'}", f"{out / 'timed'}"], 0.0
    for workdir in straight:
        began = time.monotonic()
        finish([*command, f"--workdir={workdir}"], out / "straight.log")
        seconds = time.monotonic() - began
    print(f"a run in peace takes {seconds:.0f} s", flush=True)
    draw, played = random.Random(seed), []
    for i in range(count):
        workdir, log = out / f"round{i}", out / f"round{i}.log"
        again = [*command, f"--workdir={workdir}"]
        number, victim = draw.choice([signal.SIGTERM, signal.SIGKILL]), draw.randrange(PROCESSES)
        after = draw.uniform(0, seconds)
        codes, spent = stop_one(start(again, log), number, victim, after)
        trained = "parameters, step" in pathlib.Path(f"{log}.0").read_text()
        lost = finish(again, out / f"round{i}.resumed")
        one = Round(number.name, victim, after, trained, codes, spent, lost, difference(straight[0], str(workdir)))
        print(one, "" if one.ends_well() else "NOT WELL", flush=True)
        played.append(one)
    return played


def table(played: Sequence[Round], command: str) -> str:
    """Lay the rounds out."""
    lines = [
        f"`{command}`: {PROCESSES} processes of {DEVICES} devices; a negative exit code is the signal that killed it.",
        "",
        "| signal | to process | after | had begun to train | exit codes | seconds until all had ended | started again | largest difference after resuming |",
        "|---|---:|---:|---|---|---:|---:|---:|",
    ]
    for one in played:
        codes = ", ".join(map(str, one.codes))
        lines.append(
            f"| {one.number} | {one.victim} | {one.moment:.1f} s | {'yes' if one.trained else 'no'} | {codes} | "
            f"{one.seconds:.1f} | {1 + one.lost} x | {one.difference:g} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("flags", nargs="+")
    args = parser.parse_args()
    command = [sys.executable, "-m", "maskrl_jax.main", f"--store={args.out / 'stages'}", *args.flags]
    played = rounds(command, args.out, args.rounds, args.seed)
    place = ROOT / "benchmarks" / "kill_processes"
    place.with_suffix(".json").write_text(json.dumps([dataclasses.asdict(one) for one in played], indent=1) + "\n")
    place.with_suffix(".md").write_text(table(played, " ".join(["maskrl_jax.main", *args.flags])))
    sys.exit(not all(one.ends_well() for one in played))


if __name__ == "__main__":
    main()
