"""What pictures look like, whatever they show: numbers that move when a reward is hacked (our choice)."""

import numpy as np

EDGE = 0.1  # step of the brightness between neighbours that counts as an edge
NAMES = ("edge_density", "colour_entropy", "saturation", "token_entropy", "group_diversity")
COLOURS = 4  # levels of a channel in the colour histogram


def edge_density(images_BHWC: np.ndarray) -> np.ndarray:
    """Share of neighbouring pixel pairs whose brightness differs by more than EDGE, [B]."""
    luma = images_BHWC.mean(-1)
    steps = [np.abs(np.diff(luma, axis=axis)).reshape(len(luma), -1) > EDGE for axis in (1, 2)]
    return np.concatenate(steps, axis=1).mean(1)


def colour_entropy(images_BHWC: np.ndarray) -> np.ndarray:
    """Entropy of each picture's histogram of COLOURS^3 colours, nats, [B]."""
    levels = np.minimum((np.clip(images_BHWC, 0, 1) * COLOURS).astype(int), COLOURS - 1)
    bins = (levels * COLOURS ** np.arange(3)).sum(-1).reshape(len(images_BHWC), -1)
    return np.array([_entropy(np.bincount(row)) for row in bins])


def saturation(images_BHWC: np.ndarray) -> np.ndarray:
    """Mean saturation (of HSV) of each picture, [B]."""
    high, low = images_BHWC.max(-1), images_BHWC.min(-1)
    return ((high - low) / np.maximum(high, 1e-3)).mean((1, 2))


def token_entropy(ids_BN: np.ndarray) -> float:
    """Entropy of the codes that a batch uses, nats."""
    return _entropy(np.bincount(ids_BN.reshape(-1)))


def group_diversity(blocks_BD: np.ndarray, group: int) -> float:
    """Mean root mean square difference of pictures of one prompt; groups are neighbours, of at least two."""
    grouped = blocks_BD.reshape(-1, group, blocks_BD.shape[-1])
    squares = ((grouped[:, :, None] - grouped[:, None]) ** 2).mean(-1)
    return float(np.sqrt(squares).sum((1, 2)).mean() / (group * (group - 1)))


def describe(images_BHWC: np.ndarray, ids_BN: np.ndarray, blocks_BD: np.ndarray, group: int) -> dict[str, float]:
    """All of the above as means over a batch; NaN of an empty one."""
    if not len(images_BHWC):
        return dict.fromkeys(NAMES, float("nan"))
    values = (
        edge_density(images_BHWC).mean(),
        colour_entropy(images_BHWC).mean(),
        saturation(images_BHWC).mean(),
        token_entropy(ids_BN),
        group_diversity(blocks_BD, group),
    )
    return {name: float(value) for name, value in zip(NAMES, values, strict=True)}


def _entropy(counts: np.ndarray) -> float:
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log(share)).sum())
