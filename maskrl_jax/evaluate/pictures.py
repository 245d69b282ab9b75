"""Figures of samples: base beside tuned, and the order in which tokens appear."""

import pathlib
import textwrap
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.ticker import MaxNLocator

from maskrl_jax.evaluate import canvas
from maskrl_jax.sampling.maskgit import GIVEN

MASKED = np.array([208, 213, 217], np.uint8)
STRIPE = np.array([183, 190, 196], np.uint8)
CELL_PIXELS = 16  # of an enlarged token cell: enough for the stripes to show


def _bare(axes) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(visible=False)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _frame(axes, colour: str) -> None:
    for spine in axes.spines.values():
        spine.set(visible=True, color=colour, linewidth=1.6)


def _name_row(axes, name: str, width: int) -> None:
    wrapped = "\n".join(textwrap.fill(line, width) for line in name.splitlines())
    axes.set_ylabel(wrapped, fontsize=8, rotation=0, ha="right", va="center", labelpad=6)


@canvas.styled
def sample_grid(
    path: str | pathlib.Path,
    rows: Mapping[str, np.ndarray],
    captions: Sequence[str],
    right: Mapping[str, np.ndarray] | None = None,
) -> np.ndarray:
    """Draw systems below each other, one column per prompt, caption above; returns uint8 [H, W, 3].

    Args:
      rows: label -> images uint8 [n, H, W, 3]; the same column has the same prompt and the same keys.
      captions: n strings.
      right: label -> bool [n], the verifier's verdict, drawn as tick or cross below the picture.
    """
    count = len(captions)
    wrapped = [textwrap.fill(caption, width=max(10, 100 // count)) for caption in captions]
    lines = max(text.count("\n") + 1 for text in wrapped)
    side = (canvas.WIDTH - 1.1) / count
    mark = 0.2 if right else 0.05
    figure = canvas.new_figure(height=len(rows) * (side + mark) + 0.15 * lines + 0.15)
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0.03, hspace=0.02)
    grid = figure.subplots(len(rows), count, squeeze=False)
    for place, (label, images) in enumerate(rows.items()):
        for column in range(count):
            axes = grid[place, column]
            axes.imshow(images[column], interpolation="nearest")
            _bare(axes)
            if place == 0:
                axes.set_title(wrapped[column], fontsize=7.5, fontweight="normal", loc="center", pad=5)
            if right:
                good = bool(right[label][column])
                colour = canvas.GOOD if good else canvas.BAD
                _frame(axes, colour)
                axes.set_xlabel("✓" if good else "✗", color=colour, labelpad=1, fontsize=9)
        _name_row(grid[place, 0], label, width=12)
    return canvas.save(figure, path)


def _hide_masked(image: np.ndarray, shown_N: np.ndarray) -> np.ndarray:
    """Return the picture enlarged, with striped grey over the token cells that are not shown."""
    side = round(len(shown_N) ** 0.5)
    rows = np.arange(side * CELL_PIXELS)
    enlarged = image[np.ix_(rows * image.shape[0] // len(rows), rows * image.shape[1] // len(rows))]
    shown = np.repeat(np.repeat(shown_N.reshape(side, side), CELL_PIXELS, axis=0), CELL_PIXELS, axis=1)
    stripes = (rows[:, None] + rows[None, :]) % 8 < 3
    cover = np.where(stripes[..., None], STRIPE, MASKED)
    return np.where(shown[..., None], enlarged, cover)


def _calls_shown(calls: int, most: int) -> np.ndarray:
    """Return at most `most` call numbers in 1..calls, the last among them."""
    return np.unique(np.round(np.linspace(1, calls, min(calls, most))).astype(int))


@canvas.styled
def commit_order(
    path: str | pathlib.Path,
    images: np.ndarray,
    commit_step: np.ndarray,
    calls: Sequence[int],
    captions: Sequence[str],
    most: int = 7,
) -> np.ndarray:
    """Draw how pictures fill up call by call, and when each token was committed; returns uint8 [H, W, 3].

    Shown is the finished picture with the cells still masked after that call covered. Decoding the unfinished
    grid is avoided: masked cells have no token, and the decoder would invent their look.

    Args:
      images: uint8 [n, H, W, 3] finished pictures.
      commit_step: [n, N] call of each token from 0, GIVEN of those that were there before; N a square number.
      calls: n calls that each picture took.
      most: calls drawn of a longer row, evenly spread.

    Raises:
      ValueError: if N is not a square number.
    """
    side = round(commit_step.shape[1] ** 0.5)
    if side * side != commit_step.shape[1]:
        raise ValueError(f"commit_step needs a square number of tokens, got {commit_step.shape[1]}")
    columns = max(len(_calls_shown(int(count), most)) for count in calls) + 1
    cell = (canvas.WIDTH - 1.6) / columns
    colours = matplotlib.colormaps["viridis_r"].resampled(int(max(calls)))  # one flat colour per call
    figure = canvas.new_figure(height=len(images) * (cell + 0.22) + 0.25)
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0.03, hspace=0.02)
    grid = figure.subplots(len(images), columns, squeeze=False)
    for place, image in enumerate(images):
        for axes in grid[place]:
            _bare(axes)
        given = commit_step[place] == GIVEN
        for axes, call in zip(grid[place], _calls_shown(int(calls[place]), most), strict=False):
            axes.imshow(_hide_masked(image, given | (commit_step[place] < call)), interpolation="nearest")
            axes.set_title(f"call {call}", fontsize=7.5, fontweight="normal", loc="center", pad=3)
        heat = grid[place, -1]
        order = np.where(given, np.nan, commit_step[place] + 1.0).reshape(side, side)
        drawn = heat.imshow(order, cmap=colours, vmin=0.5, vmax=max(calls) + 0.5, interpolation="nearest")
        heat.set_title("call of each token", fontsize=7.5, fontweight="normal", loc="center", pad=3)
        _name_row(grid[place, 0], captions[place], width=16)
    # Beside the whole grid: beside its last column alone it would take room from that, and its titles would overlap.
    bar = figure.colorbar(drawn, ax=grid, shrink=0.8, aspect=16 * len(images) ** 0.5, pad=0.02)
    bar.ax.yaxis.set_major_locator(MaxNLocator(8, integer=True))
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=7)
    return canvas.save(figure, path)
