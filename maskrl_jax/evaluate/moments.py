"""Mean and covariance of a stream of features, merged exactly over batches."""

import dataclasses
from collections.abc import Iterable

import numpy as np

ROWS_AT_ONCE = 4096  # of a stream, kept until they are folded in


@dataclasses.dataclass(frozen=True)
class Moments:
    """Count, mean [D] and scatter [D, D] (sum of centred outer products) in float64.

    Centred sums merge without the cancellation of sums of squares (Chan, Golub, LeVeque 1983).
    """

    count: int
    mean: np.ndarray
    scatter: np.ndarray

    @classmethod
    def of(cls, features_MD: np.ndarray) -> "Moments":
        """Return the moments of features [M, D]; ValueError for another shape, no row, or values not finite."""
        features = np.asarray(features_MD, np.float64)
        if features.ndim != 2 or not len(features):
            raise ValueError(f"features must be [M, D] with M >= 1, got shape {features.shape}")
        if not np.isfinite(features).all():
            raise ValueError("features hold values that are not finite")
        centred = features - features.mean(axis=0)
        return cls(len(features), features.mean(axis=0), centred.T @ centred)

    def __add__(self, other: "Moments") -> "Moments":
        """Return the moments of both sets together."""
        if self.mean.shape != other.mean.shape:
            raise ValueError(f"features of {len(self.mean)} and {len(other.mean)} dimensions do not merge")
        count = self.count + other.count
        shift = other.mean - self.mean
        between = np.outer(shift, shift) * (self.count * other.count / count)
        return Moments(count, self.mean + shift * (other.count / count), self.scatter + other.scatter + between)

    @property
    def covariance(self) -> np.ndarray:
        """The unbiased covariance [D, D]; ValueError with fewer than two rows."""
        if self.count < 2:
            raise ValueError(f"a covariance needs two samples or more, got {self.count}")
        return self.scatter / (self.count - 1)


def merged(parts: Iterable[Moments]) -> Moments:
    """Return the moments of all parts together; ValueError where there is none."""
    first, *others = parts
    return sum(others, first)


class Stream:
    """Moments of rows that arrive in batches: row i of the stream goes to group i modulo `groups`."""

    def __init__(self, groups: int = 1):
        self._groups: list[Moments | None] = [None] * groups
        self._count, self._waiting = 0, []

    def add(self, features_MD: np.ndarray) -> None:
        """Take the next rows [M, D]."""
        self._waiting.append(features_MD)
        if sum(map(len, self._waiting)) >= ROWS_AT_ONCE:  # a merge costs D^2, however few its rows are
            self._fold()

    def groups(self) -> list[Moments]:
        """Return the moments of each group that has a row."""
        self._fold()
        return [group for group in self._groups if group is not None]

    def _fold(self):
        if not self._waiting:
            return
        rows = np.concatenate(self._waiting)
        owner = (self._count + np.arange(len(rows))) % len(self._groups)
        for index, group in enumerate(self._groups):
            if (owner == index).any():
                new = Moments.of(rows[owner == index])
                self._groups[index] = new if group is None else group + new
        self._count, self._waiting = self._count + len(rows), []
