"""The feature shortcut against fewer steps of its base at equal measured time (specs/shortcut.md section 10).

python benchmarks/shortcut.py --only=default --only=no_ca    # the claim, five seeds
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
import math
import pathlib
import sys

import numpy as np
from absl import app, flags

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import side_by_side  # noqa: E402
from maskrl_jax import stored  # noqa: E402
from maskrl_jax.evaluate import canvas, measure  # noqa: E402

# Every number of steps that a budget may be compared with, so that all seeds have the same points of the base.
STEPS = {"evaluation.steps": "(6,8,9,10,11,12,13,14,15,16,24)"}
ALONE = STEPS | {"curve.beside": "()"}  # what stands beside the shortcut is measured once
PLAIN = ALONE | {"loss.kl": 0.0}  # the published loss, on which every other change is measured alone
SHORT = {"curve.num_steps": 16, "curve.budgets": "(4,6,8)"}
ARMS = {
    "default": STEPS | {"curve.beside": "('frozen','linear','calibrated','adaptive')"},
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
AGAINST = dict.fromkeys(ARMS, "squared error alone") | {"policy": "default", "mixed N, N of 16": "N of 16"}
POLICIES = ("policy", "policy, squared error alone")
# Of runs beside each other; large batches would change what an adaptive refresh does.
UNTIMED = {"evaluation.steps": "(24,)", "evaluation.batch_size": 192, "curve.timing_runs": 1}
UNTIMED_BESIDE = {
    "default": {"curve.beside": "()"},
    "squared error alone": {"curve.beside": "('frozen','linear','calibrated')"},
}
SEEDS = flags.DEFINE_multi_integer("seeds", [0, 1, 2, 3, 4], "seed of a run, once for each; the base is shared")
ONLY = flags.DEFINE_multi_enum("only", None, list(ARMS), "train this arm; the table holds what is finished")
JOBS = flags.DEFINE_integer("jobs", 1, "runs at a time, none of them timed; each prints to <run>.log", lower_bound=1)
RUNS = flags.DEFINE_string("runs", "runs/shortcut-arms", "where the runs go")
STORE = flags.DEFINE_string("store", "runs/stages", "where trained parents are")
OUT = flags.DEFINE_string("out", "benchmarks/shortcut", "result files without their ending")
METRICS = ("graded", "strict", "diversity")
DRAWN = {"graded": "Graded verifier ↑", "strict": "Strict verifier ↑"}
EVALUATION_SEED = 17  # of seed 0; each further seed has the next


def main(_: list[str]) -> None:
    """Train what is missing, write after every run."""
    out = (ROOT / OUT.value).with_suffix(".json")
    done = json.loads(out.read_text()) if out.exists() else {"runs": {}}
    runs = side_by_side.Runs(JOBS.value)

    def keep(name: str, workdir: pathlib.Path) -> None:
        done["runs"][name] = _numbers(workdir)
        stored.write(str(out), json.dumps(done) + "\n")

    wanted = {f"{arm}, seed {seed}": (arm, seed) for seed in SEEDS.value for arm in ONLY.value or ARMS}
    missing = {name: functools.partial(_train, runs, *of) for name, of in wanted.items() if name not in done["runs"]}
    failed = runs.all(missing, keep)
    if done["runs"]:
        _write(done["runs"], out.with_suffix(".md"))
    if failed:
        sys.exit(failed)


def _train(runs: side_by_side.Runs, arm: str, seed: int) -> pathlib.Path:
    workdir = ROOT / RUNS.value / f"{arm.replace(' ', '_').replace(',', '')}-seed{seed}"
    changes = ARMS[arm] | {"seed": seed, "evaluation.seed": EVALUATION_SEED + seed, "evaluation.timing_repeats": 0}
    if JOBS.value > 1:
        changes |= UNTIMED | UNTIMED_BESIDE.get(arm, {})
    config = "configs/shortcut.py"
    if arm in POLICIES:
        config, changes["parents.speed_rl.seed"] = f"{config}:speed_rl", seed
    return runs.train(config, workdir, STORE.value, changes)


def _numbers(workdir: pathlib.Path) -> dict:
    """What is kept of a run: every point with a number a prompt, times, the length of training."""
    results = json.loads((workdir / "results.json").read_text())
    points = []
    for plain in results["points"]:
        point = measure.load_point(workdir / "points", plain)
        values = {name: np.round(point.per_prompt(name), 4).tolist() for name in METRICS}
        kept = {"system": point.system, "label": point.label, "setting": point.setting, "calls": point.calls_mean}
        points.append(kept | {"frechet": point.frechet} | values)
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    updates = [line for line in lines if "train/mse" in line]
    steps = np.diff([0, *(line["step"] for line in updates)])
    train_seconds = float(sum(line["perf/step_time"] * n for line, n in zip(updates, steps, strict=True)))
    timed = JOBS.value == 1
    return {
        "points": points,
        "latencies": results["latencies"] if timed else [],
        "train_seconds": train_seconds if timed else None,
        "mse": updates[-1]["train/mse"] / updates[-1]["train/mse_frozen"],
        "commit": results["facts"]["commit"],
        "machine": results["facts"]["machine"],
    }


def _of(run: dict, system: str, setting: float) -> dict | None:
    return next((p for p in run["points"] if (p["system"], p["setting"]) == (system, setting)), None)


def _difference(pairs: list[tuple[dict, dict]], metric: str) -> str:
    """Mean of the differences of seeds with its standard error, in bold beyond two of them from five seeds on."""
    if not pairs:
        return ""
    values = np.array([np.mean(own[metric]) - np.mean(other[metric]) for own, other in pairs])
    if len(values) < 2:
        return f"{values.mean():+.3f}"
    error = values.std(ddof=1) / math.sqrt(len(values))
    text = f"{values.mean():+.3f} ± {error:.3f}"
    return f"**{text}**" if len(values) >= 5 and abs(values.mean()) > 2 * error else text


def _settings(runs: list[dict]) -> list[tuple[str, str, float]]:
    """(system, label, setting) of every point of the runs."""
    return list(dict.fromkeys((p["system"], p["label"], p["setting"]) for run in runs for p in run["points"]))


def _reference(run: dict) -> float:
    """The base's most steps."""
    return max(p["setting"] for p in run["points"] if p["system"] == "base")


def _share_of_time(run: dict, system: str, setting: float) -> float:
    times = {(one["system"], one["setting"]): one["seconds"]["median"] for one in run["latencies"]}
    return times[system, setting] / times["base", _reference(run)]


def _equal(run: dict, point: dict) -> dict:
    """The base at the fewest measured steps that take no less, by count and by clock; else at its most."""
    share = _share_of_time(run, point["system"], point["setting"])
    slower = [
        p
        for p in run["points"]
        if p["system"] == "base"
        and p["setting"] >= point["calls"]
        and _share_of_time(run, "base", p["setting"]) >= share
    ]
    return min(slower, key=lambda p: p["setting"]) if slower else _of(run, "base", _reference(run))


def _rows(arm: str, runs: list[dict], others: dict[str, dict], timed: bool) -> list[str]:
    """Table rows of an arm; `others`: seed -> run of the arm that its shortcut is compared with."""
    rows = []
    for system, label, setting in _settings(list(runs.values())):
        if system == "base":
            continue
        own = {seed: _of(run, system, setting) for seed, run in runs.items()}
        shortcuts = others if system == "shortcut" else runs
        pairs = {
            "longest": [(own[seed], _of(runs[seed], "base", _reference(runs[seed]))) for seed in own],
            "other": [
                (own[seed], point)
                for seed in own
                if seed in shortcuts and (point := _of(shortcuts[seed], "shortcut", setting))
            ],
        }
        equal = {seed: _equal(runs[seed], point) for seed, point in own.items()} if timed else {}
        cells = [label if arm == "default" else f"{arm}: {label}", f"{setting:g}", str(len(runs))]
        if timed:
            pairs = {"equal": [(own[seed], equal[seed]) for seed in own]} | pairs
            shares = [_share_of_time(run, system, setting) for run in runs.values()]
            cells += [f"{np.mean([p['calls'] for p in own.values()]):.1f}", f"{100 * np.mean(shares):.0f} %"]
        cells += [f"{np.mean([np.mean(p[name]) for p in own.values()]):.3f}" for name in ("graded", "strict")]
        cells.append(f"{np.mean([p['frechet'] for p in own.values()]):.1f}")
        if timed:
            their = [_share_of_time(runs[seed], "base", point["setting"]) for seed, point in equal.items()]
            cells.append("/".join(f"{n:g}" for n in sorted({p["setting"] for p in equal.values()})))
            cells.append(f"{100 * np.mean(their):.0f} %")
        cells += [_difference(pairs[kind], name) for kind in pairs for name in ("graded", "strict")]
        rows.append("| " + " | ".join(cells) + " |")
    return rows


@canvas.styled
def _draw(arms: dict[str, dict[str, dict]], path: pathlib.Path) -> None:
    """Draw the claim: quality against the share of the base's longest time, two standard errors over seeds."""
    curves = {}
    for arm in ("default", "no_ca"):
        runs = list(arms.get(arm, {}).values())
        for system, label, setting in _settings(runs):
            if arm == "default" or system != "base":
                times = [_share_of_time(run, system, setting) for run in runs if _of(run, system, setting)]
                points = [point for run in runs if (point := _of(run, system, setting))]
                name = label if arm == "default" else "shortcut without controls"
                curves.setdefault(name, []).append((100 * np.mean(times), points))
    if "base" not in curves:
        return
    figure = canvas.new_figure(height=3.6)
    panels = canvas.small_multiples(figure, len(DRAWN), 2, "% of the time of the base at its most steps")
    for axes, (metric, title) in zip(panels, DRAWN.items(), strict=True):
        lowest = min(np.mean(point[metric]) for _, found in curves["base"] for point in found)
        bottom = max(lowest - 0.1, 0)  # what is far below the base at any number of steps is only named
        for place, (label, rows) in enumerate(curves.items()):
            look = {"color": canvas.COLOURS[place % 8], "marker": canvas.MARKERS[place % 8], "markeredgecolor": "white"}
            rows.sort(key=lambda row: row[0])
            values = [np.array([np.mean(point[metric]) for point in found]) for _, found in rows]
            errors = np.array([2 * x.std(ddof=1) / math.sqrt(len(x)) if len(x) > 1 else np.nan for x in values])
            shares, means = [row[0] for row in rows], np.array([x.mean() for x in values])
            label = label if means.max() > bottom else f"{label} (below)"
            axes.plot(shares, means, label=label, zorder=3, **look)
            axes.fill_between(shares, means - errors, means + errors, color=look["color"], alpha=0.16, linewidth=0)
        axes.set_ylim(bottom=bottom)
        axes.set_title(title)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper left", ncols=3)
    canvas.save(figure, path)


def _write(runs: dict, path: pathlib.Path) -> None:
    named = [(*name.split(", seed "), run) for name, run in sorted(runs.items())]
    arms = {arm: {seed: run for of, seed, run in named if of == arm} for arm in ARMS}
    arms = {arm: found for arm, found in arms.items() if found}
    timed = all(run["latencies"] for run in runs.values())
    if timed:
        _draw(arms, path.with_suffix(".png"))
    lines = [
        "# Feature shortcut on the embedded task",
        "",
        _facts(named),
        "",
        *([_about_time(), ""] if timed else []),
        _about_differences() + " " + _training(arms),
        "",
        *_table_head(timed),
    ]
    for arm, found in arms.items():
        others = {} if arm in (AGAINST[arm], "N of 16") else arms.get(AGAINST[arm], {})
        lines += _rows(arm, found, others, timed)
    path.write_text("\n".join(lines) + "\n")
    print(f"wrote {path}", flush=True)


def _facts(named: list[tuple[str, str, dict]]) -> str:
    """Protocol and the base's points: every arm of a seed has the same."""
    base = {(seed, p["setting"]): p for _, seed, run in named for p in run["points"] if p["system"] == "base"}
    curve = "; ".join(
        f"{n:g} steps: graded {np.mean([np.mean(p['graded']) for p in found]):.3f}, strict "
        f"{np.mean([np.mean(p['strict']) for p in found]):.3f}, Frechet distance "
        f"{np.mean([p['frechet'] for p in found]):.1f}"
        for n in sorted({n for _, n in base})
        if (found := [p for (_, of), p in base.items() if of == n])
    )
    prompts, seeds = len(named[0][2]["points"][0]["graded"]), len({seed for seed, _ in base})
    return (
        f"{prompts} held-out prompts, noise of its own for every seed, the same for base and shortcut. Base, seeds: "
        f"{seeds}; {curve}. Commits: {', '.join(sorted({run['commit'] for *_, run in named}))}. Machine: "
        f"{', '.join(sorted({run['machine'] for *_, run in named}))}."
    )


def _about_time() -> str:
    return (
        "Calls and time are those of the sampling loop, time in % of the base's longest. The base at equal time is the "
        "next measured one that takes no less, by count of steps and by the clock."
    )


def _about_differences() -> str:
    return (
        "Differences are mean ± standard error over seeds, in bold beyond two of them from five seeds on, not corrected "
        "for their number. The last two columns compare a shortcut with the one that it varies: the default and each "
        "arm with `squared error alone`, the published loss; what is no shortcut, with its own arm's. `no_ca` leaves out "
        "cross-attention with its MLP and the stem; `policy` stands on policies of Speed-RL with seeds of their own."
    )


def _training(arms: dict[str, dict[str, dict]]) -> str:
    """Seconds, where timed, and the final error of every arm."""
    told = []
    for arm, found in arms.items():
        seconds = [run["train_seconds"] for run in found.values()]
        took = "" if None in seconds else f" {np.mean(seconds):.0f} s,"
        told.append(f"{arm}{took} {np.mean([run['mse'] for run in found.values()]):.2f}")
    return f"Training, its error as a share of the frozen feature's: {'; '.join(told)}."


def _table_head(timed: bool) -> list[str]:
    columns = ["system", "full steps", "seeds", *(["calls", "time"] if timed else []), "graded", "strict", "FD"]
    numbers = len(columns) - 1
    if timed:
        columns += ["base at equal time", "its time", "graded against it", "strict"]
    columns += ["graded against the longest", "strict", "graded against the shortcut", "strict"]
    ruler = ["---", *["---:"] * (numbers + 2 * timed), *["---"] * (len(columns) - 1 - numbers - 2 * timed)]
    return ["| " + " | ".join(columns) + " |", "|" + "|".join(ruler) + "|"]


if __name__ == "__main__":
    app.run(main)
