"""Several processes against one with as many devices: the same tokens, the same parameters, for every task.

    python benchmarks/processes.py --out=runs/processes --minutes=25

Tiny stages (tests/tiny.py) make three updates with both strategies in 2 and 4 processes of two virtual devices each, and
in one process with 4 and 8. Writes benchmarks/processes.json and .md: the largest difference of a parameter, and whether
all tokens that were rolled out are equal. What the time did not suffice for is left out; the same command goes on, and
--stages, --counts and --strategies measure a part, in a new --out anew.
"""

import argparse
import collections
import contextlib
import json
import os
import pathlib
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import jax  # noqa: E402
import numpy as np  # noqa: E402
import tiny  # noqa: E402

from maskrl_jax import checkpoint, cluster, parallel, runner  # noqa: E402
from maskrl_jax.data import shapes  # noqa: E402
from maskrl_jax.evaluate import provenance  # noqa: E402
from maskrl_jax.parallel import STRATEGIES, Parallel  # noqa: E402
from maskrl_jax.tasks.rollouts import Rollouts  # noqa: E402
from maskrl_jax.tasks.task import Context, Parent  # noqa: E402

STAGES = ("tokenizer", "maskgit", "speed_rl", "judge", "kl_vae", "shortcut", "maskfocus", "mask_grpo", "mar")
STAGES += ("marval", "marval_rl")
BELOW = ("tokenizer", "judge", "maskgit", "kl_vae", "mar", "marval")  # in an order in which each finds its parents
COUNTS, DEVICES = (2, 4), 2  # processes; devices of each
TOKENS = ("ids", "commit_step", "calls", "decision", "explored")


def updated(stage: str, strategy: str, out: pathlib.Path, devices: Sequence[jax.Device] | None = None) -> tuple:
    """(state, rollouts, config) after three updates of a tiny stage; four of marval, whose first two are of other kinds."""
    config, seen, collect = tiny.get_config(stage), [], Rollouts.collect
    read = {name: _parent(out, config.parents[name]) for name in config.parents}
    spread = Parallel(strategy, devices)
    workdir = out / "work" / stage
    workdir.mkdir(parents=True, exist_ok=True)

    def noting(self, *args):
        result = collect(self, *args)
        seen.append({name: result[0][name] for name in TOKENS if name in result[0]})
        return result

    Rollouts.collect = noting
    try:
        task = runner.build(Context(config, read, spread, str(out / "store"), str(workdir)))
        state = task.init(jax.random.key(0))
        for step in range(4 if stage == "marval" else 3):
            state, _ = task.step(state, task.batch(step))
    finally:
        Rollouts.collect = collect
    return spread.whole({"params": state.params, "ema": state.ema, "extra": state.extra}), seen, config


def _parent(out, config):
    workdir = str(out / "parents" / config.task)
    return Parent(config, *checkpoint.load_params(workdir), workdir)


def work(out: pathlib.Path, strategy: str, stages: Sequence[str]) -> None:
    """Make the updates of the stages that are not done, and leave its parameters and tokens; process 0 writes."""
    shapes.SPLIT_SIZES = tiny.SPLIT_SIZES
    parallel.FSDP_MIN_SIZE = 512  # so that tiny arrays are split, too
    place = out / f"{strategy}-{jax.device_count()}-{jax.process_count()}"
    for stage in stages:
        if (place / f"{stage}.npz").exists():
            continue
        state, seen, _ = updated(stage, strategy, out)
        if jax.process_index() == 0:
            place.mkdir(parents=True, exist_ok=True)
            arrays = {f"params/{i}": x for i, x in enumerate(jax.tree.leaves(state["params"]))}
            arrays["commit"] = np.array(provenance.commit_hash(ROOT))
            arrays |= {f"{name}/{i}": x for i, tokens in enumerate(seen) for name, x in tokens.items()}
            np.savez(place / "aside.npz", **arrays)
            os.replace(place / "aside.npz", place / f"{stage}.npz")
            print(f"{place.name} {stage}", flush=True)
        if jax.process_count() > 1:  # the others must not look for what is being written
            jax.experimental.multihost_utils.sync_global_devices(stage)


def prepare(out: pathlib.Path, stages: Sequence[str]) -> None:
    """Train what the stages build on, on one device."""
    shapes.SPLIT_SIZES = tiny.SPLIT_SIZES
    needed = {parent.task for stage in stages for parent in tiny.get_config(stage).parents.values()}
    for stage in (stage for stage in BELOW if stage in needed):
        workdir = out / "parents" / stage
        if not workdir.exists():
            state, *_ = updated(stage, "pmap", out, jax.devices()[:1])
            checkpoint.save_params(str(workdir), 3, state["ema"], state["extra"])


def start(out: pathlib.Path, flags: Sequence[str], processes: int, devices: int) -> list[subprocess.Popen]:
    """Start this script as a worker, or as several that find each other."""
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_COMPILATION_CACHE_DIR": str(out / "jax_cache"),
    }
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    started = []
    for i in range(processes):
        place = [f"--place={address},{processes},{i}"] if processes > 1 else []
        command = [sys.executable, __file__, f"--out={out}", *flags, *place]
        started.append(subprocess.Popen(command, env=environment))
    return started


def finish(started: Sequence[subprocess.Popen], until: float) -> bool:
    """Wait for workers until a time; say if all did their work."""
    try:
        return all([one.wait(timeout=max(until - time.monotonic(), 0.1)) == 0 for one in started])
    except subprocess.TimeoutExpired:
        return False
    finally:
        for one in started:
            one.kill()
            one.wait()


def compare(out: pathlib.Path) -> list[dict]:
    """One row for each task, strategy and number of processes that was measured."""
    rows = []
    for count in COUNTS:
        for strategy in STRATEGIES:
            for stage in STAGES:
                paths = [out / f"{strategy}-{count * DEVICES}-{n}" / f"{stage}.npz" for n in (1, count)]
                if all(path.exists() for path in paths):
                    rows.append({"task": stage, "strategy": strategy, "processes": count} | difference(*paths))
    return rows


def newest(rows: Sequence[dict]) -> list[dict]:
    """The last row of every task, strategy and number of processes."""
    return list({(row["processes"], row["strategy"], row["task"]): row for row in rows}.values())


def difference(one: pathlib.Path, other: pathlib.Path) -> dict:
    """How far two results are apart."""
    with np.load(one) as a, np.load(other) as b:
        assert set(a.files) == set(b.files)
        params = [name for name in a.files if name.startswith("params/")]
        tokens = [name for name in a.files if name not in (*params, "commit")]
        gap = max(np.abs(np.float64(a[name]) - np.float64(b[name])).max(initial=0) for name in params)
        equal = all(np.array_equal(a[name], b[name]) for name in tokens) if tokens else None
        return {"commit": str(b["commit"]), "parameters": float(gap), "tokens_equal": equal}


def table(rows: Sequence[dict]) -> str:
    """Lay the differences out: a row a task, a column for strategy and processes."""
    columns = [(strategy, count) for count in COUNTS for strategy in STRATEGIES]
    cells = collections.defaultdict(lambda: "not measured")
    for row in rows:
        said = {True: ", tokens equal", False: ", TOKENS DIFFER", None: ""}[row["tokens_equal"]]
        cells[row["task"], row["strategy"], row["processes"]] = f"{row['parameters']:.1e}{said}"
    lines = [
        "Largest difference of a parameter after three updates (marval: four) between several processes of two devices "
        "each and one process with as many devices; where a task rolls out tokens, whether all are equal "
        f"(`python benchmarks/processes.py`, commits {', '.join(sorted({row['commit'] for row in rows}))}).",
        "",
        "| task | " + " | ".join(f"{strategy}, {count} processes" for strategy, count in columns) + " |",
        "|---" * (1 + len(columns)) + "|",
    ]
    lines += [f"| {stage} | " + " | ".join(cells[stage, *column] for column in columns) + " |" for stage in STAGES]
    return "\n".join(lines) + "\n"


def run(
    out: pathlib.Path,
    minutes: float,
    stages: Sequence[str],
    counts: Sequence[int] = COUNTS,
    strategies: Sequence[str] = STRATEGIES,
) -> list[dict]:
    """Measure until the time is over; return the rows."""
    until, which = time.monotonic() + 60 * minutes, f"--stages={','.join(stages)}"
    if not finish(start(out, ["--prepare", which], 1, 1), until):
        raise RuntimeError("the parents were not trained; more --minutes?")
    for count in counts:
        for strategy in strategies:
            for processes in (1, count):
                for _ in range(3):  # as a launcher does: a process may be lost on a machine that is busy
                    started = start(out, [f"--strategy={strategy}", which], processes, DEVICES * count // processes)
                    if finish(started, until) or time.monotonic() > until:
                        break
    return compare(out)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--minutes", type=float, default=25)
    parser.add_argument("--stages", default=",".join(STAGES))
    parser.add_argument("--counts", default=",".join(map(str, COUNTS)))
    parser.add_argument("--strategies", default=",".join(STRATEGIES))
    parser.add_argument("--prepare", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--strategy", help=argparse.SUPPRESS)
    parser.add_argument("--place", help=argparse.SUPPRESS)
    args = parser.parse_args()
    out, stages = args.out.resolve(), args.stages.split(",")
    if args.prepare:
        prepare(out, stages)
    elif args.strategy:
        if args.place:
            address, count, number = args.place.split(",")
            cluster.join(cluster.Place(address, int(count), int(number)), 120)
        with cluster.together() if args.place else contextlib.nullcontext():
            work(out, args.strategy, stages)
    else:
        counts = [int(count) for count in args.counts.split(",")]
        rows = run(out, args.minutes, stages, counts, args.strategies.split(","))
        place = ROOT / "benchmarks" / "processes"
        rows = newest([*json.loads(place.with_suffix(".json").read_text()), *rows])
        place.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n")
        place.with_suffix(".md").write_text(table(rows))
        print(table(rows))


if __name__ == "__main__":
    main()
