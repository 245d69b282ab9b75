"""Writing TFDS sets to disk so that no crash and no second process can leave half a set behind."""

import contextlib
import fcntl
import io
from collections.abc import Callable, Iterable

import tensorflow_datasets as tfds
from etils import epath
from google.protobuf import json_format

from maskrl_jax.errors import UserError


def prepared(make_builder: Callable[[], tfds.core.DatasetBuilder], name: str, data_dir: str):
    """Return the builder with its data on disk, written in this call if need be (array_record).

    TFDS writes into a directory aside and renames it when complete, so an existing set is a whole set. The
    lock makes a second process wait for the first one's data; the kernel drops it with a killed process,
    whose leftovers the next one removes. Raises UserError where a package that the set needs is missing, the
    disk or the network fails, or what is on disk is damaged.
    """
    try:
        builder = make_builder()
        if _whole(builder):
            return builder
        with _lock(epath.Path(data_dir), name):
            # Made anew: it reads the description of what another process may just have written.
            return _write(make_builder())
    except ImportError as error:
        raise UserError(f"data set {name!r} needs a missing package ({error}); choose another set") from None
    except json_format.ParseError as error:
        raise _damaged(name, epath.Path(data_dir) / name, error) from None
    except OSError as error:
        raise UserError(f"cannot prepare data set {name!r} in {data_dir} ({error}); check data_dir") from None


class Records:
    """The stored records of a split, read when asked for; UserError where the files are damaged."""

    def __init__(self, builder: tfds.core.DatasetBuilder, split: str, decoders: dict):
        """Open a split of a prepared set."""
        self._builder = builder
        self._source = self._read(lambda: builder.as_data_source(split, decoders=decoders))
        self._length = self._read(lambda: len(self._source))  # opens the files

    def __len__(self) -> int:
        """Return the number of records."""
        return self._length

    def take(self, positions: Iterable[int]) -> list[dict]:
        """Return the records at these positions on disk."""
        return self._read(lambda: self._source.__getitems__([int(i) for i in positions]))

    def _read(self, read: Callable):
        try:
            return read()
        except (RuntimeError, FileNotFoundError) as error:  # array_record says RuntimeError of what it cannot read
            raise _damaged(self._builder.name, self._builder.data_path, error) from None
        except OSError as error:
            path = self._builder.data_path
            raise UserError(
                f"cannot read data set {self._builder.name!r} in {path} ({error}); check data_dir"
            ) from None


def _damaged(name: str, path: epath.Path, error: Exception | str) -> UserError:
    reason = " ".join(str(error).split())[:120]
    return UserError(f"data set {name!r} in {path} is damaged ({reason}); delete that folder and run again")


def _write(builder: tfds.core.DatasetBuilder) -> tfds.core.DatasetBuilder:
    if not _whole(builder):
        if builder.data_path.exists():
            raise _damaged(builder.name, builder.data_path, "it has no dataset_info.json")
        _remove_leftovers(builder.data_path)
        print(f"writing data set {builder.name} to {builder.data_path}", flush=True)
        tfds.disable_progress_bar()
        with contextlib.redirect_stdout(io.StringIO()):  # it speaks of a download also where nothing is loaded
            _prepare(builder)
    return builder


def _prepare(builder: tfds.core.DatasetBuilder) -> None:
    try:
        builder.download_and_prepare()
    except AssertionError as error:  # so TFDS says that files are missing which only the user may download
        if not builder.MANUAL_DOWNLOAD_INSTRUCTIONS or "anual" not in str(error):
            raise
        files = " ".join(builder.MANUAL_DOWNLOAD_INSTRUCTIONS.split())
        place = builder.data_path.parent.parent / "downloads" / "manual"
        raise UserError(f"data set {builder.name!r} is to be downloaded by hand, into {place}: {files}") from None


def _whole(builder: tfds.core.DatasetBuilder) -> bool:
    """Say whether the set is on disk; TFDS's own question logs a warning where the answer is no."""
    return (builder.data_path / "dataset_info.json").exists()


@contextlib.contextmanager
def _lock(root: epath.Path, name: str):
    """Hold the lock of one set; buckets have no locks, there the rename alone protects."""
    if "://" in str(root):
        yield
        return
    root.mkdir(parents=True, exist_ok=True)
    with open(root / f".{name.replace('/', '_')}.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _remove_leftovers(data_path: epath.Path) -> None:
    if data_path.parent.exists():
        for path in data_path.parent.glob(f"incomplete.*{data_path.name}"):
            path.rmtree()
