"""The table and the pictures of benchmarks/shortcut.py."""

import math
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from maskrl_jax.evaluate import canvas

DRAWN = {"graded": "Graded verifier ↑", "strict": "Strict verifier ↑"}


def write(runs: dict, names: Sequence[str], against: Mapping[str, str], note: str, path: pathlib.Path) -> None:
    """Write the table of all runs to `path` and draw them beside it.

    `names`: arms in order. `against`: arm -> the arm whose shortcut it is compared with.
    """
    named = [(*name.split(", seed "), run) for name, run in sorted(runs.items())]
    arms = {arm: {seed: run for of, seed, run in named if of == arm} for arm in names}
    arms = {arm: found for arm, found in arms.items() if found}
    timed = all(run["latencies"] for run in runs.values())
    if timed:
        claim = [("", run) for run in arms.get("default", {}).values()]
        policies = [("", run) for run in arms.get("policy", {}).values()]
        for suffix, drawn in (("", claim), ("_policy", policies)):
            if drawn:
                _draw(drawn, path.with_name(path.stem + suffix + ".png"))
    lines = [
        "# Feature shortcut on the embedded task",
        "",
        _facts(named, timed) + f" {note}" * bool(note),
        "",
        _reading(timed),
        "",
    ]
    lines += [_training(arms), "", *_table_head(timed)]
    for arm, found in arms.items():
        lines += _rows(arm, found, arms.get(against.get(arm), {}), timed)
    path.write_text("\n".join(lines) + "\n")
    print(f"wrote {path}", flush=True)


def _of(run: dict, system: str, setting: float) -> dict | None:
    return next((p for p in run["points"] if (p["system"], p["setting"]) == (system, setting)), None)


def _spread(values: np.ndarray, form: str) -> str:
    """Mean with its standard error over seeds."""
    error = f" ± {values.std(ddof=1) / math.sqrt(len(values)):.3f}" if len(values) > 1 else ""
    return f"{values.mean():{form}}{error}"


def _difference(pairs: list[tuple[dict, dict]], metric: str) -> str:
    """Mean of the differences of seeds with its standard error, in bold beyond two of them from five seeds on."""
    if not pairs:
        return ""
    values = np.array([np.mean(own[metric]) - np.mean(other[metric]) for own, other in pairs])
    text = _spread(values, "+.3f")
    clear = len(values) >= 5 and abs(values.mean()) > 2 * values.std(ddof=1) / math.sqrt(len(values))
    return f"**{text}**" if clear else text


def _ratio(pairs: list[tuple[dict, dict]], metric: str) -> str:
    """Mean ratio of seeds with its standard error."""
    return "x " + _spread(np.array([np.mean(own[metric]) / np.mean(other[metric]) for own, other in pairs]), ".3f")


def _settings(runs: list[dict]) -> list[tuple[str, str, float]]:
    """(system, label, setting) of every point that all of the runs have."""
    each = [[(p["system"], p["label"], p["setting"]) for p in run["points"]] for run in runs]
    return [place for place in dict.fromkeys(each[0]) if all(place in others for others in each)]


def _plain(run: dict, system: str) -> str:
    """The same network without a shortcut: on a policy the tuned one, which itself is compared with the base."""
    tuned = any(p["system"] == "tuned" for p in run["points"])
    return "tuned" if tuned and system not in ("tuned", "policy") else "base"


def _longest(run: dict, system: str) -> dict:
    """The network without a shortcut at its most steps."""
    return max((p for p in run["points"] if p["system"] == _plain(run, system)), key=lambda p: p["setting"])


def _share_of_time(run: dict, system: str, setting: float) -> float:
    """Time of a sampling loop as a share of the base's longest."""
    times = {(one["system"], one["setting"]): one["seconds"]["median"] for one in run["latencies"]}
    return times[system, setting] / times["base", _longest(run, "tuned")["setting"]]


def _equal(run: dict, point: dict) -> dict:
    """The network without a shortcut at the fewest measured steps that take no less, by count and by clock.

    At its most where none does.
    """
    share, plain = _share_of_time(run, point["system"], point["setting"]), _plain(run, point["system"])
    slower = [
        p
        for p in run["points"]
        if p["system"] == plain and p["calls"] >= point["calls"] and _share_of_time(run, plain, p["setting"]) >= share
    ]
    return min(slower, key=lambda p: p["setting"]) if slower else _longest(run, point["system"])


def _rows(arm: str, runs: dict[str, dict], others: dict[str, dict], timed: bool) -> list[str]:
    """Table rows of an arm; `runs`, `others`: seed -> run of the arm, and of the one it is compared with."""
    rows = []
    for system, label, setting in _settings(list(runs.values())):
        if system == "base":
            continue
        own = {seed: _of(run, system, setting) for seed, run in runs.items()}
        compared = others if system == "shortcut" else runs
        pairs = {
            "longest": [(own[seed], _longest(runs[seed], system)) for seed in own],
            "other": [(own[s], p) for s in own if s in compared and (p := _of(compared[s], "shortcut", setting))],
        }
        cells = [label if arm == "default" else f"{arm}: {label}", f"{setting:g}", str(len(runs))]
        if timed:
            equal = {seed: _equal(runs[seed], point) for seed, point in own.items()}
            pairs = {"equal": [(own[seed], equal[seed]) for seed in own]} | pairs
            shares = [_share_of_time(run, system, setting) for run in runs.values()]
            cells += [f"{np.mean([p['calls'] for p in own.values()]):.1f}", f"{100 * np.mean(shares):.0f} %"]
        cells += [f"{np.mean([np.mean(p[name]) for p in own.values()]):.3f}" for name in ("graded", "strict")]
        cells.append(f"{np.mean([p['frechet'] for p in own.values()]):.1f}")
        if timed:
            their = [_share_of_time(runs[seed], p["system"], p["setting"]) for seed, p in equal.items()]
            cells.append("/".join(f"{n:g}" for n in sorted({p["setting"] for p in equal.values()})))
            cells.append(f"{100 * np.mean(their):.0f} %")
        for kind, both in pairs.items():
            cells += [_difference(both, name) for name in ("graded", "strict")]
            cells += [_ratio(both, name) for name in ("frechet", "diversity")] if kind != "other" else []
        rows.append("| " + " | ".join(cells) + " |")
    return rows


@canvas.styled
def _draw(runs: list[tuple[str, dict]], path: pathlib.Path) -> None:
    """Draw quality against the share of the base's longest time, two standard errors over seeds.

    `runs`: (prefix of the labels, run); the base's curve is that of all of them.
    """
    curves = {}
    for system, place in sorted({(p["system"], p["setting"]) for _, run in runs for p in run["points"]}):
        for prefix, run in runs:
            if point := _of(run, system, place):
                name = "base" if system == "base" else prefix + point["label"]
                curves.setdefault(name, {}).setdefault(place, []).append((_share_of_time(run, system, place), point))
    figure = canvas.new_figure(height=3.6)
    panels = canvas.small_multiples(figure, len(DRAWN), 2, "% of the time of the base at its most steps")
    for axes, (metric, title) in zip(panels, DRAWN.items(), strict=True):
        means_of = lambda rows, metric=metric: np.array([np.mean([np.mean(p[metric]) for _, p in x]) for x in rows])  # noqa: E731
        bottom = max(means_of(curves["base"].values()).min() - 0.1, 0)  # what is far below is only named
        for index, (label, places) in enumerate(curves.items()):
            rows = sorted(places.values(), key=lambda found: np.mean([share for share, _ in found]))
            shares, means = [100 * np.mean([share for share, _ in found]) for found in rows], means_of(rows)
            values = [np.array([np.mean(p[metric]) for _, p in found]) for found in rows]
            errors = np.array([2 * x.std(ddof=1) / math.sqrt(len(x)) if len(x) > 1 else np.nan for x in values])
            look = {"color": canvas.COLOURS[index % 8], "marker": canvas.MARKERS[index % 8], "markeredgecolor": "white"}
            label = label if means.max() > bottom else f"{label} (below)"
            axes.plot(shares, means, label=label, zorder=3, **look)
            axes.fill_between(shares, means - errors, means + errors, color=look["color"], alpha=0.16, linewidth=0)
        axes.set_ylim(bottom=bottom)
        axes.set_title(title)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper left", ncols=3)
    canvas.save(figure, path)


def _facts(named: list[tuple[str, str, dict]], timed: bool) -> str:
    """Protocol, costs, and the base's points that all runs have: every arm of a seed has the same."""
    base = {(seed, p["setting"]): p for _, seed, run in named for p in run["points"] if p["system"] == "base"}
    seeds = sorted({seed for seed, _ in base})
    curve = "; ".join(
        f"{n:g} steps: graded {np.mean([np.mean(p['graded']) for p in found]):.3f}, strict "
        f"{np.mean([np.mean(p['strict']) for p in found]):.3f}, Frechet distance "
        f"{np.mean([p['frechet'] for p in found]):.1f}"
        for n in sorted({n for _, n in base})
        if len(found := [base[seed, n] for seed in seeds if (seed, n) in base]) == len(seeds)
    )
    prompts = len(named[0][2]["points"][0]["graded"])
    arm, seed, first = next((one for one in named if one[2].get("told")), named[0])
    told = ". ".join(f"{name[0].upper()}{name[1:]}: {text}" for name, text in first.get("told", {}).items())
    return (
        f"{prompts} held-out prompts, noise of its own for every seed, the same for base and shortcut. Base, seeds: "
        f"{len(seeds)}; {curve}. Commits: {', '.join(sorted({run['commit'] for *_, run in named}))}. Machine: "
        f"{', '.join(sorted({run['machine'] for *_, run in named}))}."
        + (f" Of {arm}, seed {seed}: {told}." if told and timed else "")
    )


def _reading(timed: bool) -> str:
    """How the table is read."""
    clock = (
        "Calls and time are those of the sampling loop, time in % of the base's longest. At equal time stands the next "
        "measured number of steps of the same network without a shortcut that takes no less, by count of steps and by "
        "the clock; on a policy that network is the tuned one. "
    )
    return clock * timed + (
        "The longest is that network at its most steps. Differences are mean ± standard error over seeds, in bold beyond "
        "two of them from five seeds on, not corrected for their number; FD and diversity are ratios. The last two "
        "columns compare the evenly refreshed shortcut of an arm with that of `squared error alone`, the published loss "
        "(of `policy`: with `N of 24`), and all else in an arm with the arm's own. `no_ca` leaves out cross-attention, "
        "its MLP and the stem. `linear extrapolation` adds the last change of the feature again, as section 10 has it: "
        "after a full step that is the correction of a drift, not a speed."
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
    against = ["graded against {}", "strict", "FD", "diversity"]
    columns = ["system", "full steps", "seeds", *["calls", "time"] * timed, "graded", "strict", "FD"]
    columns += ["at equal time", "its time"] * timed
    numbers = len(columns) - 1
    columns += [name.format("it") for name in against] * timed + [name.format("the longest") for name in against]
    columns += ["graded against the shortcut", "strict"]
    return [
        "| " + " | ".join(columns) + " |",
        "|" + "|".join(["---", *["---:"] * numbers, *["---"] * (len(columns) - 1 - numbers)]) + "|",
    ]
