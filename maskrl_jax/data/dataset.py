"""One interface to every image set: pictures, their conditions, and how prompts become conditions."""

import functools
import pathlib
import sys
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from maskrl_jax.data import digits, folder, images, prompts, shapes, verifier
from maskrl_jax.data.conditioning import Conditioning
from maskrl_jax.data.scenes import IMAGE_SIZE
from maskrl_jax.data.settings import DataSettings, settings_of
from maskrl_jax.data.texts import Texts, texts_of
from maskrl_jax.errors import UserError

SPLITS = ("train", "validation")
HELD_OUT_SHARE = 4  # one caption in so many


@dataclass(frozen=True)
class Dataset:
    """A split of an image set, addressed by position; `open_dataset` makes one.

    `columns` holds `image` (uint8 [H, W, 3] per position), `cond`, `label` and, for shapes, `tone`; each is
    an array or, for a set too large to keep, read from disk when indexed. A set of prompts has no `label`, and
    may have no `image`. `encode` and `describe` translate prompts to conditions and back; `verify` judges pictures
    exactly (shapes only, else None).
    """

    name: str
    columns: dict
    conditioning: Conditioning
    encode: Callable[[list[str]], np.ndarray]
    describe: Callable[[np.ndarray], list[str]]
    verify: Callable[[np.ndarray, list[str]], dict[str, np.ndarray]] | None = None

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(next(iter(self.columns.values())))

    @property
    def has_pictures(self) -> bool:
        """Whether the set has pictures, and not prompts alone."""
        return "image" in self.columns

    def with_pictures(self) -> "Dataset":
        """Return this set; UserError where it has no pictures."""
        if not self.has_pictures:
            raise UserError(f'{self.name} has no pictures; give every line an "image", or name another set')
        return self

    def get(self, position: int) -> dict[str, np.ndarray]:
        """Return one sample: image uint8 [H, W, 3], cond, label and, for shapes, the background tone."""
        return {name: column[position] for name, column in self.columns.items()}

    def take(self, positions: np.ndarray) -> dict[str, np.ndarray]:
        """Return the samples at int positions [b], each column stacked to [b, ...]."""
        return {name: column[positions] for name, column in self.columns.items()}

    def pool(self, *, held_out: bool) -> np.ndarray:
        """Distinct conditions of this split, [P, ...]: those kept for evaluation, or those to train a policy on.

        A quarter of all captions, chosen by their text, is held out. Classes are too few to hold any out: both
        pools then are all classes.
        """
        if not len(self):
            raise UserError(f"{self.name} is not there to choose prompts from; give them")
        cond = np.unique(np.asarray(self.columns["cond"]), axis=0)
        if self.conditioning.kind == "class":
            return cond
        pool = cond[[is_held_out(text) == held_out for text in self.describe(cond)]]
        if not len(pool):
            raise UserError(
                f"{self.name} has {len(cond)} prompts, and none of them is {'' if held_out else 'not '}held out; "
                "give more, about a quarter is"
            )
        return pool

    def prompts(self, n: int, seed: int, *, held_out: bool = True) -> list[str]:
        """Draw n prompts from a pool, every one once before any comes again; the same for the same seed."""
        pool = self.pool(held_out=held_out)
        order = np.random.default_rng(seed).permutation(len(pool))
        return self.describe(pool[np.resize(order, n)])

    def distinct(self, held_out: bool) -> int:
        """How many prompts of a pool are worth a measurement: every caption once, a class as often as one likes."""
        return len(self.pool(held_out=held_out)) if self.conditioning.kind == "caption" else sys.maxsize

    def positions_of(self, prompts: list[str], each: int) -> np.ndarray:
        """Positions of the first `each` samples of every distinct prompt: real pictures in equal shares."""
        wanted, all_cond = np.unique(self.encode(prompts), axis=0), np.asarray(self.columns["cond"])
        found = []
        for cond in wanted:
            same = (all_cond == cond).reshape(len(self), -1).all(axis=1)
            found.append(np.flatnonzero(same)[:each])
        return np.concatenate(found)

    @functools.cached_property
    def _alike(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Positions sorted by condition; of every position its rank there, and start and size of its condition."""
        _, group = np.unique(np.asarray(self.columns["cond"]).reshape(len(self), -1), axis=0, return_inverse=True)
        order = np.argsort(group, kind="stable")
        size = np.bincount(group)
        start = np.concatenate([[0], np.cumsum(size)[:-1]])
        rank = np.empty(len(self), np.int64)
        rank[order] = np.arange(len(self)) - start[group[order]]
        return order, rank, start[group], size[group]

    def alike(self, positions: np.ndarray, draws: np.ndarray) -> np.ndarray:
        """Positions [b] of other samples with the same condition, chosen by draws int [b].

        Where there is no other, the position itself.
        """
        order, rank, start, size = (table if i == 0 else table[positions] for i, table in enumerate(self._alike))
        step = np.where(size > 1, 1 + draws % np.maximum(size - 1, 1), 0)
        return order[start + (rank + step) % size]


def is_held_out(text: str) -> bool:
    """Whether a caption is kept for evaluation; decided by its text alone, so the same in every split and run."""
    return zlib.crc32(text.encode()) % HELD_OUT_SHARE == 0


def open_dataset(data: Mapping[str, Any] | str, split: str, data_dir: str, image_size: int) -> Dataset:
    """Open a split (`train` or `validation`) of a set, as the `data` of a config says (`settings.DataSettings`).

    Its `name` is `shapes`, `digits`, a file of prompts, a folder of images or any TFDS set of labelled images; it may
    stand for the mapping. TFDS sets that are not in `data_dir` are written there first. A file of prompts is the same
    in both splits. Raises UserError for an unknown name or split, or a size that the set cannot have.
    """
    settings = settings_of(data)
    if split not in SPLITS:
        raise UserError(f"unknown split {split!r}; choose one of: {', '.join(SPLITS)}")
    if settings.name == "shapes":
        return _open_shapes(settings, split, data_dir, image_size)
    if image_size < 1:
        raise UserError(f"image_size is {image_size}; give a positive number of pixels")
    if settings.is_prompts:
        return _open_prompts(settings, image_size)
    return _class_dataset(settings.name, *_load_classes(settings, split, data_dir, image_size))


def open_pictures(data: Mapping[str, Any] | str, split: str, data_dir: str, image_size: int) -> Dataset:
    """The same for a stage that sees pictures alone: captions of the user's own are not read, and need no tokens."""
    settings = settings_of(data)
    if split not in SPLITS or not settings.is_prompts:
        return open_dataset(data, split, data_dir, image_size).with_pictures()
    return _open_prompts(settings, image_size, told=False).with_pictures()


def open_conditions(data: Mapping[str, Any] | str, data_dir: str, image_size: int) -> Dataset:
    """What a generator can be asked for: the set's validation split, or its class names alone, which need no pictures.

    For `encode`, `describe` and `prompts`. A file of prompts need not be there: who brings a prompt asks for that.
    """
    settings = settings_of(data)
    if settings.is_prompts and not pathlib.Path(settings.name).exists():
        texts = _texts(settings)
        none = {"cond": np.zeros((0, *texts.conditioning.null.shape), np.int32)}
        return Dataset(settings.name, none, texts.conditioning, texts.encode, texts.decode)
    if settings.name == "shapes" or settings.is_prompts:
        return open_dataset(data, "validation", data_dir, image_size)
    names = _class_names(settings)
    return _class_dataset(settings.name, {"cond": np.arange(len(names), dtype=np.int32)}, names)


def conditioning_of(data: Mapping[str, Any] | str) -> Conditioning:
    """What pictures of a set are conditioned on, without opening (or writing) the set; UserError as `open_dataset`.

    No file is read, but a folder of images is, for its classes.
    """
    settings = settings_of(data)
    if settings.name == "shapes" or settings.is_prompts:
        return _texts(settings).conditioning
    if settings.tokens:
        raise UserError(
            f'{settings.name} is conditioned on classes, which need no data.tokens={settings.tokens!r}; set ""'
        )
    return _classes(len(_class_names(settings)))


def _texts(settings: DataSettings) -> Texts:
    if settings.name == "shapes" and settings.tokens:
        raise UserError(f'captions of shapes are words of their own; data.tokens is {settings.tokens!r}, set ""')
    return texts_of(settings)


def _open_shapes(settings: DataSettings, split: str, data_dir: str, image_size: int) -> Dataset:
    if image_size != IMAGE_SIZE:
        raise UserError(f"shapes has pictures of {IMAGE_SIZE} pixels, not {image_size}; set {IMAGE_SIZE}")
    told = _texts(settings)
    columns = dict(shapes.load(split, data_dir))
    texts, inverse = np.unique(columns.pop("caption"), return_inverse=True)
    columns["cond"] = told.encode(texts.tolist())[inverse]
    return Dataset("shapes", columns, told.conditioning, told.encode, told.decode, verifier.verify)


def _open_prompts(settings: DataSettings, image_size: int, told: bool = True) -> Dataset:
    found, texts = prompts.read(settings.name), _texts(settings)
    columns = {"image": folder.pictures(found.pictures, image_size)} if found.pictures else {}
    if not told:
        return Dataset(settings.name, columns, texts.conditioning, texts.encode, texts.decode)
    columns["cond"] = texts.encode(found.texts)
    columns["cond"].setflags(write=False)
    # The first text of a condition: others may be cut to the same.
    null, known = texts.conditioning.null, {}
    for cond, text in zip(columns["cond"], found.texts, strict=True):
        known.setdefault(cond.tobytes(), text)
    known[null.tobytes()] = ""

    def describe(cond: np.ndarray) -> list[str]:
        rows = np.asarray(cond, np.int32).reshape(-1, *null.shape)
        return [known[key] if (key := row.tobytes()) in known else texts.decode(row[None])[0] for row in rows]

    return Dataset(settings.name, columns, texts.conditioning, texts.encode, describe)


def _load_classes(settings: DataSettings, split: str, data_dir: str, image_size: int) -> tuple[dict, list[str]]:
    if settings.name == "digits":
        return digits.load(split, image_size)
    if settings.is_folder:
        return folder.load(settings.name, split, image_size)
    return images.load(settings.name, split, data_dir, image_size)


def _class_names(settings: DataSettings) -> list[str]:
    if settings.name == "digits":
        return [str(i) for i in range(digits.NUM_CLASSES)]
    return folder.class_names(settings.name) if settings.is_folder else images.class_names(settings.name)


def _classes(count: int) -> Conditioning:
    return Conditioning("class", count + 1, 0, np.array(count, np.int32))


def _class_dataset(name: str, columns: dict, names: list[str]) -> Dataset:
    ids = {class_name: i for i, class_name in enumerate(names)}

    def encode(prompts: list[str]) -> np.ndarray:
        return np.array([_class_id(prompt.strip(), ids, name) for prompt in prompts], np.int32)

    def describe(cond: np.ndarray) -> list[str]:
        return [names[i] if i < len(names) else "" for i in np.asarray(cond).reshape(-1)]

    return Dataset(name, columns, _classes(len(names)), encode, describe)


def _class_id(prompt: str, ids: dict[str, int], name: str) -> int:
    if prompt in ids:
        return ids[prompt]
    if prompt.isdecimal() and int(prompt) < len(ids):
        return int(prompt)
    some = ", ".join(list(ids)[:10])
    raise UserError(f"{name} has no class {prompt!r}; give a number below {len(ids)} or a name: {some}")
