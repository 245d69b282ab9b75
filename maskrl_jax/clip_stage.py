"""Rewards that are a CLIP as a stage `judge`: a folder with a subfolder for each, as `rewards.clip.open_reward` has it."""

import pathlib
from collections.abc import Mapping
from typing import Any

import jax
from ml_collections import ConfigDict

from maskrl_jax import runner, verify
from maskrl_jax.data import clip_tokens
from maskrl_jax.errors import UserError
from maskrl_jax.rewards import clip, judges

# What tokenizers must read alike to be taken for the same one: words, digits, signs, capitals, letters of others.
PROBE = ("a photo of two cats.", "A red circle left of 17 blue squares!", "It's naïve – 猫 & café №5", "")


def read(folder: str, config: ConfigDict, out: str, store: str, compare: bool = False) -> None:
    """Make a judge in `out` of the rewards in a folder, whose subfolders are named as `rewards.clip.KINDS`.

    `config` is that of the stage; which rewards it has, and of what sizes, is told by the folder. The stage keeps the
    tokenizer. With `compare`, outputs are first compared with those of the reference (`verify`). Raises UserError for
    what is missing, left over, misshapen or no such reward.
    """
    found = {name: clip.read_reward(name, str(place)) for name, place in _subfolders(folder).items()}
    with config.ignore_type():
        config.model.rewards = {name: judges.settings_of(sizes) for name, (sizes, *_) in found.items()}
    try:
        judge = judges.judge_of(config.model)
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{folder} does not fit {config.name}: {error}") from error
    params = {reward.kind: reward.needed(found[reward.kind][1]) for reward in judge.rewards}
    tokenizers = {name: tokens for name, (*_, tokens) in found.items() if tokens}
    _check_alike(tokenizers)
    if compare:
        for name, (sizes, own, _) in found.items():
            verify.reward(name, pathlib.Path(folder, name), own, sizes)
    place = pathlib.Path(folder, next(iter(tokenizers), ""))
    kept = {name: place / name for name in clip_tokens.FILES if tokenizers and (place / name).exists()}
    beside = {f"{judges.TOKENIZER}/{name}": str(file) for name, file in kept.items()}
    runner.keep(config, out, store, {}, params, {}, beside)
    print(f"{out}: a judge that gives {', '.join(judge.names)}, {_count(params)}")


def _subfolders(folder: str) -> dict[str, pathlib.Path]:
    place = pathlib.Path(folder)
    if not place.is_dir():
        raise UserError(
            f"there is no folder {folder}; name one with a subfolder for each reward: {', '.join(clip.KINDS)}"
        )
    found = {inner.name: inner for inner in sorted(place.iterdir()) if inner.is_dir() and inner.name[:1] != "."}
    if not found:
        raise UserError(f"{folder} has no subfolder; make one for each reward: {', '.join(clip.KINDS)}")
    return found


def _check_alike(tokenizers: Mapping[str, clip_tokens.ClipTokens]) -> None:
    """Raise UserError for rewards that would read the same prompt as other tokens; they share their targets."""
    read_as = {name: tokens.encode(PROBE).tolist() for name, tokens in tokenizers.items()}
    first = next(iter(read_as), None)
    for name, ids in read_as.items():
        if ids != read_as[first]:
            raise UserError(
                f"the tokenizers of {first} and {name} differ; make a judge of each, for they cannot share one"
            )


def _count(params: Any) -> str:
    return f"{sum(x.size for x in jax.tree.leaves(params)):,} parameters"
