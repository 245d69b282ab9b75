"""Distances between sets of feature vectors: Frechet distance, precision and recall."""

from collections.abc import Callable

import numpy as np

from maskrl_jax.evaluate.moments import Moments

ROWS_AT_ONCE = 1024  # bounds the distance matrix held in memory


def _symmetric_sqrt(matrix_DD: np.ndarray) -> np.ndarray:
    """Return the root of a symmetric positive semi-definite matrix [D, D]; rounding below zero is cut."""
    values, vectors = np.linalg.eigh(matrix_DD)
    return (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T


def moments(features_MD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean [D] and the unbiased covariance [D, D] of features [M, D] in float64.

    Raises:
      ValueError: with fewer than two rows, or values that are not finite.
    """
    found = Moments.of(features_MD)
    return found.mean, found.covariance


def distance_from(mean_a, cov_a) -> Callable[[np.ndarray, np.ndarray], float]:
    """Return the Frechet distance of a Gaussian (mean [D], covariance [D, D]) from this one, as a function.

    |mean_a - mean_b|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2) (Heusel et al. 2017, eq. 6). The symmetric form of the
    product has real roots, so nothing complex has to be thrown away. The root of A is taken once.
    """
    root_a = _symmetric_sqrt(np.asarray(cov_a, np.float64))

    def distance(mean_b, cov_b) -> float:
        cross = np.linalg.eigvalsh(root_a @ np.asarray(cov_b, np.float64) @ root_a)
        shift = np.asarray(mean_a, np.float64) - np.asarray(mean_b, np.float64)
        trace = np.trace(cov_a) + np.trace(cov_b) - 2.0 * np.sqrt(np.maximum(cross, 0.0)).sum()
        return float(max(shift @ shift + trace, 0.0))

    return distance


def gaussian_distance(mean_a, cov_a, mean_b, cov_b) -> float:
    """Return the Frechet distance of two Gaussians; see `distance_from`."""
    return distance_from(mean_a, cov_a)(mean_b, cov_b)


def frechet_distance(features_a: np.ndarray, features_b: np.ndarray) -> float:
    """Return the Frechet distance between Gaussians fitted to [M, D] and [N, D] features.

    The estimate is biased upwards by an amount that shrinks with the sample count, so only
    distances taken with equal counts may be compared.
    """
    return gaussian_distance(*moments(features_a), *moments(features_b))


def _squared_distances(a_MD: np.ndarray, b_ND: np.ndarray) -> np.ndarray:
    """Return squared Euclidean distances [M, N] in float64, never below zero."""
    squares = (a_MD**2).sum(axis=1)[:, None] + (b_ND**2).sum(axis=1)[None, :]
    return np.maximum(squares - 2.0 * a_MD @ b_ND.T, 0.0)


def _neighbour_radii(points_MD: np.ndarray, k: int) -> np.ndarray:
    """Return each point's squared distance [M] to its k-th nearest other point."""
    radii = np.empty(len(points_MD))
    for start in range(0, len(points_MD), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        distances = _squared_distances(points_MD[rows], points_MD)
        # The point itself is excluded by position: its computed distance is not always exactly 0.
        own = np.arange(len(distances))
        distances[own, start + own] = np.inf
        radii[rows] = np.partition(distances, k - 1, axis=1)[:, k - 1]
    return radii


def _coverage(queries_ND: np.ndarray, points_MD: np.ndarray, radii_M: np.ndarray) -> float:
    """Return the share of queries that lie inside the ball of at least one point."""
    inside = [
        (_squared_distances(queries_ND[start : start + ROWS_AT_ONCE], points_MD) <= radii_M).any(axis=1)
        for start in range(0, len(queries_ND), ROWS_AT_ONCE)
    ]
    return float(np.concatenate(inside).mean())


def precision_recall(real_MD: np.ndarray, generated_ND: np.ndarray, k: int = 3) -> tuple[float, float]:
    """Return k-nearest-neighbour precision and recall (Kynkaanniemi et al. 2019, eqs. 1-2).

    Precision: share of generated points in the union of the real points' k-NN balls. Recall: the same
    with the two sets exchanged.

    Raises:
      ValueError: if a set has no more than k points.
    """
    real, generated = np.asarray(real_MD, np.float64), np.asarray(generated_ND, np.float64)
    if min(len(real), len(generated)) <= k:
        raise ValueError(f"precision and recall need more than k={k} points, got {len(real)}, {len(generated)}")
    # The expanded square loses digits far from the origin, so both sets are centred together.
    centre = real.mean(axis=0)
    real, generated = real - centre, generated - centre
    precision = _coverage(generated, real, _neighbour_radii(real, k))
    recall = _coverage(real, generated, _neighbour_radii(generated, k))
    return precision, recall
