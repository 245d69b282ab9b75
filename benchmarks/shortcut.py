"""The feature shortcut against fewer steps of its base at equal measured time (specs/shortcut.md section 10).

python benchmarks/shortcut.py --only=default    # the claim, five seeds
python benchmarks/shortcut.py --only=policy --seeds=0 --seeds=1 --seeds=2   # on policies of Speed-RL
XLA_PYTHON_CLIENT_PREALLOCATE=false python benchmarks/shortcut.py --jobs=16 --out=benchmarks/shortcut_arms  # every arm

A run trains a shortcut on the one base of the store and measures it with a seed of sampling of its own, beside the base
with the same prompts and keys. What is finished is in <out>.json with a number a prompt, and is not done again.
A shortcut step counts as the share c of a full one that it takes on the clock; a budget is compared with the base at
the fewest measured steps that take no less, by count and by clock. Runs beside each other (--jobs) are not timed: their
table compares equal numbers of full steps alone. Standard errors are over seeds.
"""

import functools
import json
import pathlib
import sys

import numpy as np
from absl import app, flags

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import shortcut_table, side_by_side  # noqa: E402
from maskrl_jax import paths  # noqa: E402
from maskrl_jax.evaluate import measure  # noqa: E402

# Every number of steps that a budget may be compared with, so that all seeds have the same points of the base.
STEPS = {"evaluation.steps": "(6,8,9,10,11,12,13,14,15,16,24)"}
LIKE_BASE = STEPS | {"curve.num_steps": 24, "curve.budgets": "(5,8,11)"}  # as many steps as the reference of the base
ALONE = LIKE_BASE | {"curve.beside": "()"}  # what stands beside the shortcut is measured once
PLAIN = ALONE | {"loss.kl": 0.0}  # the published loss, on which every other change is measured alone
SHORT = {"curve.num_steps": 16, "curve.budgets": "(4,6,8)"}
ARMS = {
    "default": STEPS | {"curve.beside": "('frozen','linear')"},
    "N of 24": LIKE_BASE | {"curve.beside": "('frozen','linear','calibrated','adaptive')"},
    "policy": ALONE,
    "squared error alone": PLAIN,
    "no_ca": PLAIN | {"model.controls": False},
    "chain of 3": PLAIN | {"loss.chain": 3},  # extension 1
    "mixed N": PLAIN | {"teacher.num_steps": "(24,16,12)"},  # extension 2
    "N of 16": PLAIN | SHORT,
    "mixed N, N of 16": PLAIN | SHORT | {"teacher.num_steps": "(24,16,12)"},
    "all positions": PLAIN | {"loss.positions": "all"},
    "no local mixing": PLAIN | {"model.local_mixing": False},
    "keys and values as they are": PLAIN | {"model.kv_prenorm": False},
    "two blocks": PLAIN | {"model.n_block": 2},
    "policy, squared error alone": PLAIN,
}
# The shortcut that an arm's is compared with.
AGAINST = dict.fromkeys(ARMS, "squared error alone") | {"policy": "N of 24", "mixed N, N of 16": "N of 16"}
del AGAINST["default"], AGAINST["squared error alone"], AGAINST["N of 16"]
POLICIES = ("policy", "policy, squared error alone")
# Of runs beside each other; large batches would change what an adaptive refresh does.
UNTIMED = {"evaluation.steps": "(24,)", "evaluation.batch_size": 192, "curve.timing_runs": 0}
UNTIMED_BESIDE = {
    "N of 24": {"curve.beside": "()"},
    "squared error alone": {"curve.beside": "('frozen','linear','calibrated')"},
}
SEEDS = flags.DEFINE_multi_integer("seeds", [0, 1, 2, 3, 4], "seed of a run, once for each; the base is shared")
ONLY = flags.DEFINE_multi_enum("only", None, list(ARMS), "train this arm; the table holds what is finished")
JOBS = flags.DEFINE_integer("jobs", 1, "runs at a time, none of them timed; each prints to <run>.log", lower_bound=1)
RUNS = flags.DEFINE_string("runs", "runs/shortcut-arms", "where the runs go")
STORE = flags.DEFINE_string("store", "runs/stages", "where trained parents are")
OUT = flags.DEFINE_string("out", "benchmarks/shortcut", "result files without their ending")
METRICS = ("graded", "strict", "diversity")
EVALUATION_SEED = 17  # of seed 0; each further seed has the next


def main(_: list[str]) -> None:
    """Train what is missing, write after every run."""
    out = (ROOT / OUT.value).with_suffix(".json")
    out.parent.mkdir(parents=True, exist_ok=True)
    done = json.loads(out.read_text()) if out.exists() else {"runs": {}}
    runs = side_by_side.Runs(JOBS.value)

    def keep(name: str, workdir: pathlib.Path) -> None:
        done["runs"][name] = _numbers(workdir)
        paths.write(str(out), json.dumps(done) + "\n")

    wanted = {f"{arm}, seed {seed}": (arm, seed) for seed in SEEDS.value for arm in ONLY.value or ARMS}
    missing = {name: functools.partial(_train, runs, *of) for name, of in wanted.items() if name not in done["runs"]}
    failed = runs.all(missing, keep)
    if done["runs"]:
        shortcut_table.write(done["runs"], list(ARMS), AGAINST, done.get("note", ""), out.with_suffix(".md"))
    if failed:
        sys.exit(failed)


def _train(runs: side_by_side.Runs, arm: str, seed: int) -> pathlib.Path:
    kept = pathlib.Path(OUT.value).stem  # timed and untimed runs have configs of their own
    workdir = ROOT / RUNS.value / kept / f"{arm.replace(' ', '_').replace(',', '')}-seed{seed}"
    changes = ARMS[arm] | {"seed": seed, "evaluation.seed": EVALUATION_SEED + seed, "evaluation.timing_repeats": 0}
    if JOBS.value > 1:
        changes |= UNTIMED | UNTIMED_BESIDE.get(arm, {})
    config = "configs/shortcut.py"
    if arm in POLICIES:
        config, changes["parents.speed_rl.seed"] = f"{config}:speed_rl", seed
    return runs.train(config, workdir, STORE.value, changes)


def _numbers(workdir: pathlib.Path) -> dict:
    """What is kept of a run: every point with a number a prompt, times, costs, the length of training."""
    results, timed = json.loads((workdir / "results.json").read_text()), JOBS.value == 1
    points = []
    for plain in results["points"]:
        point = measure.load_point(workdir / "points", plain)
        values = {name: np.round(point.per_prompt(name), 4).tolist() for name in METRICS}
        kept = {"system": point.system, "label": point.label, "setting": point.setting}
        points.append(kept | {"calls": point.calls_mean if timed else None, "frechet": point.frechet} | values)
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    updates = [line for line in lines if "train/mse" in line]
    steps = np.diff([0, *(line["step"] for line in updates)])
    train_seconds = float(sum(line["perf/step_time"] * n for line, n in zip(updates, steps, strict=True)))
    return {
        "points": points,
        "latencies": results["latencies"] if timed else [],
        "train_seconds": train_seconds if timed else None,
        "mse": updates[-1]["train/mse"] / updates[-1]["train/mse_frozen"],
        "told": {name: results["facts"][name] for name in ("a step's cost", "FLOPs", "training")},
        "commit": results["facts"]["commit"],
        "machine": results["facts"]["machine"],
    }


if __name__ == "__main__":
    app.run(main)
