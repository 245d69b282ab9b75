"""Images to be measured, one at a time: a folder of picture files, or `arr_0` of an npz as the evaluator of ADM has it."""

import dataclasses
import os
import pathlib
import zipfile
import zlib
from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image

from maskrl_jax.data.pixels import rgb
from maskrl_jax.errors import UserError

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
ARRAY, INDEX = "arr_0", "index"


@dataclasses.dataclass(frozen=True)
class ImageSet:
    """Images under keys of their own; every call of `read` starts anew."""

    path: str
    count: int
    read: Callable[[], Iterator[tuple[str, np.ndarray]]]  # yields (key, bytes or floats in [0, 1], [H,W,3])


def open_images(path: str) -> ImageSet:
    """Open a folder, of which all pictures at any depth are taken in order of their names, or an npz.

    A key is a file's name without its ending, from the folder on; in an npz an entry of `index`, where there is one,
    or the row. UserError where there is no image; a picture that cannot be read is told when its turn comes.
    """
    if os.path.isdir(path):
        return _folder(path)
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            if f"{ARRAY}.npy" not in names:
                raise UserError(f"{path} holds no images: there is no {ARRAY} in it")
            with archive.open(f"{ARRAY}.npy") as file:
                shape, kind = _header(path, file)
        if f"{INDEX}.npy" in names:
            with np.load(path, allow_pickle=False) as stored:
                keys = [str(index) for index in stored[INDEX].tolist()]
        else:
            keys = [str(row) for row in range(shape[0])]
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"cannot read {path} as a folder or npz of images: {error}") from None
    if len(keys) != shape[0]:
        raise UserError(f"{path} holds {shape[0]} images and {len(keys)} entries of {INDEX}")
    return ImageSet(path, shape[0], lambda: zip(keys, _rows(path, shape, kind), strict=True))


def _folder(path):
    files = sorted(p for p in pathlib.Path(path).rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    if not files:
        raise UserError(f"{path} holds no images ({', '.join(SUFFIXES)})")

    def read():
        for file in files:
            try:
                picture = rgb(Image.open(file))
            except (OSError, ValueError, Image.DecompressionBombError) as error:
                raise UserError(f"cannot read the image {file}: {error}") from None
            yield file.relative_to(path).with_suffix("").as_posix(), picture

    return ImageSet(path, len(files), read)


def _header(path, file):
    """Return (shape, dtype) of a .npy of images; the file is left at its first image."""
    version = np.lib.format.read_magic(file)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
    if read is None:
        raise UserError(f"{path}: {ARRAY} is of the unknown npy version {version}")
    shape, fortran, kind = read(file)
    images = len(shape) == 4 and shape[3] == 3 and min(shape) > 0 and not fortran
    if not images or not (kind == np.uint8 or kind.kind == "f"):
        raise UserError(f"{path}: {ARRAY} must be images [n, H, W, 3] of bytes or floats, not {kind} {list(shape)}")
    return shape, kind


def _rows(path, shape, kind):
    """Yield one image after the other: a file of 50,000 does not fit into memory."""
    size = int(np.prod(shape[1:])) * kind.itemsize
    with zipfile.ZipFile(path) as archive, archive.open(f"{ARRAY}.npy") as file:
        _header(path, file)
        for row in range(shape[0]):
            try:
                content = file.read(size)
            except (EOFError, OSError, zipfile.BadZipFile, zlib.error) as error:
                raise UserError(f"{path} is damaged at image {row} of {shape[0]}: {error}") from None
            if len(content) != size:
                raise UserError(f"{path} ends within image {row} of {shape[0]}")
            yield np.frombuffer(content, kind).reshape(shape[1:])
