"""Markdown tables of measured points, comparisons and times."""

from collections.abc import Sequence

from maskrl_jax.evaluate import curve
from maskrl_jax.evaluate.bootstrap import Interval
from maskrl_jax.evaluate.latency import Latency
from maskrl_jax.evaluate.measure import Point
from maskrl_jax.evaluate.timing import Spread, Timing

DISTANCES = ("frechet", "precision", "recall")
SET_METRICS = ("frechet", "diversity", "precision", "recall")
HEADS = {"frechet": "Fréchet", "graded": "graded verifier", "strict": "strict verifier"}
HEADS |= {"clip_score": "CLIPScore", "pick_score": "PickScore", "hps": "HPSv2.1", "aesthetic": "LAION aesthetic"}


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a markdown table; every row as long as the head."""
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def headline_metrics(points: Sequence[Point]) -> tuple[str, ...]:
    """Return the main metrics that these points have: the verifier's if there is one, judge, distances.

    A set without pictures has no distances.
    """
    far = any(point.frechet is not None for point in points)
    whole = tuple(name for name in SET_METRICS if far or name not in DISTANCES)
    return tuple(name for name in curve.HEADLINE if name in points[0].metrics) + whole


def _interval(value: Interval | None) -> str:
    return "n/a" if value is None else f"{value}"


def _by_system_and_setting(points: Sequence[Point]) -> list[list[Point]]:
    systems = dict.fromkeys(point.system for point in points)
    groups = []
    for system in systems:
        own = curve.by_setting([point for point in points if point.system == system]).values()
        groups += sorted(own, key=curve.mean_calls)
    return groups


def points_table(points: Sequence[Point]) -> str:
    """Return one row per system and setting with every headline metric and its bounds."""
    names = headline_metrics(points)
    head = ["system", "setting", "calls (mean ± sd)", *(HEADS.get(name, name) for name in names)]
    rows = []
    for group in _by_system_and_setting(points):
        spread = sum(point.calls_sd for point in group) / len(group)
        cells = [group[0].label, f"{group[0].setting:g}", f"{curve.mean_calls(group):.2f} ± {spread:.2f}"]
        for name in names:
            value = curve.interval_over_seeds(group, name)
            one = name in DISTANCES and len(group) == 1  # the range over one seed says nothing
            cells.append(f"{value.mean:.3f}" if one and value is not None else _interval(value))
        rows.append(cells)
    return table(head, rows)


def attributes_table(points: Sequence[Point]) -> str:
    """Return the means of the remaining scores, or "" where there are none."""
    names = [name for name in points[0].metrics if name not in curve.HEADLINE]
    if not names:
        return ""
    rows = []
    for group in _by_system_and_setting(points):
        values = [curve.interval_over_seeds(group, name) for name in names]
        shown = ["n/a" if value is None else f"{value.mean:.3f}" for value in values]
        rows.append([group[0].label, f"{curve.mean_calls(group):.2f}", *shown])
    return table(["system", "calls", *names], rows)


def equality_table(equality: curve.Equality) -> str:
    """Return the differences of one curve from the reference, and which conditions failed."""
    names = _compared(equality.table)
    head = [
        "calls",
        "fewer",
        *(f"Δ {HEADS.get(n, n)}" for n in names),
        "Fréchet ratio",
        "diversity ratio",
        "equal?",
    ]
    rows = []
    for row in equality.table:
        ratio = "n/a" if row.frechet_ratio is None else f"{row.frechet_ratio:.2f}"
        result = "**yes**" if row.equal else "no: " + "; ".join(row.failed)
        shown = [f"{row.differences[name]:+}" for name in names]
        fewer = f"{equality.reference_calls / row.calls_mean:.2f}×"
        rows.append([f"{row.calls_mean:.2f}", fewer, *shown, ratio, _interval(row.diversity_ratio), result])
    return table(head, rows)


def seeds_table(equality: curve.Equality) -> str:
    """Return every seed's own difference, or "" with one seed."""
    if len(equality.table[0].seeds) < 2:
        return ""
    names = _compared(equality.table)
    rows = []
    for row in equality.table:
        for place, seed in enumerate(row.seeds):
            shown = [f"{row.seed_differences[name][place]:+.3f}" for name in names]
            rows.append([f"{row.calls_mean:.2f}", str(seed), *shown])
    return table(["calls", "seed", *(f"Δ {HEADS.get(n, n)}" for n in names)], rows)


def _compared(rows: Sequence[curve.Comparison]) -> list[str]:
    return [name for name in curve.HEADLINE if name in rows[0].differences]


def same_calls_table(rows: Sequence[tuple[curve.Comparison, float]]) -> str:
    """Return differences from the base at no fewer calls; rows are (comparison, base calls)."""
    names = _compared([row for row, _ in rows])
    head = ["calls", "base's calls", *(f"Δ {HEADS.get(name, name)}" for name in names), "Fréchet ratio"]
    cells = []
    for row, calls in rows:
        ratio = "n/a" if row.frechet_ratio is None else f"{row.frechet_ratio:.2f}"
        shown = [f"{row.differences[name]:+}" for name in names]
        cells.append([f"{row.calls_mean:.2f}", f"{calls:.2f}", *shown, ratio])
    return table(head, cells)


def _spread(value: Spread, scale: float, unit: str) -> str:
    return f"{value.median * scale:.2f}{unit} [{value.low * scale:.2f}, {value.high * scale:.2f}]"


def timing_table(timings: Sequence[Timing]) -> str:
    """Return speed-ups in calls and on the clock, one row per batch size; median and quartiles."""
    rows = [
        [
            str(timing.batch_size),
            f"{timing.base_calls:.2f} → {timing.tuned_calls:.2f}",
            f"{timing.call_speedup:.2f}×",
            _spread(timing.base_seconds, 1000.0, " ms"),
            _spread(timing.tuned_seconds, 1000.0, " ms"),
            _spread(timing.speedup, 1.0, "×"),
        ]
        for timing in timings
    ]
    head = ["batch", "calls of a batch", "fewer calls", "base", "tuned", "wall-clock speed-up"]
    return table(head, rows)


def latency_table(latencies: Sequence[Latency]) -> str:
    """Return the time of an image, one row per system and setting; median and quartiles."""
    rows = [
        [one.label, f"{one.setting:g}", str(one.batch_size), _spread(one.milliseconds, 1.0, " ms")] for one in latencies
    ]
    return table(["system", "setting", "batch", "an image"], rows)
