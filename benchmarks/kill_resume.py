"""Kill a training run at random moments, resume it each time, and compare with an undisturbed run.

    python benchmarks/kill_resume.py --out=runs/kill --kills=20 -- --config=configs/tokenizer.py:smoke

What follows `--` goes to maskrl_jax.main. Prints the moments and says whether the final states are equal bit
for bit (exit code 1 if they are not, or if no kill hit). Parents are trained once, by the undisturbed run, and shared.
"""

import argparse
import os
import pathlib
import random
import subprocess
import sys
import time
from collections.abc import Sequence

import jax
import numpy as np

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from maskrl_jax.checkpoint import load_arrays  # noqa: E402

FIELDS = ("step", "params", "opt_state", "ema", "extra", "bad_steps", "bad_total")


def run_once(command: Sequence[str]) -> float:
    """Run a command to its end and return the seconds that it trained for."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        began = _training_begins(process)
        process.stdout.read()
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} failed with {process.returncode}")
    return time.monotonic() - began


def run_killed(command: Sequence[str], after: float) -> bool:
    """Run a command and kill -9 it `after` seconds into training; say if it was still running then."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        _training_begins(process)
        time.sleep(after)
        running = process.poll() is None
        process.kill()
    return running


def _training_begins(process):
    for line in process.stdout:
        if "parameters, step" in line:
            break
    return time.monotonic()


def same_state(one: str, other: str) -> bool:
    """Say if the newest checkpoints of two workdirs are equal bit for bit."""
    trees = [load_arrays(workdir, FIELDS) for workdir in (one, other)]
    shapes = [jax.tree.structure(tree) for tree in trees]
    leaves = zip(*(jax.tree.leaves(tree) for tree in trees), strict=True)
    return shapes[0] == shapes[1] and all(np.array_equal(a, b) for a, b in leaves)


def kill_and_resume(command: Sequence[str], out: str, kills: int, seed: int) -> tuple[bool, int]:
    """Return whether a run killed up to `kills` times ends in the state of one that was not, and how many kills hit.

    The moments are drawn from [0, 1.1 s) after training begins, s being the undisturbed time / kills (at least
    1 s), so that the run lasts through most kills; some lives save nothing, some several times.
    """
    straight, killed = os.path.join(out, "straight"), os.path.join(out, "killed")
    run_once([*command, f"--workdir={straight}"])  # trains the parents and fills the compilation cache
    seconds = run_once([*command, f"--workdir={os.path.join(out, 'timed')}"])
    draw, hits = random.Random(seed), 0
    for _ in range(kills):
        after = draw.uniform(0, 1.1 * max(seconds / kills, 1.0))
        hit = run_killed([*command, f"--workdir={killed}"], after)
        hits += hit
        print(f"killed {after:.2f} s into training" if hit else "had finished before the kill", flush=True)
    run_once([*command, f"--workdir={killed}"])
    print(f"{hits} of {kills} kills hit a running training", flush=True)
    return same_state(straight, killed), hits


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("flags", nargs="+")
    args = parser.parse_args()
    store = f"--store={os.path.join(args.out, 'stages')}"
    command = [sys.executable, "-m", "maskrl_jax.main", store, *args.flags]
    equal, hits = kill_and_resume(command, args.out, args.kills, args.seed)
    print("same state as the undisturbed run" if equal else "DIFFERENT from the undisturbed run")
    sys.exit(not (equal and hits))


if __name__ == "__main__":
    main()
