"""Figures of feature shortcuts: quality against measured time, drift per step, and where the time goes."""

import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.ticker import MaxNLocator

from maskrl_jax.evaluate import canvas, curve
from maskrl_jax.evaluate.figures import TITLES
from maskrl_jax.evaluate.latency import Latency
from maskrl_jax.evaluate.measure import Point


@canvas.styled
def quality_vs_time(
    path: str | pathlib.Path,
    points: Sequence[Point],
    latencies: Sequence[Latency],
    metrics: Sequence[str],
) -> np.ndarray | None:
    """Draw every metric against milliseconds an image, one curve a system; returns uint8 [H, W, 3].

    Points that were not timed are left out; None where none was.
    """
    times_of = {(one.system, one.setting): one.milliseconds.median for one in latencies}
    timed = [point for point in points if (point.system, point.setting) in times_of]
    if not timed:
        return None
    figure = canvas.new_figure(height=2.7 * -(-len(metrics) // 3) + 0.35)
    systems = {point.system: point.label for point in timed}
    for axes, metric in zip(canvas.small_multiples(figure, len(metrics), 3, "ms an image"), metrics, strict=True):
        for place, (system, label) in enumerate(systems.items()):
            rows = []
            for setting, group in curve.by_setting([p for p in timed if p.system == system]).items():
                value = curve.interval_over_seeds(group, metric)
                if value is not None:
                    rows.append((times_of[system, setting], value))
            if not rows:
                continue
            rows.sort(key=lambda row: row[0])
            times = [row[0] for row in rows]
            look = {"color": canvas.COLOURS[place % 8], "marker": canvas.MARKERS[place % 8], "markeredgecolor": "white"}
            axes.plot(times, [row[1].mean for row in rows], label=label, zorder=3, **look)
            low, high = [row[1].low for row in rows], [row[1].high for row in rows]
            axes.fill_between(times, low, high, color=look["color"], alpha=0.16, linewidth=0)
        axes.set_title(TITLES.get(metric, metric))
        axes.yaxis.set_major_locator(MaxNLocator(5))
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=min(4, len(labels)))
    return canvas.save(figure, path)


DRIFT = {"mse": "Squared error ↓", "cosine": "Cosine ↑", "kl": "Guided KL, nats ↓"}


@canvas.styled
def drift(path: str | pathlib.Path, errors: Mapping[str, Mapping[str, np.ndarray]]) -> np.ndarray:
    """Draw how a feature ages: one step after a full one by sampling step, and by steps since then.

    Args:
      errors: label -> {measure: [S, S] at (full step, steps since)}, as `feature_shortcut.open_loop` gives it.
    """
    figure = canvas.new_figure(height=4.8)
    panels = figure.subplots(2, len(DRIFT))
    for column, (name, title) in enumerate(DRIFT.items()):
        by_step, by_age = panels[0][column], panels[1][column]
        for place, (label, measures) in enumerate(errors.items()):
            error_AK = np.ma.masked_invalid(measures[name])  # what no sample reached
            steps = len(error_AK)
            look = {"color": canvas.COLOURS[1 + place], "marker": canvas.MARKERS[1 + place], "markersize": 3}
            by_step.plot(np.arange(1, steps), error_AK[:-1, 1], label=label, **look)
            ages = np.arange(1, max(steps // 2, 2))
            # Of the full steps from which all these ages are reached, so that the ages are alike.
            by_age.plot(ages, error_AK[: steps - ages[-1], 1 : ages[-1] + 1].mean(0), label=label, **look)
        by_step.set_title(title)
        by_step.set_xlabel("sampling step, one after a full one")
        by_age.set_xlabel("steps since the last full one")
        for axes in (by_step, by_age):
            axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    panels[0][0].legend()
    return canvas.save(figure, path)


@canvas.styled
def budget(
    path: str | pathlib.Path, rows: Mapping[str, Sequence[bool]], full_ms: float, shortcut_ms: float
) -> np.ndarray:
    """Draw which steps run the full model, one row a setting, and what they cost an image in milliseconds."""
    figure = canvas.new_figure(height=0.34 * len(rows) + 1.0)
    left, right = figure.subplots(1, 2, width_ratios=(2, 1), sharey=True)
    for place, pattern in enumerate(rows.values()):
        for step, full in enumerate(pattern):
            left.barh(place, 0.9, left=step + 0.05, height=0.62, color=canvas.COLOURS[1 if full else 6])
        full_time, light_time = sum(pattern) * full_ms, (len(pattern) - sum(pattern)) * shortcut_ms
        right.barh(place, full_time, height=0.62, color=canvas.COLOURS[1], label="full" if not place else None)
        right.barh(
            place,
            light_time,
            left=full_time,
            height=0.62,
            color=canvas.COLOURS[6],
            label="shortcut" if not place else None,
        )
    left.set_yticks(range(len(rows)), list(rows))
    left.invert_yaxis()
    left.set_xlabel("sampling step")
    right.set_xlabel("ms an image")
    left.grid(visible=False)
    figure.legend(*right.get_legend_handles_labels(), loc="outside upper left", ncols=2)
    return canvas.save(figure, path)
