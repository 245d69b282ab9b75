"""One interface to every image set: pictures, their conditions, and how prompts become conditions."""

import functools
import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from maskrl_jax.data import captions, digits, images, shapes, verifier
from maskrl_jax.data.scenes import IMAGE_SIZE
from maskrl_jax.errors import UserError

SPLITS = ("train", "validation")
HELD_OUT_SHARE = 4  # one caption in so many
LONGEST_CAPTION = 7  # words of "a red circle left of a blue square", where "left of" is one


@dataclass(frozen=True)
class Conditioning:
    """What a generator is told of a picture.

    kind is `caption` (a row of `length` word ids, pad 0) or `class` (one id, `length` 0). `vocab_size` counts
    every id a model can meet, the null one included; `null` (int32, shape of one condition) stands for "not
    told": only pads, or the id after the last class.
    """

    kind: str
    vocab_size: int
    length: int
    null: np.ndarray


@dataclass(frozen=True)
class Dataset:
    """A split of an image set, addressed by position; `open_dataset` makes one.

    `columns` holds `image` (uint8 [H, W, 3] per position), `cond`, `label` and, for shapes, `tone`; each is
    an array or, for a set too large to keep, read from disk when indexed. `encode` and `describe` translate
    prompts to conditions and back; `verify` judges pictures exactly (shapes only, else None).
    """

    name: str
    columns: dict
    conditioning: Conditioning
    encode: Callable[[list[str]], np.ndarray]
    describe: Callable[[np.ndarray], list[str]]
    verify: Callable[[np.ndarray, list[str]], dict[str, np.ndarray]] | None = None

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.columns["label"])

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
        cond = np.unique(np.asarray(self.columns["cond"]), axis=0)
        if self.conditioning.kind == "class":
            return cond
        return cond[[is_held_out(text) == held_out for text in self.describe(cond)]]

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


def open_dataset(name: str, split: str, data_dir: str, image_size: int, text_length: int = 8) -> Dataset:
    """Open a split (`train` or `validation`) of `shapes`, `digits` or any TFDS set of labelled images.

    Sets that are not in `data_dir` are written there first. `text_length` counts for captions only.
    Raises UserError for an unknown name or split, or a size that the set cannot have.
    """
    if split not in SPLITS:
        raise UserError(f"unknown split {split!r}; choose one of: {', '.join(SPLITS)}")
    if name == "shapes":
        return _open_shapes(split, data_dir, image_size, text_length)
    if image_size < 1:
        raise UserError(f"image_size is {image_size}; give a positive number of pixels")
    if name == "digits":
        return _class_dataset(name, *digits.load(split, image_size))
    return _class_dataset(name, *images.load(name, split, data_dir, image_size))


def _open_shapes(split: str, data_dir: str, image_size: int, text_length: int) -> Dataset:
    if image_size != IMAGE_SIZE:
        raise UserError(f"shapes has pictures of {IMAGE_SIZE} pixels, not {image_size}; set {IMAGE_SIZE}")
    conditioning = _captions(text_length)
    columns = dict(shapes.load(split, data_dir))
    texts, inverse = np.unique(columns.pop("caption"), return_inverse=True)
    columns["cond"] = captions.encode(texts.tolist(), text_length)[inverse]
    return Dataset(
        name="shapes",
        columns=columns,
        conditioning=conditioning,
        encode=lambda prompts: captions.encode(prompts, text_length),
        describe=captions.decode,
        verify=verifier.verify,
    )


def _captions(text_length: int) -> Conditioning:
    if text_length < LONGEST_CAPTION:
        raise UserError(
            f"text_length is {text_length}; captions of shapes have up to {LONGEST_CAPTION} words, set at least that"
        )
    return Conditioning("caption", len(captions.WORDS), text_length, np.full(text_length, captions.PAD, np.int32))


def _class_dataset(name: str, columns: dict, names: list[str]) -> Dataset:
    ids = {class_name: i for i, class_name in enumerate(names)}

    def encode(prompts: list[str]) -> np.ndarray:
        return np.array([_class_id(prompt.strip(), ids, name) for prompt in prompts], np.int32)

    def describe(cond: np.ndarray) -> list[str]:
        return [names[i] if i < len(names) else "" for i in np.asarray(cond).reshape(-1)]

    null = np.array(len(names), np.int32)
    return Dataset(name, columns, Conditioning("class", len(names) + 1, 0, null), encode, describe)


def _class_id(prompt: str, ids: dict[str, int], name: str) -> int:
    if prompt in ids:
        return ids[prompt]
    if prompt.isdecimal() and int(prompt) < len(ids):
        return int(prompt)
    some = ", ".join(list(ids)[:10])
    raise UserError(f"{name} has no class {prompt!r}; give a number below {len(ids)} or a name: {some}")


def conditioning_of(name: str, text_length: int = 8) -> Conditioning:
    """What pictures of a set are conditioned on, without opening (or writing) the set; UserError as `open_dataset`."""
    if name == "shapes":
        return _captions(text_length)
    classes = digits.NUM_CLASSES if name == "digits" else images.num_classes(name)
    return Conditioning("class", classes + 1, 0, np.array(classes, np.int32))
