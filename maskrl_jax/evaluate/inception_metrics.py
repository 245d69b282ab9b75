"""What the features of two sets of images say: FID, sFID, Inception Score, precision and recall, with their noise."""

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np

from maskrl_jax.convert import files, inception
from maskrl_jax.errors import UserError
from maskrl_jax.evaluate import frechet, image_set, statistics
from maskrl_jax.evaluate.extract import Extracted
from maskrl_jax.evaluate.inception_score import inception_score
from maskrl_jax.evaluate.moments import Moments, merged
from maskrl_jax.evaluate.protocols import FidProtocol
from maskrl_jax.models.inception import POOL

LEVEL = 1.96  # standard errors of a 95 % interval


@dataclasses.dataclass(frozen=True)
class Reference:
    """Real images as far as they are known."""

    pool: statistics.Gaussian
    spatial: statistics.Gaussian | None
    features: np.ndarray | None = None  # float32 [M, 2048] of real images
    declared: bool = True  # that they were made as the protocol asks; a foreign file does not say
    rounding: bool = True  # that this is known of the rounding of floats; a file of ours from before does not say


def kept(protocol: FidProtocol, reference: Reference) -> tuple[str, ...]:
    """Return which features of the samples `measure` needs whole."""
    needed = {
        "pool": "precision" in protocol.metrics and reference.features is not None,
        "logits": "inception_score" in protocol.metrics,
    }
    return tuple(name for name, wanted in needed.items() if wanted)


def standard_error(whole: Callable[[Moments], float], groups: Sequence[Moments]) -> float:
    """Return the delete-one-group jackknife error of a number of moments (Efron 1982, ch. 3).

    It is the noise of the samples alone: not that of the reference, nor the bias that few samples bring.
    """
    count = len(groups)
    left_out = [whole(merged(g for i, g in enumerate(groups) if i != index)) for index in range(count)]
    return float(np.sqrt((count - 1) * np.var(left_out)))


def share_interval(share: float, count: int) -> tuple[float, float]:
    """Return the 95 % bounds of a share of `count` independent samples (Wilson 1927)."""
    denominator = 1 + LEVEL**2 / count
    centre = share + LEVEL**2 / (2 * count)
    width = LEVEL * math.sqrt(share * (1 - share) / count + LEVEL**2 / (4 * count**2))
    return max((centre - width) / denominator, 0.0), min((centre + width) / denominator, 1.0)


def measure(samples: Extracted, reference: Reference, protocol: FidProtocol) -> dict[str, dict[str, float]]:
    """Return the metrics of a protocol that can be measured; `remarks` tells of the others.

    A distance has a standard error where there are groups of two samples or more.

    Raises:
      ValueError: with too few samples for a covariance, a split or k = 3 neighbours.
    """
    found = {}
    pairs = (("fid", samples.pool_groups, reference.pool), ("sfid", samples.spatial_groups, reference.spatial))
    for name, groups, gaussian in pairs:
        if name in protocol.metrics and gaussian is not None:
            found[name] = _distance(groups, gaussian)
    if "inception_score" in protocol.metrics:
        splits = protocol.score_splits(samples.count)
        mean, deviation = inception_score(samples.logits, splits)
        found["inception_score"] = {"value": mean, "deviation": deviation, "splits": len(splits)}
    if "precision" in protocol.metrics and reference.features is not None:
        shares = frechet.precision_recall(reference.features, samples.pool)
        counts = {"precision": samples.count, "recall": len(reference.features)}
        for (name, count), share in zip(counts.items(), shares, strict=True):
            low, high = share_interval(share, count)
            found[name] = {"value": share, "low": low, "high": high}
    return found


def _distance(groups, gaussian) -> dict[str, float]:
    distance = frechet.distance_from(*gaussian)

    def of(moments):
        return distance(moments.mean, moments.covariance)

    found = {"value": of(merged(groups))}
    if len(groups) > 1 and min(group.count for group in groups) > 1:
        found |= {"standard_error": standard_error(of, groups), "groups": len(groups)}
    return found


def remarks(samples: Extracted, reference: Reference, protocol: FidProtocol) -> list[str]:
    """Say in a sentence each what keeps the numbers from being comparable or complete."""
    notes = []
    if samples.count != protocol.samples:
        notes.append(f"{samples.count} samples; numbers published under this protocol use {protocol.samples}")
    if samples.count <= POOL:
        notes.append(f"no more samples than the {POOL} dimensions of a feature: the distance is mostly bias")
    if not reference.declared:
        notes.append("the file of statistics does not say how it was made; that it fits this protocol is not checked")
    elif not reference.rounding:
        notes.append("the file of statistics does not say how floats were rounded; it was written before that was kept")
    if "sfid" in protocol.metrics and reference.spatial is None:
        notes.append("no sFID: the statistics hold no mu_s and sigma_s")
    if "precision" in protocol.metrics and reference.features is None:
        notes.append("no precision and recall: the reference holds statistics and no images")
    return notes


def read_weights(path: str, expected: str | None = None) -> tuple[dict, dict]:
    """Return (variables of InceptionV3, what the result says of their file).

    UserError where the sum is not `expected`, by default the published one.
    """
    found = files.sha256_of(path)
    if found != (expected or inception.PUBLISHED_SHA256).lower():
        source = "--weights_sha256" if expected else "the published checkpoint"
        raise UserError(
            f"{path} has SHA-256 {found}, which is not that of {source}; "
            "if the file is the one you mean, pass this sum as --weights_sha256"
        )
    known = {"path": path, "sha256": found, "published": found == inception.PUBLISHED_SHA256}
    return inception.params_of(files.read(path)), known


def read_reference(
    path: str, protocol: FidProtocol, run: Callable[[image_set.ImageSet, tuple[str, ...]], Extracted]
) -> tuple[Reference, dict]:
    """Return the reference and what the result says of it; `run` extracts from images, keeping what is named."""
    keep = ("pool",) if "precision" in protocol.metrics else ()
    if not statistics.holds_statistics(path):
        found = run(image_set.open_images(path), keep)
        pool, spatial = ((m.mean, m.covariance) for m in found.moments)
        facts = {"path": path, "kind": "images", "sha256": found.sha256, "count": found.count}
        return Reference(pool, spatial, found.pool), facts
    stored = statistics.read(path, protocol)
    facts = {"path": path, "kind": "statistics", "sha256": files.sha256_of(path), "count": stored.count}
    features = None
    if keep and stored.images:
        found = run(image_set.open_images(path), keep)
        features, facts = found.pool, facts | {"images": found.count}
    return Reference(stored.pool, stored.spatial, features, stored.declared, stored.rounding), facts
