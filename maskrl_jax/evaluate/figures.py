"""Figures of numbers: quality against calls, how calls are spread, how training went."""

import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from maskrl_jax.evaluate import canvas, curve
from maskrl_jax.evaluate.measure import Point

# Titles of what may be plotted; the arrow says which way is better.
TITLES = {
    "graded": "Verifier, graded ↑",
    "strict": "Verifier, all right ↑",
    "judge": "Judge ↑",
    "clip_score": "CLIPScore ↑",
    "pick_score": "PickScore ↑",
    "hps": "HPSv2.1 ↑",
    "aesthetic": "LAION aesthetic ↑",
    "frechet": "Fréchet distance ↓",
    "diversity": "Diversity ↑",
    "precision": "Precision ↑",
    "recall": "Recall ↑",
}
ROUND_STEPS = (1, 2, 2.5, 5, 10)
CALL_TICKS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)


def _call_axis(axes, calls: Sequence[float]) -> None:
    """Make x logarithmic in calls with the usual step counts as ticks."""
    low, high = min(calls) / 1.12, max(calls) * 1.12
    axes.set_xscale("log", base=2)
    axes.set_xlim(low, high)
    axes.xaxis.set_major_locator(FixedLocator([tick for tick in CALL_TICKS if low <= tick <= high]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _draw_curve(axes, points: Sequence[Point], metric: str, colour: str, marker: str) -> None:
    """Draw one system's line with its band; settings without the metric are left out."""
    groups = sorted(curve.by_setting(points).values(), key=curve.mean_calls)
    rows = [(curve.mean_calls(group), curve.interval_over_seeds(group, metric)) for group in groups]
    rows = [(calls, interval) for calls, interval in rows if interval is not None]
    if not rows:
        return
    calls = [row[0] for row in rows]
    axes.plot(calls, [row[1].mean for row in rows], color=colour, marker=marker, markeredgecolor="white", zorder=3)
    low, high = [row[1].low for row in rows], [row[1].high for row in rows]
    axes.fill_between(calls, low, high, color=colour, alpha=0.16, linewidth=0)


def _draw_reference(axes, reference: Sequence[Point], metric: str) -> None:
    level = curve.interval_over_seeds(reference, metric)
    if level is not None:
        axes.axhline(level.mean, color=canvas.QUIET, linewidth=0.9, linestyle=(0, (1.5, 1.5)), zorder=1)


def _draw_first_equal(axes, equality: curve.Equality | None, named: bool) -> None:
    """Mark T*, with its number in the first panel."""
    if equality is None or equality.best is None:
        return
    calls = equality.best.calls_mean
    axes.axvline(calls, color=canvas.COLOURS[1], linewidth=0.9, linestyle=(0, (4, 2)), zorder=1)
    if named:
        where = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points"}
        text = f"T* = {calls:.1f}\n{equality.speedup:.1f}× fewer calls"
        axes.annotate(text, (calls, 0.03), (4, 0), color=canvas.COLOURS[1], fontsize=8, va="bottom", **where)


@canvas.styled
def quality_curves(
    path: str | pathlib.Path,
    points: Sequence[Point],
    metrics: Sequence[str],
    reference: Sequence[Point] = (),
    equality: curve.Equality | None = None,
) -> np.ndarray:
    """Draw every metric against mean network calls, one panel each; returns uint8 [H, W, 3].

    Bands are 95 % bootstrap bounds (of set distances: the range over seeds). The dotted line is the
    reference's level, the dashed one T*. Metrics are names of `Point.metrics`, "frechet", "precision",
    "recall", "diversity".
    """
    systems = list(dict.fromkeys(point.system for point in points))
    columns = 3 if len(metrics) in (1, 2, 3, 5, 6, 9) else 4
    figure = canvas.new_figure(height=(7.0 / columns + 0.15) * -(-len(metrics) // columns) + 0.35)
    panels = canvas.small_multiples(figure, len(metrics), columns, "mean network calls")
    for index, (axes, metric) in enumerate(zip(panels, metrics, strict=True)):
        for place, system in enumerate(systems):
            own = [point for point in points if point.system == system]
            style = place % len(canvas.COLOURS)
            _draw_curve(axes, own, metric, canvas.COLOURS[style], canvas.MARKERS[style])
        if reference:
            _draw_reference(axes, reference, metric)
        _draw_first_equal(axes, equality, named=index == 0)
        _call_axis(axes, [point.calls_mean for point in points])
        axes.set_title(TITLES.get(metric, metric))
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=ROUND_STEPS))
    labels = {point.system: point.label for point in points}
    lines = [_legend_line(figure.axes[0], place) for place in range(len(systems))]
    figure.legend(lines, [labels[name] for name in systems], loc="outside upper left", ncols=min(4, len(systems)))
    return canvas.save(figure, path)


def _legend_line(axes, place: int):
    style = place % len(canvas.COLOURS)
    (line,) = axes.plot([], [], color=canvas.COLOURS[style], marker=canvas.MARKERS[style], markeredgecolor="white")
    return line


@canvas.styled
def calls_histogram(
    path: str | pathlib.Path,
    histograms: Mapping[str, Mapping[int, int]],
    reference_calls: float | None = None,
) -> np.ndarray:
    """Draw the share of samples by number of calls, one row per label; returns uint8 [H, W, 3]."""
    figure = canvas.new_figure(height=1.25 * len(histograms) + 0.75)
    largest = max([max(counts) for counts in histograms.values()] + [reference_calls or 0])
    for axes, label in zip(figure.subplots(len(histograms), 1, squeeze=False)[:, 0], histograms, strict=True):
        calls, counts = np.array(sorted(histograms[label].items()), float).T
        share = counts / counts.sum()
        mean = float((calls * share).sum())
        axes.bar(calls, share, width=0.8, color=canvas.COLOURS[1])
        axes.axvline(mean, color=canvas.INK, linewidth=1.0)
        axes.set_title(f"{label}: mean {mean:.1f}", fontsize=8.5, pad=4)
        if reference_calls:
            axes.axvline(reference_calls, color=canvas.QUIET, linewidth=0.9, linestyle=(0, (1.5, 1.5)))
        axes.set_xlim(0.4, largest + 0.8)
        axes.xaxis.set_major_locator(MaxNLocator(12, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(3))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.0f} %"))
        axes.grid(axis="x", visible=False)
    figure.axes[-1].set_xlabel("network calls of a sample" + (" (dotted: reference)" if reference_calls else ""))
    figure.supylabel("share of samples", fontsize=8.5)
    return canvas.save(figure, path)


def logged_series(rows: Sequence[Mapping]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return tag -> (steps, values) of logged rows {"step": s, tag: number, ...}.

    Values that were not finite, stored as null, are left out; a step logged twice keeps its last value.
    """
    series: dict[str, dict[int, float]] = {}
    for row in rows:
        for tag, value in row.items():
            if tag != "step" and isinstance(value, int | float):
                series.setdefault(tag, {})[row["step"]] = value
    return {tag: tuple(np.array(sorted(values.items()), float).T) for tag, values in series.items()}


def _smoothed(values: np.ndarray) -> np.ndarray:
    """Return the centred running mean over about a twentieth of the run; shorter windows at the ends."""
    half = max(1, len(values) // 40)
    total = np.concatenate([[0.0], np.cumsum(values)])
    start = np.maximum(np.arange(len(values)) - half, 0)
    stop = np.minimum(np.arange(len(values)) + half + 1, len(values))
    return (total[stop] - total[start]) / (stop - start)


@canvas.styled
def training_curves(
    path: str | pathlib.Path,
    series: Mapping[str, tuple[np.ndarray, np.ndarray]],
    panels: Mapping[str, Mapping[str, str]],
) -> np.ndarray | None:
    """Draw logged series; returns uint8 [H, W, 3], or None where nothing asked for was logged.

    Args:
      series: tag -> (steps, values), as `logged_series` gives it.
      panels: panel title -> {tag: label}; tags that were not logged, and panels without any, are left out.
    """
    logged = {title: {tag: label for tag, label in tags.items() if tag in series} for title, tags in panels.items()}
    logged = {title: tags for title, tags in logged.items() if tags}
    if not logged:
        return None
    figure = canvas.new_figure(height=2.2 * -(-len(logged) // 2) + 0.1)
    panel_axes = canvas.small_multiples(figure, len(logged), 2, "step")
    for axes, (title, tags) in zip(panel_axes, logged.items(), strict=True):
        for place, (tag, label) in enumerate(tags.items()):
            colour = canvas.COLOURS[(place + 1) % len(canvas.COLOURS)]
            steps, values = series[tag]
            axes.plot(steps, values, color=colour, alpha=0.28, linewidth=0.8)
            axes.plot(steps, _smoothed(values), color=colour, label=label)
        axes.set_title(title)
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=ROUND_STEPS))
        if len(tags) > 1:
            axes.legend(loc="best", handlelength=1.2)
    return canvas.save(figure, path)
