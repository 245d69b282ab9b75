"""Where a run's files go: a folder of this machine, or a bucket (gs://, s3://), through etils' epath as orbax does.

A bucket needs its fsspec driver, for gs:// `pip install gcsfs`.
"""

import io
import os
import platform
from typing import Any

import numpy as np
from etils import epath


def is_remote(path: str | os.PathLike) -> bool:
    """Say if a path lies in a bucket."""
    return "://" in os.fspath(path)


def absolute(path: str) -> str:
    """Return a path that does not depend on the current folder."""
    return path if is_remote(path) else os.path.abspath(path)


def relative(path: str, start: str) -> str:
    """Return a path as seen from a folder; as it is where no way leads there."""
    (one, own), (other, from_) = _parts(path), _parts(start)
    return os.path.relpath(own, from_) if one == other else absolute(path)


def joined(folder: str, place: str) -> str:
    """Undo `relative`."""
    if is_remote(place):
        return place
    root, inside = _parts(folder)
    return root + os.path.normpath(os.path.join(inside, place)) if not os.path.isabs(place) else place


def _parts(path: str) -> tuple[str, str]:
    """A bucket, "" for this machine, and the path in it."""
    if not is_remote(path):
        return "", path
    scheme, _, rest = path.partition("://")
    bucket, _, inside = rest.partition("/")
    return f"{scheme}://{bucket}/", inside


def write(path: str | os.PathLike, content: str | bytes) -> None:
    """Write a file, and the folders above it, as a whole or not at all."""
    path = epath.Path(path)
    data = content.encode() if isinstance(content, str) else content
    path.parent.mkdir(parents=True, exist_ok=True)
    if is_remote(path):  # an object appears when it is complete
        path.write_bytes(data)
        return
    # By rename: a process killed while it writes must not leave half a file, and two may write the same.
    aside = path.with_name(f"{path.name}.{platform.node()}-{os.getpid()}.tmp")
    aside.write_bytes(data)
    aside.replace(path)


def write_arrays(path: str | os.PathLike, arrays: dict[str, np.ndarray]) -> None:
    """Write arrays as npz, whole or not at all."""
    packed = io.BytesIO()
    np.savez_compressed(packed, **arrays)
    write(path, packed.getvalue())


def read_arrays(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Return the arrays of an npz."""
    with np.load(io.BytesIO(epath.Path(path).read_bytes())) as stored:
        return dict(stored)


def as_png(picture: Any) -> bytes:
    """Return a uint8 picture [H, W, 3] as PNG."""
    from PIL import Image  # late: only a run that trains needs it

    packed = io.BytesIO()
    Image.fromarray(picture).save(packed, "PNG")
    return packed.getvalue()
