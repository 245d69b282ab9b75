"""Draw the standard figures of a run into its workdir."""

import dataclasses
import os
from collections.abc import Mapping, Sequence

import numpy as np
from etils import epath

from maskrl_jax.evaluate import curve, figures, pictures, tables
from maskrl_jax.evaluate.measure import Point

PANELS = {
    "Training reward": {
        "reward/quality": "quality",
        "reward/total": "all that is trained on",
        "reward/speed": "speed",
    },
    "Held out: never trained on": {
        "reward_heldout/graded": "verifier, graded",
        "reward_heldout/strict": "verifier, all right",
        **{f"reward_heldout/{name}": tables.HEADS[name] for name in curve.CLIP},
    },
    "Mean network calls of a rollout": {"sampling/calls": "calls"},
    "KL from the base": {"rl/kl": "KL"},
    "Loss": {"train/loss": "loss"},
}


@dataclasses.dataclass(frozen=True)
class Illustration:
    """One written figure: its path relative to the report, its caption, its pixels for TensorBoard."""

    path: str
    caption: str
    image: np.ndarray = dataclasses.field(repr=False)  # uint8 [H, W, 3]


def _nearest_calls(points: Sequence[Point], calls: float) -> Point:
    return min(points, key=lambda point: abs(point.calls_mean - calls))


def shown_points(
    points: Sequence[Point], reference: Point, tuned: str, equality: curve.Equality | None, setting: float | None = None
) -> list[Point]:
    """Pick what is drawn as pictures, all of the reference's seed.

    With a tuned system: the reference, the base at about the calls of the tuned one, the tuned one at the setting
    that the verdict speaks of, which `setting` names where it is not that of T*. Without: the reference and the base at a quarter of its calls or the nearest to it.
    """
    same_seed = [point for point in points if point.seed == reference.seed]
    base = [point for point in same_seed if point.system == reference.system]
    own = [point for point in same_seed if point.system == tuned]
    if not own:
        few = _nearest_calls(base, reference.calls_mean / 4)
        return [reference] if few.setting == reference.setting else [reference, few]
    setting = curve.of_the_verdict(equality).setting if setting is None else setting
    chosen = next(point for point in own if point.setting == setting)
    beside = _nearest_calls(base, chosen.calls_mean)
    return [reference, chosen] if beside.setting == reference.setting else [reference, beside, chosen]


def _row_label(point: Point) -> str:
    return f"{point.label}\n{point.calls_mean:.1f} calls"


def _grid(path: os.PathLike, shown: Sequence[Point], prompts: Sequence[str]) -> np.ndarray:
    count = min(8, *(len(point.kept["images"]) for point in shown))
    rows = {_row_label(point): point.kept["images"][:count] for point in shown}
    right = None
    if all("strict" in point.metrics for point in shown):
        # Pictures kept are the first sample of each prompt.
        first = [point.per_sample["strict"][:: point.group][:count] for point in shown]
        right = {label: verdict > 0.5 for label, verdict in zip(rows, first, strict=True)}
    return pictures.sample_grid(path, rows, prompts[:count], right)


def _order(path: os.PathLike, point: Point, prompts: Sequence[str]) -> np.ndarray:
    rows = slice(min(4, len(point.kept["images"])))
    kept = point.kept
    return pictures.commit_order(path, kept["images"][rows], kept["commit_step"][rows], kept["calls"][rows], prompts)


def _histograms(points: Sequence[Point], seed: int) -> dict[str, dict[int, int]]:
    own = sorted((point for point in points if point.seed == seed), key=lambda point: point.calls_mean)
    return {f"{point.label}, setting {point.setting:g}": point.calls_histogram for point in own}


def illustrate(
    workdir: str | os.PathLike,
    points: Sequence[Point],
    reference: Sequence[Point],
    prompts: Sequence[str],
    *,
    tuned: str = "",
    equality: curve.Equality | None = None,
    setting: float | None = None,
    logged: Sequence[Mapping[str, float]] = (),
    panels: Mapping[str, Mapping[str, str]] = PANELS,
) -> list[Illustration]:
    """Draw curves, call histogram, sample grid, commit order and training curves into `<workdir>/figures`.

    Pictures are left out where the points kept none, the training curves where nothing was logged.
    `tuned` names the tuned system, "" for a plain base model; `setting` is the one whose pictures are shown, by default
    that of T*; `logged` are the lines of metrics.jsonl.
    """
    root, drawn = epath.Path(workdir), []

    def add(name: str, caption: str, draw, *arguments) -> None:
        image = draw(root / "figures" / name, *arguments)
        if image is not None:
            drawn.append(Illustration(f"figures/{name}", caption, image))

    curves = "Quality against network calls. Bands: 95 % bootstrap bounds (of set distances: range over seeds)."
    metrics = tables.headline_metrics(points)
    add("quality_vs_calls.png", curves, figures.quality_curves, points, metrics, reference, equality)
    shown = shown_points(points, reference[0], tuned, equality, setting)
    if all(len(point.kept["images"]) for point in shown):
        marks = " Marks: the exact verifier." if "strict" in shown[0].metrics else ""
        add("samples.png", f"Same prompts and same keys in every row.{marks}", _grid, shown, prompts)
        order = f"How {shown[-1].label} fills a picture; cells still masked after a call are grey."
        add("commit_order.png", order, _order, shown[-1], prompts)
    rows = _histograms([point for point in points if tuned and point.system == tuned], reference[0].seed)
    if rows:
        spread = "How many calls single samples took."
        add("calls_histogram.png", spread, figures.calls_histogram, rows, reference[0].calls_mean)
    series = figures.logged_series(logged)
    add("training.png", "Training, as logged in metrics.jsonl.", figures.training_curves, series, panels)
    return drawn
