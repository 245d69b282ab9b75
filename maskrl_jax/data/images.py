"""Any TFDS set of labelled images by its name, resized and cut to a square."""

import contextlib
import functools
import io
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image, UnidentifiedImageError

from maskrl_jax.data import pixels
from maskrl_jax.data.prepare import Records, prepared
from maskrl_jax.errors import UserError

MEMORY_LIMIT = 256 * 2**20  # bytes of pictures up to which a split is read once and kept
CHUNK = 256  # samples read at a time
THREADS = min(os.cpu_count() or 1, 16)  # that decode pictures; more of them wait for the interpreter
TRAIN_SHARE = 95  # percent of `train` that stays where a set has no second split


class StoredColumn:
    """One feature of a split on disk, read when asked for; indexed like an array."""

    def __init__(self, records: Records, feature: str, convert: Callable, threads: int = 1):
        """Keep the records and what makes an array of the feature's stored value, in so many threads."""
        self._records, self._feature, self._convert, self._threads = records, feature, convert, threads

    def __getstate__(self) -> dict:
        """Leave threads behind: a copy is for a worker process, which has others beside it."""
        return self.__dict__ | {"_threads": 1}

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self._records)

    def __getitem__(self, positions):
        """Return one value at an int, or the stacked values at int positions [b]."""
        if np.ndim(positions) == 0:
            return self[[positions]][0]
        stored = [record[self._feature] for record in self._records.take(positions)]
        if self._threads == 1 or len(stored) < 2:
            return np.stack([self._convert(value) for value in stored])
        return np.stack(list(_threads(self._threads).map(self._convert, stored)))

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        """Give the whole column to numpy: read once, when first asked for."""
        return self.in_memory if dtype is None else self.in_memory.astype(dtype)

    @functools.cached_property
    def in_memory(self) -> np.ndarray:
        """The whole column, read in pieces because the files may be far larger than the result."""
        starts = range(0, len(self), CHUNK)
        values = np.concatenate([self[range(i, min(i + CHUNK, len(self)))] for i in starts])
        values.setflags(write=False)  # shared by all who open the set
        return values


@functools.cache
def _threads(count: int) -> ThreadPoolExecutor:
    """The threads that decode pictures, which Pillow does without holding the interpreter."""
    return ThreadPoolExecutor(count, thread_name_prefix="decode")


@functools.lru_cache(maxsize=4)
def load(name: str, split: str, data_dir: str, image_size: int) -> tuple[dict, list[str]]:
    """Return the columns (image, cond, label) of a split and the class names.

    Raises UserError for an unknown name, a set that needs TensorFlow, or one without a picture and a class.
    """
    builder = prepared(lambda: _builder(name, data_dir), name, data_dir)
    image, label = _features(builder.info.features, name)
    records = Records(builder, _split(builder, split), {image: tfds.decode.SkipDecoding()})
    columns = {
        "image": StoredColumn(records, image, functools.partial(decoded, size=image_size), THREADS),
        "label": StoredColumn(records, label, np.int32),
    }
    if len(records) * image_size**2 * 3 <= MEMORY_LIMIT:
        columns = {key: column.in_memory for key, column in columns.items()}
    return columns | {"cond": columns["label"]}, builder.info.features[label].names


def decoded(encoded: bytes, size: int) -> np.ndarray:
    """Middle square of an encoded picture, uint8 [size, size, 3]."""
    try:
        return pixels.square(Image.open(io.BytesIO(encoded)), size)
    except (UnidentifiedImageError, ValueError) as error:
        reason = str(error) if isinstance(error, ValueError) else "it is unreadable"
        raise UserError(
            f"a picture of the set cannot be used ({reason}); remove the set from data_dir and repeat"
        ) from None


def class_names(name: str) -> list[str]:
    """Names of the classes of a TFDS set, from its definition alone; UserError as in `load`."""
    features = _builder(name, None).info.features
    return features[_features(features, name)[1]].names


def _builder(name: str, data_dir: str | None):
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it writes a banner where it misses TensorFlow
            return tfds.builder(name, data_dir=data_dir, file_format="array_record")
    except tfds.core.registered.DatasetNotFoundError:
        raise UserError(f"unknown data set {name!r}; use shapes, digits or a TFDS image set") from None
    except ImportError as error:
        module = getattr(error, "name", None) or "tensorflow"
        raise UserError(
            f"the TFDS set {name!r} needs a missing package, {module}; sets that TFDS reads with TensorFlow cannot be "
            "used here: choose another set, or save its pictures as files (docs/own_data.md)"
        ) from None
    except ValueError as error:  # such as a copy of the set on disk in another file format
        raise UserError(f"cannot open TFDS set {name!r} in {data_dir} ({error}); use another data_dir") from None


def _features(features, name: str) -> tuple[str, str]:
    """Name the first image feature and the first class label, `image` and `label` before all others."""
    found = []
    for kind, usual in ((tfds.features.Image, "image"), (tfds.features.ClassLabel, "label")):
        keys = [key for key, feature in features.items() if isinstance(feature, kind)]
        if not keys:
            raise UserError(f"the TFDS set {name!r} has no {usual} feature; choose a set of labelled images")
        found.append(usual if usual in keys else keys[0])
    return tuple(found)


def _split(builder, split: str) -> str:
    """Name the TFDS split for ours: validation, else test, else the end of train."""
    if "train" not in builder.info.splits:
        raise UserError(f"the TFDS set {builder.name!r} has no train split; choose another set")
    for other in ("validation", "test"):
        if other in builder.info.splits:
            return "train" if split == "train" else other
    return f"train[:{TRAIN_SHARE}%]" if split == "train" else f"train[{TRAIN_SHARE}%:]"
