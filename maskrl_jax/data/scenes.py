"""Scenes of the embedded task: how they are drawn at random and painted.

The settings follow a measured study of what a small model learns on two cores: 32 x 32 pixels, 8 x 8 cells,
every object a stamp of 3 x 3 cells centred on a cell, crisp pixels, two background tones that the caption
does not name. The stamps are built so that few distinct cells exist (a square and a cross are whole cells, a
triangle repeats one diagonal cell): the whole task needs fewer cells than a tokenizer of 96 codes can hold.
"""

import functools
from dataclasses import dataclass

import numpy as np

from maskrl_jax.data.captions import COLOURS, RELATION_STEPS, RELATIONS, SHAPES, Caption, Thing

IMAGE_SIZE = 32
CELL = 4
GRID = IMAGE_SIZE // CELL
STAMP = 3 * CELL
SINGLE_FRACTION = 0.25
COLOUR_RGB = np.array([(214, 48, 49), (46, 160, 67), (52, 101, 222), (245, 205, 40)], np.uint8)
TONE_RGB = np.array([(236, 236, 236), (150, 150, 150)], np.uint8)  # light, grey


@dataclass(frozen=True)
class Scene:
    """A caption with the centre cell (row, column) of each of its things, and a background tone."""

    caption: Caption
    centres: tuple[tuple[int, int], ...]
    tone: int


@functools.cache
def stamps() -> np.ndarray:
    """Return the masks of all shapes, bool [shape, STAMP, STAMP], in the order of SHAPES."""
    row, column = np.mgrid[:STAMP, :STAMP]
    middle = (STAMP - 1) / 2
    circle = (row - middle) ** 2 + (column - middle) ** 2 <= (STAMP / 2) ** 2
    square = np.ones_like(circle)
    triangle = column <= row
    cross = (row // CELL == 1) | (column // CELL == 1)
    masks = np.stack([circle, square, triangle, cross])
    masks.setflags(write=False)  # shared by all callers
    return masks


@functools.cache
def layouts() -> tuple[tuple[tuple[tuple[int, int], tuple[int, int]], ...], ...]:
    """List, for each relation, all pairs of centres that leave a free cell between the stamps.

    The offset along the relation is larger than the one across it, so that no pair reads two ways.
    """
    inside = range(1, GRID - 1)
    cells = [(row, column) for row in inside for column in inside]
    return tuple(tuple((a, b) for a in cells for b in cells if _apart(a, b, step)) for step in RELATION_STEPS)


def _apart(first: tuple[int, int], second: tuple[int, int], step: tuple[int, int]) -> bool:
    offset = (second[0] - first[0], second[1] - first[1])
    along = offset[0] * step[0] + offset[1] * step[1]
    across = abs(offset[0] * step[1] + offset[1] * step[0])
    return along > 3 and along > across


def sample(rng: np.random.Generator) -> Scene:
    """Draw a scene: a quarter hold one thing, the rest two that differ in shape or colour."""
    tone = int(rng.integers(len(TONE_RGB)))
    kinds = len(SHAPES) * len(COLOURS)
    first = int(rng.integers(kinds))
    if rng.random() < SINGLE_FRACTION:
        centre = tuple(int(i) for i in rng.integers(1, GRID - 1, 2))
        return Scene(Caption((_thing(first),)), (centre,), tone)
    second = (first + 1 + int(rng.integers(kinds - 1))) % kinds
    relation = int(rng.integers(len(RELATIONS)))
    places = layouts()[relation]
    centres = places[rng.integers(len(places))]
    return Scene(Caption((_thing(first), _thing(second)), relation), centres, tone)


def _thing(kind: int) -> Thing:
    return Thing(*divmod(kind, len(COLOURS)))


def render(scene: Scene) -> np.ndarray:
    """Paint a scene, uint8 [IMAGE_SIZE, IMAGE_SIZE, 3]."""
    image = np.empty((IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    image[:] = TONE_RGB[scene.tone]
    for thing, (row, column) in zip(scene.caption.things, scene.centres, strict=True):
        top, left = CELL * (row - 1), CELL * (column - 1)
        image[top : top + STAMP, left : left + STAMP][stamps()[thing.shape]] = COLOUR_RGB[thing.colour]
    return image


def cell_map(scene: Scene) -> np.ndarray:
    """Return int32 [GRID, GRID]: 1 + 4 * shape + colour at the centre cell of each thing, 0 elsewhere."""
    cells = np.zeros((GRID, GRID), np.int32)
    for thing, centre in zip(scene.caption.things, scene.centres, strict=True):
        cells[centre] = 1 + len(COLOURS) * thing.shape + thing.colour
    return cells
