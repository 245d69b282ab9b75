"""Reference statistics in an .npz: read from the files that others publish, and written in the same layout.

Keys: `mu` [2048] and `sigma` [2048, 2048] (pytorch-fid, torch-fidelity's fork for MAR, clean-fid), with `mu_s` [2023]
and `sigma_s` of sFID and images `arr_0` beside them in the VIRTUAL files of ADM. Read from those programs' code; the
files themselves were not opened here. Ours add `count`, `resize`, `values` and `rounding`: "none" where images came as
bytes.
"""

import dataclasses
import os
import zipfile

import numpy as np

from maskrl_jax.errors import UserError
from maskrl_jax.evaluate.moments import Moments
from maskrl_jax.evaluate.protocols import FidProtocol
from maskrl_jax.models.inception import POOL, SPATIAL_SIZE

UNROUNDED = "none"  # images were bytes, which come as they are
SYMMETRY = 1e-5  # of the largest entry: some published covariances are float32

Gaussian = tuple[np.ndarray, np.ndarray]  # mean [D], covariance [D, D], float64


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Gaussians of a set of real images, and whether its file holds images as well."""

    pool: Gaussian
    spatial: Gaussian | None = None
    count: int | None = None  # images behind them; None where the file does not say
    images: bool = False
    declared: bool = False  # that the file says how it was made, and that it is as asked
    rounding: bool = False  # that it says so of the rounding of floats, which ours do since they record it


def holds_statistics(path: str) -> bool:
    """Tell whether a path is an npz with `mu` in it; UserError where it cannot be read."""
    if os.path.isdir(path):
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            return "mu.npy" in archive.namelist()
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"cannot read {path} as an .npz: {error}") from None


def read(path: str, protocol: FidProtocol) -> Statistics:
    """Read the statistics of an npz.

    UserError for shapes, values or symmetry that no statistics of this network have, or where the file says that it
    was made with another resize, range of values or rounding than the protocol's.
    """
    try:
        with np.load(path, allow_pickle=False) as stored:
            files = set(stored.files)
            for name in ("resize", "values", "rounding"):
                told, wanted = str(stored[name]) if name in files else None, getattr(protocol, name)
                if told not in (None, wanted) and (name, told) != ("rounding", UNROUNDED):
                    raise UserError(f"{path} was made with {name} {told!r}; this protocol has {wanted!r}")
            count = int(stored["count"]) if "count" in files else None
            spatial = _gaussian(path, stored, "mu_s", "sigma_s", SPATIAL_SIZE) if "mu_s" in files else None
            pool = _gaussian(path, stored, "mu", "sigma", POOL)
            declared = {"resize", "values"} <= files
            return Statistics(pool, spatial, count, "arr_0" in files, declared, "rounding" in files)
    except (OSError, ValueError, EOFError, KeyError, TypeError, zipfile.BadZipFile) as error:
        reason = str(error).removesuffix(" when allow_pickle=False")  # which is no advice for a foreign file
        raise UserError(f"cannot read {path} as statistics: {reason}") from None


def _gaussian(path, stored, mean_name, covariance_name, size) -> Gaussian:
    mean, covariance = (np.asarray(stored[name], np.float64) for name in (mean_name, covariance_name))
    if mean.shape != (size,) or covariance.shape != (size, size):
        raise UserError(
            f"{path}: {mean_name} and {covariance_name} must be [{size}] and [{size}, {size}], "
            f"not {list(mean.shape)} and {list(covariance.shape)}"
        )
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise UserError(f"{path}: {mean_name} or {covariance_name} hold values that are not finite")
    largest = np.abs(covariance).max()
    if np.abs(covariance - covariance.T).max() > SYMMETRY * largest or covariance.diagonal().min() < 0:
        raise UserError(f"{path}: {covariance_name} is no covariance: not symmetric, or with a variance below 0")
    return mean, (covariance + covariance.T) / 2


def write(path: str, pool: Moments, spatial: Moments, protocol: FidProtocol, rounded: bool = False) -> None:
    """Write the moments of a set of images; a ValueError with fewer than two of them.

    `rounded`: whether images were rounded to bytes, as `Extracted` says.
    """
    arrays = {"mu": pool.mean, "sigma": pool.covariance, "mu_s": spatial.mean, "sigma_s": spatial.covariance}
    with open(path, "wb") as file:  # a name without .npz stays as it is
        rounding = protocol.rounding if rounded else UNROUNDED
        np.savez(file, **arrays, count=pool.count, resize=protocol.resize, values=protocol.values, rounding=rounding)
