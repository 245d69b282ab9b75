"""Kill the encoding of a set at random moments, start it again each time, and compare with an undisturbed run.

    python benchmarks/kill_encode.py --out=runs/kill --kills=10 -- --tokenizer=runs/tokenizer --shard_size=500

What follows `--` goes to maskrl_jax.encode. Prints the moments, and says whether the shards are the same byte for byte
(exit code 1 if they are not, or if no kill hit).
"""

import argparse
import os
import pathlib
import random
import subprocess
import sys
import time
from collections.abc import Sequence

ROOT = pathlib.Path(__file__).resolve().parent.parent


def run(command: Sequence[str], kill_after: float | None = None) -> tuple[float, bool]:
    """Run a command, or kill -9 it so many seconds after it begins to encode; (seconds of encoding, was it killed)."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        for line in process.stdout:
            if "shards to make" in line:
                break
        began = time.monotonic()
        if kill_after is not None:
            time.sleep(kill_after)
            running = process.poll() is None
            process.kill()
            return time.monotonic() - began, running
        process.stdout.read()
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} failed with {process.returncode}")
    return time.monotonic() - began, False


def contents(folder: str) -> dict[str, bytes]:
    """Every file but the locks, by name."""
    files = [path for path in pathlib.Path(folder).iterdir() if path.suffix != ".lock"]
    return {path.name: path.read_bytes() for path in files}


def kill_and_resume(flags: Sequence[str], out: str, kills: int, seed: int = 0) -> tuple[bool, int]:
    """Return whether a run killed up to `kills` times ends in the files of one that was not, and how many kills hit.

    The moments are drawn from [0, 1.2 s), s being the undisturbed time / kills, at least .7 seconds: first comes the
    compiler.
    """
    command = [sys.executable, "-m", "maskrl_jax.encode", *flags]
    straight, killed = os.path.abspath(os.path.join(out, "straight")), os.path.abspath(os.path.join(out, "killed"))
    seconds, _ = run([*command, f"--out={straight}"])
    draw, hits = random.Random(seed), 0
    for _ in range(kills):
        after = draw.uniform(0, 1.2 * max(seconds / kills, 0.7))
        _, hit = run([*command, f"--out={killed}"], after)
        there, half = (sum(name.endswith(end) for name in contents(killed)) for end in (".array_record", ".tmp"))
        hits += hit
        verdict = "killed" if hit else "finished before"
        print(f"{verdict} {after:.2f} s into encoding, {there} shards complete, {half} begun", flush=True)
    run([*command, f"--out={killed}"])
    print(f"{hits} of {kills} kills hit a running command", flush=True)
    return contents(straight) == contents(killed), hits


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("flags", nargs="+")
    args = parser.parse_args()
    equal, hits = kill_and_resume(args.flags, args.out, args.kills, args.seed)
    print("the same shards as of the undisturbed run" if equal else "DIFFERENT from the undisturbed run")
    sys.exit(not (equal and hits))


if __name__ == "__main__":
    main()
