"""Finding objects without learning: colour classes, connected parts, template overlap (our choice)."""

import functools
from typing import NamedTuple

import numpy as np
from scipy import ndimage

from maskrl_jax.data.scenes import COLOUR_RGB, STAMP, TONE_RGB, stamps

LEVELS = 32  # steps per channel of the colour table
MAX_RESIDUAL = 0.3  # RGB distance from every mix of palette colour and tone above which a pixel is foreign
MIX_PENALTY = 0.1  # added distance of an even mix: a noisy grey is grey, not half light and half green
MIN_AREA = 8  # smaller parts are specks; half a cell is not
MIN_OVERLAP = 0.9  # intersection over union with the best shape: a whole cell missing or added falls below
NUM_COLOURS = len(COLOUR_RGB)
FOREIGN = NUM_COLOURS  # colour of what is none of the palette's
FIRST_TONE = NUM_COLOURS + 1
UNKNOWN = -1  # shape of what fits no template
SIDES = np.array([[[0] * 3] * 3, [[0, 1, 0], [1, 1, 1], [0, 1, 0]], [[0] * 3] * 3], bool)  # not across pictures


class Objects(NamedTuple):
    """All objects of a batch, one entry each; colour may be FOREIGN, shape UNKNOWN."""

    picture: np.ndarray
    colour: np.ndarray
    shape: np.ndarray
    middle: np.ndarray  # [objects, 2] row and column of the bounding box' middle


@functools.cache
def _colour_table() -> np.ndarray:
    """Return the class of every colour, uint8 [LEVELS, LEVELS, LEVELS].

    A colour lies on the line from a tone to a palette colour where an edge is blurred; it belongs to the
    nearer end of the nearest line, so that a blurred edge stays where it was on either tone.
    """
    rgb = np.stack(np.meshgrid(*[np.linspace(0, 1, LEVELS)] * 3, indexing="ij"), axis=-1)
    lines = [(k, t) for k in range(NUM_COLOURS) for t in range(len(TONE_RGB))]
    distances, classes = zip(*[_nearer_end(rgb, colour, tone) for colour, tone in lines], strict=True)
    best = np.argmin(distances, axis=0)[None]
    table = np.take_along_axis(np.stack(classes), best, axis=0)[0]
    far = np.take_along_axis(np.stack(distances), best, axis=0)[0] > MAX_RESIDUAL
    return np.where(far, FOREIGN, table).astype(np.uint8)


def _nearer_end(rgb: np.ndarray, colour: int, tone: int) -> tuple[np.ndarray, np.ndarray]:
    start = TONE_RGB[tone] / 255
    line = COLOUR_RGB[colour] / 255 - start
    share = np.clip((rgb - start) @ line / (line @ line), 0, 1)
    distance = np.linalg.norm(rgb - start - share[..., None] * line, axis=-1)
    distance = distance + MIX_PENALTY * 4 * share * (1 - share)
    return distance, np.where(share > 0.5, colour, FIRST_TONE + tone)


def pixel_classes(images: np.ndarray) -> np.ndarray:
    """Return the class of every pixel of images [B, H, W, 3] in [0, 1]: uint8 [B, H, W].

    Classes are the palette colours, FOREIGN and FIRST_TONE + tone. Values outside [0, 1] are clipped, NaN is
    0.
    """
    level = np.round(np.clip(np.nan_to_num(images), 0, 1) * (LEVELS - 1)).astype(np.intp)
    return _colour_table()[level[..., 0], level[..., 1], level[..., 2]]


def find_objects(classes_BHW: np.ndarray) -> Objects:
    """Return every connected part of one colour and the shape that it fits, in the order of the pictures."""
    found = [_parts(classes_BHW == colour, colour) for colour in range(FOREIGN + 1)]
    joined = Objects(*(np.concatenate(column) for column in zip(*found, strict=True)))
    order = np.argsort(joined.picture, kind="stable")
    return Objects(*(column[order] for column in joined))


def _parts(mask_BHW: np.ndarray, colour: int) -> Objects:
    label_BHW, _ = ndimage.label(mask_BHW, SIDES)
    area = np.bincount(label_BHW.ravel())
    boxes = ndimage.find_objects(label_BHW)
    kept = np.flatnonzero(area[1:] >= MIN_AREA) + 1
    corners = [[(s.start, s.stop) for s in boxes[i - 1]] for i in kept]
    bounds = np.array(corners, int).reshape(-1, 3, 2)  # of picture, row, column
    picture, middle = bounds[:, 0, 0], bounds[:, 1:].sum(axis=-1) / 2
    shape = _fit(label_BHW, picture, kept, area[kept], middle)
    return Objects(picture, np.full(len(kept), colour), shape, middle)


def _fit(label_BHW, picture, label, area, middle) -> np.ndarray:
    """Return the shape of each part: the template that overlaps best, a pixel around its bounding box."""
    margin, side = STAMP, STAMP + 2
    padded = np.pad(label_BHW, ((0, 0), (margin, margin), (margin, margin)))
    corner = np.floor(middle - STAMP / 2).astype(int) - 1 + margin
    row = corner[:, 0, None, None] + np.arange(side)[:, None]
    column = corner[:, 1, None, None] + np.arange(side)
    part = (padded[picture[:, None, None], row, column] == label[:, None, None]).astype(np.float32)
    templates = stamps().reshape(len(stamps()), -1).T.astype(np.float32)
    shifted = [part[:, i : i + STAMP, j : j + STAMP] for i in range(3) for j in range(3)]
    common = np.max([window.reshape(len(part), STAMP**2) @ templates for window in shifted], axis=0)
    overlap = common / (area[:, None] + templates.sum(0)[None] - common)
    return np.where(overlap.max(axis=1) >= MIN_OVERLAP, overlap.argmax(axis=1), UNKNOWN)
