"""Figures of MaskFocus: which steps were chosen over training, and the curve that chooses them.

Steps count from 1 here as in tables, in the tags of logged series from 0.
"""

import pathlib
import re
from collections.abc import Mapping

import numpy as np
from matplotlib.ticker import MaxNLocator

from maskrl_jax.evaluate import canvas

CHOSEN, SIMILARITY = "critical/chosen", "critical/similarity"


def by_step(series: Mapping[str, tuple[np.ndarray, np.ndarray]], tag: str) -> tuple[np.ndarray, np.ndarray]:
    """Collect tags `<tag>@<sampling step>` of logged series: (updates [U], values [U, S]); empty without any."""
    found = {int(match[1]): name for name in series if (match := re.fullmatch(rf"{tag}@(\d+)", name))}
    if not found:
        return np.zeros(0), np.zeros((0, 0))
    names = [found[step] for step in sorted(found)]
    return series[names[0]][0], np.stack([series[name][1] for name in names], axis=1)


@canvas.styled
def chosen_steps(
    path: str | pathlib.Path, series: Mapping[str, tuple[np.ndarray, np.ndarray]], candidates: int
) -> np.ndarray | None:
    """Draw how often each sampling step was chosen, update by update; returns uint8 [H, W, 3].

    The share of samples that had it among their K; None where nothing was logged.
    """
    updates, share_US = by_step(series, CHOSEN)
    if not len(updates):
        return None
    figure = canvas.new_figure(height=2.6)
    axes = figure.subplots()
    edges = _edges(updates)
    mesh = axes.pcolormesh(
        edges, np.arange(candidates + 1) + 0.5, share_US[:, :candidates].T, cmap="Blues", vmin=0, vmax=1
    )
    axes.set_xlabel("update")
    axes.set_ylabel("sampling step")
    axes.yaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.grid(visible=False)
    figure.colorbar(mesh, ax=axes, label="share of samples", pad=0.01)
    return canvas.save(figure, path)


def _edges(centres: np.ndarray) -> np.ndarray:
    """Return the borders of cells around rising centres."""
    if len(centres) == 1:
        return np.array([centres[0] - 0.5, centres[0] + 0.5])
    middle = (centres[1:] + centres[:-1]) / 2
    return np.concatenate([[2 * centres[0] - middle[0]], middle, [2 * centres[-1] - middle[-1]]])


@canvas.styled
def information_gain(
    path: str | pathlib.Path, series: Mapping[str, tuple[np.ndarray, np.ndarray]], masked_share: np.ndarray
) -> np.ndarray | None:
    """Draw S_i and V_i = |S_{i+1} - S_i| at the first and the last tenth of training; returns uint8 [H, W, 3].

    `masked_share` [T+1]: share of tokens that are masked before every step. None where nothing was logged.
    """
    updates, similarity_US = by_step(series, SIMILARITY)
    if not len(updates):
        return None
    tenth = max(len(updates) // 10, 1)
    figure = canvas.new_figure(height=2.6)
    left, right = figure.subplots(1, 2)
    for place, (name, rows) in enumerate({"first": slice(tenth), "last": slice(-tenth, None)}.items()):
        similarity = similarity_US[rows].mean(0)
        gain = np.abs(np.diff(similarity))
        look = {"color": canvas.COLOURS[1 + place], "marker": canvas.MARKERS[place], "markersize": 3}
        left.plot(1 + np.arange(len(similarity)), similarity, label=f"{name} updates", **look)
        right.plot(1 + np.arange(len(gain)), gain, label=f"{name} updates", **look)
    steps = np.arange(similarity_US.shape[1])
    left.plot(1 + steps, masked_share[steps], color=canvas.QUIET, linestyle=(0, (1.5, 1.5)), label="share masked")
    left.set_title("Similarity of the prediction to the final image")
    right.set_title("Information gain of a step")
    for axes in (left, right):
        axes.set_xlabel("sampling step")
        axes.legend()
    return canvas.save(figure, path)
