"""CLIP's byte-pair encoding of prompts, from local files through the `tokenizers` library."""

import pathlib
from collections.abc import Sequence

import numpy as np

from maskrl_jax.errors import UserError

START, END = "<|startoftext|>", "<|endoftext|>"
# What is cut before bytes are paired: contractions, words, single digits, runs of other signs (arXiv 2103.00020).
PIECES = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
WORD_END = "</w>"
FILES = ("tokenizer.json", "vocab.json", "merges.txt")  # that a tokenizer is read from, where they are there


class ClipTokens:
    """Turns prompts into token ids, lower-cased, between a start and an end token, as Hugging Face does.

    open_clip repairs broken Unicode and HTML entities before; prompts without such have the same ids there.

    Attributes:
      start, end: ids of the two.
      length: tokens of a row, both included.
      pad: id behind the end token: the end token itself for OpenAI and Hugging Face, 0 for open_clip.
    """

    def __init__(self, folder: str, length: int = 77, pad: int | None = None):
        """Open tokenizer.json, or vocab.json and merges.txt, in a folder (UserError where neither is there)."""
        self._tokenizer, self.length = _read(pathlib.Path(folder)), length
        self.start, self.end = (self._tokenizer.token_to_id(token) for token in (START, END))
        if self.start is None or self.end is None:
            raise UserError(f"the tokenizer in {folder} has no {START} or {END}; give the one of a CLIP")
        self.pad = self.end if pad is None else pad

    def encode(self, prompts: Sequence[str]) -> np.ndarray:
        """Token ids int32 [P,length]; what is too long is cut before its end token."""
        return self.counted(prompts)[0]

    def counted(self, prompts: Sequence[str]) -> tuple[np.ndarray, int]:
        """The same, and how many prompts were cut."""
        rows_PL, cut = np.full((len(prompts), self.length), self.pad, np.int32), 0
        for row, found in zip(
            rows_PL, self._tokenizer.encode_batch(list(prompts), add_special_tokens=False), strict=True
        ):
            ids = [self.start, *found.ids[: self.length - 2], self.end]
            row[: len(ids)] = ids
            cut += len(found.ids) > self.length - 2
        return rows_PL, cut

    def decode(self, ids_PL: np.ndarray) -> list[str]:
        """Texts of rows [P,length], lower-cased as `encode` saw them, without start, end and what follows it."""
        from tokenizers import decoders

        texts = []
        for row in np.asarray(ids_PL).tolist():
            ids = row[1 : row.index(self.end)] if self.end in row else row[1:]
            pieces = [self._tokenizer.id_to_token(number) or "" for number in ids]
            texts.append(decoders.ByteLevel().decode(pieces).replace(WORD_END, " ").strip())
        return texts


def _read(folder: pathlib.Path):
    whole, vocabulary, merges = (folder / name for name in FILES)
    if vocabulary.exists() and merges.exists():
        return _byte_pairs(vocabulary, merges)
    if not whole.exists():
        raise UserError(
            f"{folder} has no vocab.json with merges.txt, and no tokenizer.json; copy those of the CLIP there"
        )
    return read_whole(whole)


def read_whole(file: pathlib.Path):
    """The tokenizer of a tokenizer.json, without the padding and cutting that it may ask for; UserError for none."""
    from tokenizers import Tokenizer

    if not file.exists():
        raise UserError(f"{file.parent} has no {file.name}; name the folder that holds the model's own")
    try:
        found = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing narrower
        raise UserError(f"cannot read {file} ({_short(error)}); copy it again") from None
    found.no_padding()
    found.no_truncation()
    return found


def _byte_pairs(vocabulary: pathlib.Path, merges: pathlib.Path):
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

    options = {"continuing_subword_prefix": "", "end_of_word_suffix": WORD_END, "unk_token": END}
    try:
        found = Tokenizer(models.BPE.from_file(str(vocabulary), str(merges), **options))
    except Exception as error:  # the library raises nothing narrower
        raise UserError(
            f"{vocabulary} and {merges.name} make no tokenizer ({_short(error)}); copy both again, of one model"
        ) from None
    found.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    cut = pre_tokenizers.Split(Regex(PIECES), behavior="removed", invert=True)
    found.pre_tokenizer = pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    known = [token for token in (START, END) if found.token_to_id(token) is not None]
    found.add_special_tokens(known)  # a prompt that spells them has them, as in Hugging Face's tokenizer
    return found


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:120]
