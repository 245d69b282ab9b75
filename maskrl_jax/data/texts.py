"""How texts become the token ids that a generator is conditioned on, one way for every `data.tokens`."""

import functools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from maskrl_jax.data import captions, dimoo_tokens
from maskrl_jax.data.clip_tokens import ClipTokens
from maskrl_jax.data.conditioning import Conditioning
from maskrl_jax.data.settings import DataSettings
from maskrl_jax.errors import UserError, unknown
from maskrl_jax.sampling.dimoo_sequence import UNCONDITIONAL

LONGEST_CAPTION = 7  # words of "a red circle left of a blue square", where "left of" is one
CLIP_START, CLIP_END = 49406, 49407  # of the published vocabulary (arXiv 2103.00020)


@dataclass(frozen=True)
class Texts:
    """Texts as conditions. The tokenizer's files are opened by the first text, not before.

    `encode` gives int32 [P,L] of P prompts and warns of those that it cut; `decode` gives P texts back.
    """

    conditioning: Conditioning
    encode: Callable[[Sequence[str]], np.ndarray]
    decode: Callable[[np.ndarray], list[str]]


def texts_of(settings: DataSettings) -> Texts:
    """The texts of a config; UserError for tokens that are not known, or a length that cannot be."""
    if settings.tokens not in TOKENS:
        raise unknown("data.tokens", settings.tokens, filter(None, TOKENS))
    return TOKENS[settings.tokens](settings)


def _words(settings: DataSettings) -> Texts:
    """Words of shapes, pad 0."""
    length = settings.text_length
    if length < LONGEST_CAPTION:
        raise UserError(
            f"text_length is {length}; captions of shapes have up to {LONGEST_CAPTION} words, set at least that"
        )
    null = np.full(length, captions.PAD, np.int32)
    conditioning = Conditioning("caption", len(captions.WORDS), length, null)
    return Texts(conditioning, lambda prompts: captions.encode(list(prompts), length), captions.decode)


def _clip(settings: DataSettings) -> Texts:
    """CLIP's byte pairs between a start and an end token."""
    length, pad = settings.text_length, settings.pad
    _fits(settings, 3)
    if not 0 <= pad <= CLIP_END:
        raise UserError(f"data.pad {pad} is no id of CLIP's; it must lie in 0..{CLIP_END}")
    null = np.asarray([CLIP_START, CLIP_END] + [pad] * (length - 2), np.int32)

    @functools.cache
    def tokenizer():
        found = ClipTokens(_folder(settings), length, pad)
        if (found.start, found.end) != (CLIP_START, CLIP_END):
            raise UserError(
                f"the tokenizer in {settings.tokenizer} has {found.start} and {found.end} for start and end, not "
                f"{CLIP_START} and {CLIP_END}; give the one of CLIP"
            )
        return found

    conditioning = Conditioning("caption", CLIP_END + 1, length, null)
    encode = _warning(lambda prompts: tokenizer().counted(prompts), length)
    return Texts(conditioning, encode, lambda ids: tokenizer().decode(ids))


def _dimoo(settings: DataSettings) -> Texts:
    """Lumina-DiMOO's template, padded with -1 on the left."""
    length = settings.text_length
    _fits(settings, len(UNCONDITIONAL))
    tokenizer = functools.cache(lambda: dimoo_tokens.DimooTokens(_folder(settings), length))
    null = dimoo_tokens.padded(UNCONDITIONAL, length)
    conditioning = Conditioning("caption", dimoo_tokens.VOCABULARY, length, null)
    encode = _warning(lambda prompts: tokenizer().encode(prompts), length)
    return Texts(conditioning, encode, lambda ids: tokenizer().decode(ids))


def _warning(counted: Callable, length: int) -> Callable:
    def encode(prompts: Sequence[str]) -> np.ndarray:
        ids_PL, cut = counted(list(prompts))
        if cut:
            warnings.warn(f"{cut} of {len(prompts)} prompts are cut to data.text_length={length} tokens", stacklevel=2)
        return ids_PL

    return encode


def _fits(settings: DataSettings, least: int) -> None:
    if settings.text_length < least:
        raise UserError(
            f"data.text_length is {settings.text_length}; a prompt of data.tokens={settings.tokens} needs at least {least}"
        )


def _folder(settings: DataSettings) -> str:
    if not settings.tokenizer:
        raise UserError(f"data.tokens={settings.tokens} needs data.tokenizer, the folder of the tokenizer's files")
    return settings.tokenizer


TOKENS = {"": _words, "clip": _clip, "dimoo": _dimoo}
