"""A folder of images of the user's own; its subfolders are classes."""

import functools
import pathlib
from collections.abc import Iterable, Sequence

import numpy as np
from PIL import Image, ImageOps

from maskrl_jax.data.images import THREADS, StoredColumn
from maskrl_jax.data.pixels import square
from maskrl_jax.errors import UserError

ENDINGS = (".png", ".jpg", ".jpeg", ".webp")
SPLITS = ("train", "validation")
HELD_OUT = 10  # every such file is for validation, where the folder has no splits of its own


class Files:
    """Paths of pictures as records."""

    def __init__(self, paths: Sequence[str]):
        """Keep the paths."""
        self._paths = paths

    def __len__(self) -> int:
        """Return the number of files."""
        return len(self._paths)

    def take(self, positions: Iterable[int]) -> list[dict]:
        """Return the paths at these positions."""
        return [{"path": self._paths[int(i)]} for i in positions]


def pictures(paths: Sequence[str], image_size: int) -> StoredColumn:
    """Pictures of files, each read when asked for: uint8 [image_size, image_size, 3]."""
    return StoredColumn(Files(paths), "path", functools.partial(read, size=image_size), THREADS)


def read(path: str, size: int) -> np.ndarray:
    """Middle square of a file's picture, upright as its camera says: uint8 [size, size, 3]."""
    try:
        with Image.open(path) as picture:
            return square(ImageOps.exif_transpose(picture), size)
    except (OSError, ValueError, Image.DecompressionBombError) as error:  # an unknown format is an OSError
        raise UserError(f"cannot read the picture {path}: {' '.join(str(error).split())}") from None


def class_names(name: str) -> list[str]:
    """Names of the subfolders, sorted: the classes; the folder's own where it has none. UserError for no folder."""
    root, splits = _splits(name)
    return [path.name for path in _subfolders(splits.get("train", root))] or [root.resolve().name]


def load(name: str, split: str, image_size: int) -> tuple[dict, list[str]]:
    """Return the columns (image, cond, label) of a split and the class names.

    The subfolders `train` and `validation` are the splits; without them every tenth file, in the order of their
    names, is for validation. Raises UserError for what has no pictures, or pictures outside its classes.
    """
    root, splits = _splits(name)
    names, flat = class_names(name), not _subfolders(splits.get("train", root))
    found = _files(splits.get(split, root), names, flat)
    if not splits:
        held_out = np.arange(1, len(found) + 1) % HELD_OUT == 0
        found = [row for row, held in zip(found, held_out, strict=True) if held == (split == "validation")]
        if not found:
            raise UserError(f"{name} has fewer than {HELD_OUT} pictures, none for validation; give more")
    label = np.asarray([number for _, number in found], np.int32)
    return {"image": pictures([path for path, _ in found], image_size), "label": label, "cond": label}, names


def _splits(name: str) -> tuple[pathlib.Path, dict[str, pathlib.Path]]:
    root = pathlib.Path(name)
    if not root.is_dir():
        raise UserError(f"{name} is no folder; data.name is to be a folder of images, with a subfolder a class")
    splits = {split: root / split for split in SPLITS}
    return root, splits if all(path.is_dir() for path in splits.values()) else {}


def _subfolders(root: pathlib.Path) -> list[pathlib.Path]:
    return sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))


def _files(root: pathlib.Path, names: Sequence[str], flat: bool) -> list[tuple[str, int]]:
    """Path and class of every picture, sorted by class and name; `flat`: all are of one class, beside each other."""
    places, rows = [root] if flat else _subfolders(root), []
    if not flat and (stray := _pictures_in(root)):
        raise UserError(f"{stray[0]} lies beside the subfolders of {root}; put every picture into that of its class")
    for place in places:
        inside = _pictures_in(place)
        if not inside:
            raise UserError(f"{place} has no pictures ({', '.join(ENDINGS)}); fill it or remove it")
        if not flat and place.name not in names:
            raise UserError(f"{place} is no class of the training pictures; those are: {', '.join(names[:10])}")
        rows += [(path, 0 if flat else names.index(place.name)) for path in inside]
    if not rows:
        raise UserError(f"{root} has no subfolder, which its training pictures have: one a class")
    return rows


def _pictures_in(folder: pathlib.Path) -> list[str]:
    return sorted(str(path) for path in folder.iterdir() if path.suffix.lower() in ENDINGS and path.is_file())
