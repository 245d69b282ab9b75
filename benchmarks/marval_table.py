"""The table and the picture of benchmarks/marval.py."""

import pathlib
from collections.abc import Sequence

import numpy as np
from matplotlib.ticker import LogLocator, NullLocator

from maskrl_jax.evaluate import bootstrap, canvas

AGAINST = {"marval": "student, against its teacher", "marval_rl": "tuned student, against the student"}


def arm_of(key: str) -> str:
    """The arm of a run's key, `<arm>, seed <number>`."""
    return key.rsplit(", seed", 1)[0]


def _by_arm(runs: dict[str, dict], names: Sequence[str]) -> dict[str, list[dict]]:
    """The runs of every arm that has any, a seed after the other."""
    found = {name: [run for key, run in sorted(runs.items()) if arm_of(key) == name] for name in names}
    return {name: own for name, own in found.items() if own}


def _of(run: dict, system: str, setting: float) -> dict:
    return next(p for p in run["points"] if (p["system"], p["setting"]) == (system, setting))


def write(title: str, runs: dict[str, dict], names: Sequence[str], path: pathlib.Path) -> None:
    """A row an arm of `names`, a system and a number of iterations."""
    commits, machines = (", ".join(sorted({run[of] for run in runs.values()})) for of in ("commit", "machine"))
    lines = [
        f"# {title}",
        "",
        f"Held-out captions, the same keys for all systems of a run. Commits: {commits}. Machine: {machines}. Ratios and "
        "differences are against the system that the last column names, at its most iterations.",
        "",
        "| arm | seeds | updates | s / update | system | iterations | graded | each seed | strict | Fréchet | diversity "
        "| graded - reference [95 %] | graded ratio | FD ratio | diversity ratio [95 %] | reference |",
        "|---|---:|---:|---:|---|---:|---:|---|---:|---:|---:|---|---:|---:|---|---|",
    ]
    for name, own in _by_arm(runs, names).items():
        settings = [(p["system"], p["label"], p["setting"]) for p in own[0]["points"]]
        lines += [_row(name, own, *setting) for setting in settings]
    path.write_text("\n".join(lines) + "\n")


def _row(arm: str, runs: list[dict], system: str, label: str, setting: float) -> str:
    points = [_of(run, system, setting) for run in runs]
    beside = [_of(run, "base", run["reference"]) for run in runs]
    graded, diversity = ((_values(points, name), _values(beside, name)) for name in ("graded", "diversity"))
    frechet = [np.mean([point["frechet"] for point in side]) for side in (points, beside)]
    cells = [arm, str(len(runs)), "/".join(sorted({str(run["updates"]) for run in runs}))]
    cells += [f"{np.mean([run['seconds_an_update'] for run in runs]):.2f}", label, f"{setting:g}"]
    cells += [f"{graded[0].mean():.3f}", ", ".join(f"{x:.3f}" for x in graded[0].mean(1))]
    cells += [f"{_values(points, 'strict').mean():.3f}", f"{frechet[0]:.1f}", f"{diversity[0].mean():.2f}"]
    if points == beside:
        return "| " + " | ".join([*cells, *[""] * 5]) + " |"
    ratio = bootstrap.paired_ratio(*diversity)
    cells += [f"{bootstrap.paired_difference(*graded):+}", f"{graded[0].mean() / graded[1].mean():.3f}"]
    cells += [f"{frechet[0] / frechet[1]:.2f}", f"{ratio}", f"{beside[0]['label']}, {runs[0]['reference']:g}"]
    return "| " + " | ".join(cells) + " |"


def _values(points: list[dict], name: str) -> np.ndarray:
    return np.array([point[name] for point in points])


@canvas.styled
def draw(runs: dict[str, dict], names: Sequence[str], path: pathlib.Path) -> None:
    """Draw what every arm's network gains over what it starts from, and both Fréchet distances; the best comes first."""
    rows = []
    for name, own in _by_arm(runs, names).items():
        after, before = ([_of(run, system, run["reference"]) for run in own] for system in ("tuned", "base"))
        gain = bootstrap.paired_difference(_values(after, "graded"), _values(before, "graded"))
        distances = [np.mean(_values(side, "frechet")) for side in (before, after)]
        rows.append((own[0]["stage"], f"{name} ({len(own)})", gain, *distances))
    rows.sort(key=lambda row: (row[0], -row[2].mean))
    figure = canvas.new_figure(height=0.19 * len(rows) + 1.2)
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    labels = dict(AGAINST)  # each is said once
    for place, (stage, _, gain, before, after) in enumerate(rows):
        look = {"color": canvas.COLOURS[2 + list(AGAINST).index(stage)], "zorder": 3}
        left.plot([gain.low, gain.high], [place, place], linewidth=1.4, **look)
        left.plot(gain.mean, place, "o", markeredgecolor="white", label=labels.pop(stage, None), **look)
        right.plot([before, after], [place, place], color=canvas.GRID, zorder=2)
        right.plot(before, place, "|", color=canvas.QUIET, markersize=6)
        right.plot(after, place, "o", markeredgecolor="white", **look)
    left.axvline(0, color=canvas.QUIET, linewidth=0.9)
    left.set_yticks(range(len(rows)), [name for _, name, *_ in rows])
    left.set_ylim(len(rows) - 0.4, -0.6)
    left.set_xlabel("difference of the graded score (bar: 95 %; in brackets: seeds)")
    right.set_xlabel("Fréchet distance (tick: before, dot: after)")
    right.set_xscale("log")
    right.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    right.xaxis.set_major_formatter("{x:g}")
    right.xaxis.set_minor_locator(NullLocator())
    for axes in (left, right):
        axes.grid(axis="y", visible=False)
    figure.legend(*left.get_legend_handles_labels(), loc="outside upper left", ncols=2)
    canvas.save(figure, path)
