"""Lumina-DiMOO's prompts as token ids (specs/lumina_dimoo.md section 3): a template around the tokens of a text."""

import pathlib
from collections.abc import Sequence

import numpy as np

from maskrl_jax.data.clip_tokens import read_whole
from maskrl_jax.errors import UserError
from maskrl_jax.sampling.dimoo_sequence import UNCONDITIONAL

PAD = -1
VOCABULARY = 134_548
BEFORE, AFTER = UNCONDITIONAL[:-2], UNCONDITIONAL[-1:]  # around the text; <uncondition> stands in the place of one
MARKS = {"<system>": 126332, "</system>": 126333, "<user>": 126334, "</user>": 126335, "<uncondition>": 126351}


class DimooTokens:
    """Turns prompts into rows of token ids, padded on the left with -1.

    Attributes:
      length: ids of a row.
    """

    def __init__(self, folder: str, length: int):
        """Open tokenizer.json in a folder; UserError where it is not there, or another model's."""
        self._tokenizer, self.length = read_whole(pathlib.Path(folder) / "tokenizer.json"), length
        for mark, number in MARKS.items():
            found = self._tokenizer.token_to_id(mark)
            if found != number:
                said = "does not know it" if found is None else f"has {found}"
                raise UserError(f"{mark} is token {number} of Lumina-DiMOO; the tokenizer in {folder} {said}")

    def encode(self, prompts: Sequence[str]) -> tuple[np.ndarray, int]:
        """Ids int32 [P,length] and how many texts were cut; the template always closes. No text is `<uncondition>`."""
        room, cut, rows = self.length - len(BEFORE) - len(AFTER), 0, []
        for found in self._tokenizer.encode_batch(list(prompts), add_special_tokens=False):
            text = found.ids or UNCONDITIONAL[-2:-1]
            rows.append(padded((*BEFORE, *text[:room], *AFTER), self.length))
            cut += len(text) > room
        return np.stack(rows) if rows else np.zeros((0, self.length), np.int32), cut

    def decode(self, ids_PL: np.ndarray) -> list[str]:
        """Texts inside the template of rows [P,length], "" for `<uncondition>`."""
        start = len(BEFORE)
        texts = [row[row != PAD][start : -len(AFTER)].tolist() for row in np.asarray(ids_PL)]
        return ["" if text == [MARKS["<uncondition>"]] else self._tokenizer.decode(text) for text in texts]


def padded(ids: Sequence[int], length: int) -> np.ndarray:
    """One row, int32 [length], with -1 before the ids."""
    return np.asarray([PAD] * (length - len(ids)) + list(ids), np.int32)
