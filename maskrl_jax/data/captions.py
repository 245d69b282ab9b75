"""Grammar, vocabulary and reading of the captions of `shapes` (our choice)."""

import re
import warnings
from dataclasses import dataclass

import numpy as np

from maskrl_jax.errors import UserError

SHAPES = ("circle", "square", "triangle", "cross")
COLOURS = ("red", "green", "blue", "yellow")
RELATIONS = ("left of", "right of", "above", "below")
# From the first to the second thing, as (row, column): the sign of the dominant axis.
RELATION_STEPS = ((0, 1), (0, -1), (1, 0), (-1, 0))
PAD = 0
# A relation is one word of the vocabulary, also where it is written as two: so every thing has its own places.
WORDS = ("<pad>", "a", *RELATIONS, *COLOURS, *SHAPES)
WORD_IDS = {word: i for i, word in enumerate(WORDS)}


@dataclass(frozen=True)
class Thing:
    """What a caption says of one object: indices into SHAPES and COLOURS."""

    shape: int
    colour: int

    def __str__(self):
        """Return the noun phrase, such as `a red circle`."""
        return f"a {COLOURS[self.colour]} {SHAPES[self.shape]}"


@dataclass(frozen=True)
class Caption:
    """One thing, or two with the relation that the first has to the second (index into RELATIONS)."""

    things: tuple[Thing, ...]
    relation: int | None = None

    def __str__(self):
        """Return the sentence, such as `a red circle left of a blue square`."""
        if self.relation is None:
            return str(self.things[0])
        return f"{self.things[0]} {RELATIONS[self.relation]} {self.things[1]}"


def parse(text: str) -> Caption:
    """Read a caption back, the inverse of `str(caption)`. Raises UserError for one outside the grammar."""
    words = text.lower().split()
    try:
        first = _parse_thing(words[:3])
        if len(words) == 3:
            return Caption((first,))
        return Caption((first, _parse_thing(words[-3:])), RELATIONS.index(" ".join(words[3:-3])))
    except ValueError:
        raise UserError(
            f"cannot verify caption {text!r}; write 'a red circle' or 'a red circle left of a blue square'"
        ) from None


def _parse_thing(words: list[str]) -> Thing:
    article, colour, shape = words
    if article != "a":
        raise ValueError(article)
    return Thing(SHAPES.index(shape), COLOURS.index(colour))


def split(prompt: str) -> list[str]:
    """Cut a prompt into words of the vocabulary; `left of` and `right of` are one each."""
    return re.findall(r"(?:left|right)\s+of\b|\S+", " ".join(prompt.lower().split()))


def encode(prompts: list[str], length: int) -> np.ndarray:
    """Turn prompts into word ids, int32 [P, length], padded with PAD.

    A longer prompt is cut with a warning. Raises UserError for an empty prompt or an unknown word.
    """
    ids_PL = np.full((len(prompts), length), PAD, np.int32)
    for row, prompt in zip(ids_PL, prompts, strict=True):
        ids = [_word_id(word, prompt) for word in split(prompt)]
        if not ids:
            raise UserError("empty prompt; write for example 'a red circle'")
        if len(ids) > length:
            warnings.warn(f"prompt {prompt!r} has {len(ids)} words; cut to {length}", stacklevel=2)
        row[: len(ids[:length])] = ids[:length]
    return ids_PL


def _word_id(word: str, prompt: str) -> int:
    if word not in WORD_IDS or WORD_IDS[word] == PAD:
        raise UserError(f"unknown word {word!r} in prompt {prompt!r}; known words: {' '.join(WORDS[1:])}")
    return WORD_IDS[word]


def decode(ids: np.ndarray) -> list[str]:
    """Turn word ids [..., L] back into one text per row; pads are dropped."""
    ids_PL = np.asarray(ids).reshape(-1, np.shape(ids)[-1])
    return [" ".join(WORDS[i] for i in row if i != PAD) for row in ids_PL]
