"""Whether pictures are distributed like real ones: the energy distance as a reward against collapse (our choice).

The energy distance of generated X and real Y is 2 E|X-Y| - E|X-X'| - E|Y-Y'|; it is 0 only where both are
distributed alike (Szekely and Rizzo 2013). Pictures are compared by the root mean square difference of their
SIDE x SIDE block means, so in [0, 1] for pictures in [0, 1]: layout, colours and tone count, texture does not.
"""

from collections.abc import Sequence

import numpy as np

SIDE = 4
SCOPES = ("all", "prompt")  # what a picture is compared with: all pictures, or those of its own prompt


def blocks(images_BHWC: np.ndarray) -> np.ndarray:
    """Block means of pictures, float32 [B, SIDE*SIDE*C]. Sides must be multiples of SIDE (ValueError)."""
    size, height, width, channels = images_BHWC.shape
    if height % SIDE or width % SIDE:
        raise ValueError(f"pictures of {height} x {width} do not divide into {SIDE} x {SIDE} blocks")
    means = images_BHWC.reshape(size, SIDE, height // SIDE, SIDE, width // SIDE, channels).mean((2, 4))
    return means.reshape(size, -1).astype(np.float32)


def witness(ours_BD: np.ndarray, real_RD: np.ndarray, others_GD: np.ndarray | None = None) -> np.ndarray:
    """What a picture does for the match: its mean distance to generated less that to real ones, float32 [B].

    Minus half the slope of the energy distance in the share of such pictures: positive for what is generated
    too rarely, negative for what is too frequent, and in expectation equal for all where both are distributed
    alike and drawn independently. `others_GD` are the generated ones; without them, all of `ours_BD` but the
    picture itself. A picture with a number that is not finite is worth NaN, and counts for no other.

    Rollouts of P captions in groups of G are not drawn independently: a picture's own caption has a share of
    (G-1)/(B-1) of the generated side and of 1/P of the real side, so a small systematic part remains that pays
    for being unlike the other pictures of one's caption.
    """
    if others_GD is None:
        others = _finite(ours_BD)
        generated = _distances(ours_BD, others).sum(1) / max(len(others) - 1, 1)
    else:
        generated = _distances(ours_BD, _finite(others_GD)).mean(1)
    return np.float32(generated - _distances(ours_BD, real_RD).mean(1))


def witness_of_groups(ours_BD: np.ndarray, reals: Sequence[np.ndarray]) -> np.ndarray:
    """The same within each prompt: groups in their order, each against real pictures of its prompt, float32 [B].

    `reals` holds an array [R,D] of every group, R may differ. What the prompt fixes cancels, so that layouts and
    background tones are seen, which drown in colours where all prompts are compared at once.
    """
    groups = np.split(ours_BD, len(reals))
    return np.concatenate([witness(ours, real) for ours, real in zip(groups, reals, strict=True)])


def energy_distance(ours_BD: np.ndarray, real_RD: np.ndarray) -> float:
    """Energy distance of two samples, unbiased; at least two finite rows of each."""
    ours_BD = _finite(ours_BD)
    pairs = [_distances(x, x).sum() / (len(x) * (len(x) - 1)) for x in (ours_BD, real_RD)]
    return float(2 * _distances(ours_BD, real_RD).mean() - sum(pairs))


def _finite(rows_BD: np.ndarray) -> np.ndarray:
    return rows_BD[np.isfinite(rows_BD).all(1)]


def _distances(left_AD: np.ndarray, right_BD: np.ndarray) -> np.ndarray:
    """Root mean square differences [A,B], float64: in float32 the root makes 3e-4 of the rounding of equal rows."""
    left_AD, right_BD = np.float64(left_AD), np.float64(right_BD)
    squares = (left_AD**2).mean(1)[:, None] + (right_BD**2).mean(1) - 2 * left_AD @ right_BD.T / left_AD.shape[1]
    return np.sqrt(np.maximum(squares, 0))
