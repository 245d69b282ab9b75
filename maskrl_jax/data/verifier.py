"""The exact verifier of `shapes`: does a picture show what its caption says? In the manner of GenEval.

Five scores in [0, 1], each against the caption's things (one or two):
  presence  as many objects as wanted: 1 - |found - wanted| / wanted, at least 0
  shape     share of the wanted shapes that were found, each object counted once
  colour    the same for colours
  binding   the same for (shape, colour) together
  position  the relation holds between two objects that are the things named; for a single thing: binding
`graded` is their mean. `strict` is 1 where all five are 1, which takes the exact number of objects: a broken,
doubled or foreign object counts as one more. `count` is the number found, `coherence` says whether the
background has one tone.
"""

from collections import Counter

import numpy as np

from maskrl_jax.data import captions, detect

SCORES = ("presence", "shape", "colour", "binding", "position")
COHERENT = 0.99  # share of the background that must have one tone; a single wrong cell of 4 x 4 is below it


def verify(images: np.ndarray, prompts: list[str]) -> dict[str, np.ndarray]:
    """Score images [B, H, W, 3] in [0, 1] against their captions: a dict of float32 [B].

    Raises UserError for a caption outside the grammar, ValueError where the two do not match in number.
    """
    if len(images) != len(prompts):
        raise ValueError(f"{len(images)} images but {len(prompts)} prompts")
    classes_BHW = detect.pixel_classes(images)
    objects = detect.find_objects(classes_BHW)
    starts = np.searchsorted(objects.picture, np.arange(len(images) + 1))
    rows = []
    for prompt, start, stop in zip(prompts, starts[:-1], starts[1:], strict=True):
        found = detect.Objects(*(column[start:stop] for column in objects))
        rows.append(_scores(captions.parse(prompt), found))
    scores = np.array(rows, np.float32).reshape(-1, len(SCORES))
    return dict(zip(SCORES, scores.T, strict=True)) | {
        "graded": scores.mean(axis=1),
        "strict": (scores == 1).all(axis=1).astype(np.float32),
        "count": np.diff(starts).astype(np.float32),
        "coherence": _coherence(classes_BHW),
    }


def _scores(caption: captions.Caption, found: detect.Objects) -> tuple[float, ...]:
    """Return the five scores of one picture, in the order of SCORES."""
    wanted = [(thing.shape, thing.colour) for thing in caption.things]
    kinds = list(zip(found.shape.tolist(), found.colour.tolist(), strict=True))
    presence = max(0.0, 1 - abs(len(kinds) - len(wanted)) / len(wanted))
    shape = _share([kind[0] for kind in wanted], [kind[0] for kind in kinds])
    colour = _share([kind[1] for kind in wanted], [kind[1] for kind in kinds])
    binding = _share(wanted, kinds)
    if caption.relation is None:
        return presence, shape, colour, binding, binding
    places = [[m for m, kind in zip(found.middle, kinds, strict=True) if kind == thing] for thing in wanted]
    position = any(_holds(caption.relation, a, b) for a in places[0] for b in places[1])
    return presence, shape, colour, binding, float(position)


def _share(wanted: list, found: list) -> float:
    """Return the share of `wanted` that `found` holds, with multiplicity."""
    return (Counter(wanted) & Counter(found)).total() / len(wanted)


def _holds(relation: int, first: np.ndarray, second: np.ndarray) -> bool:
    """Say whether the offset points along the relation, and more along it than across."""
    step = np.array(captions.RELATION_STEPS[relation])
    along, across = (second - first) @ step, abs((second - first) @ step[::-1])
    return bool(along > across)


def _coherence(classes_BHW: np.ndarray) -> np.ndarray:
    """Return 1 where the background has one tone, else 0; float32 [B]. A picture without background has 0."""
    light, grey = ((classes_BHW == detect.FIRST_TONE + tone).sum(axis=(1, 2)) for tone in range(2))
    return (np.maximum(light, grey) / np.maximum(light + grey, 1) >= COHERENT).astype(np.float32)
