"""What was measured of a trained parent, kept in the store: every run above it needs the same numbers."""

import contextlib
import functools
import hashlib
import os
import pathlib
import zipfile
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from etils import epath

from maskrl_jax import paths

PACKAGE = pathlib.Path(__file__).resolve().parent.parent


def identity(*parts: Any) -> str:
    """SHA-256 of everything that a measurement depends on: plain values, arrays, pytrees of arrays."""
    digest = hashlib.sha256()
    for part in parts:
        leaves, structure = jax.tree.flatten(part)
        digest.update(str(structure).encode())
        for leaf in leaves:
            value = np.asarray(jax.device_get(leaf))
            digest.update(f"{value.dtype}{value.shape}".encode())
            digest.update(np.ascontiguousarray(value).tobytes())
    return digest.hexdigest()


@functools.cache
def code() -> str:
    """SHA-256 of this package's source, as it was when a run first asked: another formula measures another number."""
    files = sorted(PACKAGE.rglob("*.py"))
    return hashlib.sha256(b"".join(str(f.relative_to(PACKAGE)).encode() + f.read_bytes() for f in files)).hexdigest()


def once(
    folder: str | os.PathLike, name: str, key: str, make: Callable[[], dict[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """Return `make()`, or what it gave to an earlier run whose key, code, JAX and kind of device were the same.

    A process of several measures always: whether a file exists need not look the same to all of them.
    """
    whole_key = identity(key, code(), jax.__version__, jax.default_backend())
    path = epath.Path(folder, f"{name}-{whole_key[:16]}.npz")
    if jax.process_count() == 1 and path.exists():
        with contextlib.suppress(EOFError, OSError, ValueError, zipfile.BadZipFile):
            return paths.read_arrays(path)  # a damaged file is measured anew
    made = make()
    if jax.process_index() == 0:
        paths.write_arrays(path, made)
    return made
