"""A split of an image set as tokens or latents: array_record shards, and a manifest that says of what they are.

A record is one sample, raw little-endian numbers in the order of the manifest's `fields`; record r of shard s is the
sample at position s * shard_size + r of the split, which it repeats as its `index`.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import platform
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from array_record.python import array_record_data_source, array_record_module

from maskrl_jax.data.clip_tokens import FILES
from maskrl_jax.data.settings import settings_of
from maskrl_jax.errors import UserError

GROUPS = "group_size:1,uncompressed"  # each record read alone; codes and latents hardly shrink
CHUNK = 4096  # records read at a time where all are
KINDS = ("tokens", "moments")  # int [N] codes; float [L,2C], the means and log variances of latents


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a folder's shards of a split are; written before the first of them, as <split>.json.

    fields: (name, dtype, shape) of index, cond, label (where the set has it) and one of KINDS. tokenizer: identity of its
    parameters.
    texts: `texts_of` the set; "" too in manifests of before it was kept, which are of classes or of words of shapes.
    """

    tokenizer: str
    data: str  # name of the set
    split: str
    image_size: int
    count: int
    shard_size: int
    fields: tuple[tuple[str, str, tuple[int, ...]], ...]
    texts: str = ""

    def __post_init__(self):
        object.__setattr__(self, "data", same_name(self.data))

    @property
    def dtype(self) -> np.dtype:
        """Of one record."""
        return np.dtype([(name, kind, tuple(shape)) for name, kind, shape in self.fields])

    @property
    def kind(self) -> str:
        """Which of KINDS is stored."""
        return self.fields[-1][0]

    @property
    def shards(self) -> int:
        return -(-self.count // self.shard_size)

    def path(self, folder: str, shard: int) -> str:
        """Where a shard lies when it is complete."""
        return os.path.join(folder, f"{self.split}-{shard:05d}-of-{self.shards:05d}.array_record")

    def positions(self, shard: int) -> range:
        """Of a shard's samples in the split."""
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, self.count))

    def missing(self, folder: str) -> list[int]:
        """Shards that are not there yet."""
        return [shard for shard in range(self.shards) if not os.path.exists(self.path(folder, shard))]


def same_name(data: str) -> str:
    """The name of a set; a folder's, which has a "/", without what its path does not need."""
    return os.path.join(os.path.normpath(data), "") if "/" in data else data


def fields_of(columns: dict[str, np.ndarray]) -> tuple:
    """The fields of rows [b, ...], as a manifest has them."""
    return tuple(
        (name, np.dtype(x.dtype).newbyteorder("<").str, tuple(int(n) for n in x.shape[1:]))
        for name, x in columns.items()
    )


def texts_of(data: Mapping[str, Any] | str) -> str:
    """How texts of a config's `data` became ids, with the SHA-256 of the tokenizer's files; "": they are no tokens."""
    settings = settings_of(data)
    if not settings.tokens:
        return ""
    digest, place = hashlib.sha256(), pathlib.Path(settings.tokenizer)
    for file in (place / name for name in _read_files(settings.tokens, place)):
        digest.update(f"{file.name} {file.stat().st_size} ".encode() + file.read_bytes())
    pad = f", pad {settings.pad}" if settings.tokens == "clip" else ""
    return f"{settings.tokens}, {settings.text_length} ids{pad}, files {digest.hexdigest()}"


def _read_files(tokens: str, place: pathlib.Path) -> list[str]:
    """Names of the files that a tokenizer is read from."""
    whole, *pairs = FILES
    apart = tokens == "clip" and all((place / name).exists() for name in pairs)
    return [name for name in (pairs if apart else [whole]) if (place / name).exists()]


def begin(folder: str, manifest: Manifest) -> None:
    """Claim a folder for these shards; UserError where it holds others of the split."""
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, f"{manifest.split}.json")
    found = read_manifest(folder, manifest.split) if os.path.exists(path) else None
    if found is None:
        aside = _aside(path)
        with open(aside, "w") as file:
            json.dump(dataclasses.asdict(manifest), file, indent=1)
        os.replace(aside, path)
    elif found != manifest:
        names = [field.name for field in dataclasses.fields(Manifest)]
        there, now = ({name: getattr(made, name) for name in names} for made in (found, manifest))
        other = [
            f"{name} ({there[name]}, not {now[name]})" if isinstance(now[name], int) else name
            for name in names
            if there[name] != now[name]
        ]
        raise UserError(
            f"{folder} holds shards of another {', '.join(other)}; give what it was begun with, or a new --out"
        )


def read_manifest(folder: str, split: str) -> Manifest:
    """What a folder says of its shards of a split; UserError where it says nothing."""
    path = os.path.join(folder, f"{split}.json")
    try:
        with open(path) as file:
            stored = json.load(file)
        fields = tuple((name, kind, tuple(shape)) for name, kind, shape in stored.pop("fields"))
        return Manifest(**stored, fields=fields)
    except OSError:
        raise UserError(f"{folder} has no {split}.json; make it with python -m maskrl_jax.encode") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no manifest of shards ({error}); encode into another folder") from None


def write_shard(folder: str, manifest: Manifest, shard: int, batches: Iterable[dict[str, np.ndarray]]) -> None:
    """Write a shard from its samples in batches of columns [b, ...]; it gets its name when it is complete."""
    path = manifest.path(folder, shard)
    aside = _aside(path)
    try:
        with contextlib.closing(array_record_module.ArrayRecordWriter(aside, GROUPS)) as writer:
            for columns in batches:
                rows = np.empty(len(columns["index"]), manifest.dtype)
                for name in manifest.dtype.names:
                    rows[name] = columns[name]
                for row in rows:
                    writer.write(row.tobytes())
        with open(aside, "rb+") as file:
            os.fsync(file)
        os.replace(aside, path)
    finally:
        pathlib.Path(aside).unlink(missing_ok=True)  # of a shard that did not come to its end


def _aside(path: str) -> str:
    """Name of a file while this process writes it: others may write the same one at the same time.

    What a killed process of this machine left of it is removed.
    """
    place, mine = pathlib.Path(path).parent, f"{os.path.basename(path)}.{platform.node()}-"
    for left in place.glob("*.tmp"):
        number = left.name.removeprefix(mine).removesuffix(".tmp")
        if number.isdecimal() and not _runs(int(number)):
            left.unlink(missing_ok=True)
    return str(place / f"{mine}{os.getpid()}.tmp")


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # of another user
        pass
    return True


class Shards:
    """The complete shards of a split, read when asked for, by position."""

    def __init__(self, folder: str, manifest: Manifest):
        """Open them; UserError where some are missing, or hold another number of samples."""
        self._folder, self._manifest = folder, manifest
        missing = len(manifest.missing(folder))
        if missing:
            raise UserError(
                f"{folder} lacks {missing} of {manifest.shards} shards of {manifest.split}; run its encode command again"
            )
        self._source = self._opened(range(manifest.shards))
        self._last = (b"", None)

    def __len__(self) -> int:
        return self._manifest.count

    def take(self, positions: np.ndarray) -> np.ndarray:
        """Rows [b] of the manifest's dtype at int positions [b]; UserError where they are not what they should be."""
        positions = np.asarray(positions, np.int64)
        key, rows = self._last
        if key != positions.tobytes():  # the columns of a batch ask for the same rows, one after another
            try:
                stored = self._source.__getitems__(positions.tolist())
                rows = np.frombuffer(b"".join(stored), self._manifest.dtype)
                if len(rows) != len(positions):
                    raise ValueError("records of another size")
            except (OSError, RuntimeError, ValueError) as error:
                raise self._damaged(self._unreadable(positions), error) from None
            wrong = positions[rows["index"] != positions]
            if wrong.size:
                self._look_at_each()
                raise self._damaged(wrong[0] // self._manifest.shard_size, "a record is not where it should be")
            self._last = (positions.tobytes(), rows)
        return rows

    def check(self) -> None:
        """Read every record once; UserError where one is missing, twice there, or damaged."""
        for first in range(0, len(self), CHUNK):
            self.take(np.arange(first, min(first + CHUNK, len(self))))

    def columns(self) -> dict[str, "Column"]:
        """Every field but the index, indexed like an array."""
        return {name: Column(self, name) for name in self._manifest.dtype.names if name != "index"}

    def _opened(self, shards: Sequence[int]) -> array_record_data_source.ArrayRecordDataSource:
        """Shards as one source; UserError about the first of them that is damaged."""
        wanted = sum(len(self._manifest.positions(shard)) for shard in shards)
        try:
            paths = [self._manifest.path(self._folder, shard) for shard in shards]
            source = array_record_data_source.ArrayRecordDataSource(paths)
            if len(source) == wanted:
                return source
            reason = f"{len(source)} records for {wanted} samples"
        except (OSError, RuntimeError, ValueError) as error:
            reason = error
        if len(shards) == 1:
            raise self._damaged(shards[0], reason)
        self._look_at_each()
        raise self._damaged(None, reason)

    def _look_at_each(self) -> None:
        """UserError about the first shard that cannot be opened, or holds another number of samples."""
        for shard in range(self._manifest.shards):
            self._opened([shard])

    def _unreadable(self, positions: np.ndarray) -> int | None:
        """The shard of the first of these positions that cannot be read; None where all can, now."""
        for position in positions.tolist():
            with contextlib.suppress(OSError, RuntimeError, ValueError):
                if len(self._source.__getitems__([position])[0]) == self._manifest.dtype.itemsize:
                    continue
            return position // self._manifest.shard_size
        return None

    def _damaged(self, shard: int | None, reason: Exception | str) -> UserError:
        reason = " ".join(str(reason).split())[:120]
        if shard is None:  # none of them alone
            return UserError(f"{self._folder}: shards of {self._manifest.split} cannot be read ({reason}); try again")
        file = self._manifest.path(self._folder, int(shard))
        return UserError(f"{file} is damaged ({reason}); delete it and encode again, which makes what is missing")


@dataclasses.dataclass(frozen=True)
class Column:
    """One field of all rows."""

    shards: Shards
    name: str

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, positions):
        """Return one value at an int, or the stacked values at int positions [b]."""
        rows = self.shards.take(np.atleast_1d(positions))[self.name]
        return rows[0] if np.ndim(positions) == 0 else np.ascontiguousarray(rows)

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        """Give the whole column to numpy."""
        starts = range(0, len(self), CHUNK)
        values = np.concatenate([self[np.arange(i, min(i + CHUNK, len(self)))] for i in starts])
        return values if dtype is None else values.astype(dtype)
