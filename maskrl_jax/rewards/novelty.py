"""How much a picture differs from the others of its prompt: a reward against collapse (our choice)."""

import numpy as np

SIDE = 4  # pictures are compared at this many cells a side: layout and tone, no texture


def novelty(images_PGHWC: np.ndarray) -> np.ndarray:
    """Mean distance of every picture to the others of its group, float32 [P,G].

    The distance of two pictures is the root mean square difference of their SIDE x SIDE block means, so it lies in
    [0, 1] for pictures in [0, 1]. Of two kinds of picture in a group, the rarer one scores higher: as a reward it
    drives their shares together. Sides of pictures must be multiples of SIDE (ValueError).
    """
    groups, size, height, width, channels = images_PGHWC.shape
    if height % SIDE or width % SIDE:
        raise ValueError(f"pictures of {height} x {width} do not divide into {SIDE} x {SIDE} blocks")
    blocks = images_PGHWC.reshape(groups, size, SIDE, height // SIDE, SIDE, width // SIDE, channels).mean((3, 5))
    flat = blocks.reshape(groups, size, -1)
    distance = np.sqrt(((flat[:, :, None] - flat[:, None]) ** 2).mean(-1))
    return (distance.sum(-1) / max(size - 1, 1)).astype(np.float32)
