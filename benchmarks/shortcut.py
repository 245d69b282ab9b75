"""The feature shortcut against fewer steps of its base at equal measured time (specs/shortcut.md section 10).

python benchmarks/shortcut.py --only=default --only=no_ca    # the claim, five seeds
python benchmarks/shortcut.py --seeds=0 --seeds=1 --seeds=2  # every arm, three seeds

A run trains a shortcut on the one base of the store and measures it with a seed of sampling of its own, beside the base
with the same prompts and keys. What is finished is in <out>.json with a number a prompt, and is not done again.
A shortcut step counts as the share c of a full one that it takes on the clock; the base that a budget is compared with
has the next larger whole number of steps. Standard errors are over seeds.
"""

import json
import math
import pathlib
import subprocess
import sys

import numpy as np
from absl import app, flags

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from maskrl_jax import stored  # noqa: E402
from maskrl_jax.evaluate import canvas, measure  # noqa: E402

ALONE = {"curve.beside": "()"}  # what stands beside the shortcut is measured with the default
ARMS = {
    "default": {"curve.beside": "('frozen','linear','calibrated','adaptive')"},
    "no_ca": ALONE | {"model.controls": False},
    "chain of 3": ALONE | {"loss.chain": 3},  # extension 1
    "mixed N": ALONE | {"teacher.num_steps": "(24,16,12)"},  # extension 2
    "no local mixing": ALONE | {"model.local_mixing": False},
    "keys and values as they are": ALONE | {"model.kv_prenorm": False},
    "KL": ALONE | {"loss.kl": 0.1},
    "all positions": ALONE | {"loss.positions": "all"},
    "two blocks": ALONE | {"model.n_block": 2},
}
SEEDS = flags.DEFINE_multi_integer("seeds", [0, 1, 2, 3, 4], "seed of a run, once for each; the base is shared")
ONLY = flags.DEFINE_multi_enum("only", None, list(ARMS), "train this arm; the table holds what is finished")
CONFIG = flags.DEFINE_string("config", "configs/shortcut.py", "config of the runs")
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
    for seed in SEEDS.value:
        for arm in ONLY.value or ARMS:
            name = f"{arm}, seed {seed}"
            if name not in done["runs"]:
                done["runs"][name] = _numbers(_train(arm, seed))
                stored.write(str(out), json.dumps(done) + "\n")
    _write(done["runs"], out.with_suffix(".md"))


def _train(arm: str, seed: int) -> pathlib.Path:
    workdir = ROOT / RUNS.value / f"{arm.replace(' ', '_')}-seed{seed}"
    changes = ARMS[arm] | {"seed": seed, "evaluation.seed": EVALUATION_SEED + seed, "evaluation.timing_repeats": 0}
    command = [sys.executable, "-m", "maskrl_jax.main", f"--config={CONFIG.value}", f"--workdir={workdir}"]
    command += [f"--store={STORE.value}", *(f"--config.{key}={value}" for key, value in changes.items())]
    print(" ".join(command), flush=True)
    subprocess.run(command, cwd=ROOT, check=True)
    return workdir


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
    return {
        "points": points,
        "latencies": results["latencies"],
        "train_seconds": float(sum(line["perf/step_time"] * n for line, n in zip(updates, steps, strict=True))),
        "mse": updates[-1]["train/mse"] / updates[-1]["train/mse_frozen"],
        "commit": results["facts"]["commit"],
        "machine": results["facts"]["machine"],
    }


def _of(run: dict, system: str, setting: float) -> dict | None:
    return next((p for p in run["points"] if (p["system"], p["setting"]) == (system, setting)), None)


def _difference(pairs: list[tuple[dict, dict]], metric: str) -> str:
    """Mean of the differences of seeds with its standard error, in bold beyond two of them."""
    values = np.array([np.mean(own[metric]) - np.mean(other[metric]) for own, other in pairs])
    if len(values) < 2:
        return f"{values.mean():+.3f}"
    error = values.std(ddof=1) / math.sqrt(len(values))
    text = f"{values.mean():+.3f} ± {error:.3f}"
    return f"**{text}**" if abs(values.mean()) > 2 * error else text


def _settings(runs: list[dict]) -> list[tuple[str, str, float]]:
    """(system, label, setting) of every point of the runs."""
    return list(dict.fromkeys((p["system"], p["label"], p["setting"]) for run in runs for p in run["points"]))


def _reference(run: dict) -> float:
    """The base's most steps."""
    return max(p["setting"] for p in run["points"] if p["system"] == "base")


def _share_of_time(run: dict, system: str, setting: float) -> float:
    times = {(one["system"], one["setting"]): one["seconds"]["median"] for one in run["latencies"]}
    return times[system, setting] / times["base", _reference(run)]


def _rows(arm: str, runs: list[dict]) -> list[str]:
    rows = []
    for system, label, setting in _settings(runs):
        if system == "base":
            continue
        own = [_of(run, system, setting) for run in runs]
        equal = []
        for run, point in zip(runs, own, strict=True):
            above = [p for p in run["points"] if p["system"] == "base" and p["setting"] >= point["calls"] - 1e-9]
            equal.append(min(above, key=lambda p: p["setting"]))
        whole = [_of(run, "base", _reference(run)) for run in runs]
        name = label if arm == "default" else f"{arm}: {label}"
        cells = [
            name,
            f"{setting:g}",
            str(len(runs)),
            f"{np.mean([p['calls'] for p in own]):.1f}",
            f"{100 * np.mean([_share_of_time(run, system, setting) for run in runs]):.0f} %",
            f"{np.mean([np.mean(p['graded']) for p in own]):.3f}",
            f"{np.mean([np.mean(p['strict']) for p in own]):.3f}",
            f"{np.mean([p['frechet'] for p in own]):.1f}",
            "/".join(f"{n:g}" for n in sorted({p["setting"] for p in equal})),
            _difference(list(zip(own, equal, strict=True)), "graded"),
            _difference(list(zip(own, equal, strict=True)), "strict"),
            _difference(list(zip(own, whole, strict=True)), "graded"),
            _difference(list(zip(own, whole, strict=True)), "strict"),
        ]
        rows.append("| " + " | ".join(cells) + " |")
    return rows


@canvas.styled
def _draw(arms: dict[str, list[dict]], path: pathlib.Path) -> None:
    """Draw the claim: quality against the share of the base's longest time, two standard errors over seeds."""
    curves = {}
    for arm in ("default", "no_ca"):
        runs = arms.get(arm, [])
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
            errors = [2 * x.std(ddof=1) / math.sqrt(len(x)) if len(x) > 1 else 0 for x in values]
            shares, means = [row[0] for row in rows], np.array([x.mean() for x in values])
            label = label if means.max() > bottom else f"{label} (below)"
            axes.plot(shares, means, label=label, zorder=3, **look)
            axes.fill_between(shares, means - errors, means + errors, color=look["color"], alpha=0.16, linewidth=0)
        axes.set_ylim(bottom=bottom)
        axes.set_title(title)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper left", ncols=3)
    canvas.save(figure, path)


def _write(runs: dict, path: pathlib.Path) -> None:
    arms = {arm: [run for name, run in sorted(runs.items()) if name.startswith(f"{arm}, seed")] for arm in ARMS}
    arms = {arm: found for arm, found in arms.items() if found}
    _draw(arms, path.with_suffix(".png"))
    base = {}
    for run in runs.values():
        for point in run["points"]:
            if point["system"] == "base":
                base.setdefault(point["setting"], []).append(point)
    curve = "; ".join(
        f"{n:g} steps: graded {np.mean([np.mean(p['graded']) for p in found]):.3f}, strict "
        f"{np.mean([np.mean(p['strict']) for p in found]):.3f}, Frechet distance "
        f"{np.mean([p['frechet'] for p in found]):.1f}"
        for n, found in sorted(base.items())
    )
    prompts = len(next(iter(runs.values()))["points"][0]["graded"])
    lines = [
        "# Feature shortcut on the embedded task",
        "",
        f"{prompts} held-out prompts, noise of its own for every seed, the same for base and shortcut. Base: {curve}. "
        f"Commits: {', '.join(sorted({run['commit'] for run in runs.values()}))}. Machine: "
        f"{', '.join(sorted({run['machine'] for run in runs.values()}))}.",
        "",
        "Calls and time are those of the sampling loop; differences are mean ± standard error over seeds, in bold "
        "beyond two of them. Training: "
        + ", ".join(
            f"{arm} {np.mean([run['train_seconds'] for run in found]):.0f} s (error "
            f"{np.mean([run['mse'] for run in found]):.2f} of the frozen feature's)"
            for arm, found in arms.items()
        )
        + ".",
        "",
        "| system | full steps | seeds | calls | time of the base's longest | graded | strict | FD | base with | graded "
        "against it | strict | graded against the longest | strict |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---|---|---|---|",
    ]
    for arm, found in arms.items():
        lines += _rows(arm, found)
    path.write_text("\n".join(lines) + "\n")
    print(f"wrote {path}", flush=True)


if __name__ == "__main__":
    app.run(main)
