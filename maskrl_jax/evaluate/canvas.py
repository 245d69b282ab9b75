"""The look that all figures share, and how one is written. No pyplot: nothing global stays open."""

import io
import os

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from maskrl_jax import paths

# Okabe and Ito's palette: told apart with every common colour blindness. The base comes first, in grey.
COLOURS = ("#5b6670", "#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
MARKERS = ("o", "D", "s", "^", "v", "P", "X", "*")
INK, QUIET, GRID = "#22272b", "#6b7680", "#e3e7ea"
GOOD, BAD = "#00795c", "#b3430a"
WIDTH = 8.4  # inches; with the resolution below 1260 pixels, legible at the width of a report

STYLE = {
    "figure.dpi": 150,
    "savefig.dpi": 150,
    "figure.facecolor": "white",
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "text.color": INK,
    "axes.edgecolor": QUIET,
    "axes.labelcolor": INK,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 8,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "lines.linewidth": 1.7,
    "lines.markersize": 4.5,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
}
styled = matplotlib.rc_context(STYLE)  # a decorator that puts back the caller's settings


def new_figure(height: float, width: float = WIDTH) -> Figure:
    """Return an empty figure of the given inches on an Agg canvas."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def small_multiples(figure: Figure, count: int, columns: int, xlabel: str) -> list:
    """Return `count` axes in rows of at most `columns`; the lowest of each column gets the x label."""
    columns = min(columns, count)
    axes = [figure.add_subplot(-(-count // columns), columns, index + 1) for index in range(count)]
    for lowest in axes[-columns:]:
        lowest.set_xlabel(xlabel)
    return axes


def save(figure: Figure, path: str | os.PathLike) -> np.ndarray:
    """Write the figure as PNG and return the same pixels, uint8 [H, W, 3]."""
    packed = io.BytesIO()
    # Without a version string in the file the same figure gives the same bytes.
    figure.savefig(packed, format="png", metadata={"Software": None})
    paths.write(path, packed.getvalue())
    return np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()
