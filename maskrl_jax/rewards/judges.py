"""What the stages above a judge know of it: one interface to the networks trained here and to rewards that are a CLIP.

A judge holds no parameters; they come as `params`, as its stage keeps them.

  names                             scores that it gives, the most telling one first
  without_gradient                  those that have none
  target_shape                      of one sample's target
  identity                          in words, what scores depend on beside `params`
  targets(cond, prompts)            what pictures must show, int32 [B,*target_shape]; made on the host
  score(params, images, target)     {name: float32 [B]} of pictures float32 [B,H,W,3] in [0,1]; pure and differentiable
  features(params, images)          float32 [B,D], for the Frechet distance and diversity; pure
  measured(params, images, target)  both in one pass, the features under "features"
  at_once                           most pictures that go through it at a time; None: any number
  abstract(image_size)              shapes of `params` for square pictures of so many pixels
"""

import dataclasses
import functools
import os
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from maskrl_jax import paths
from maskrl_jax.data.clip_tokens import ClipTokens
from maskrl_jax.errors import UserError, unknown
from maskrl_jax.models.clip import PUBLISHED, ClipConfig, PictureConfig, TextConfig
from maskrl_jax.models.judge import Judge, JudgeConfig
from maskrl_jax.rewards import judge as trained
from maskrl_jax.rewards.clip import KINDS, Formula, computed_in

Array = jax.Array
TOKENIZER = "tokenizer"  # folder of the CLIP's tokenizer within a stage


@dataclasses.dataclass(frozen=True)
class TrainedJudge:
    """A judge of stage `judge`, of cells or of classes."""

    config: JudgeConfig

    @property
    def names(self) -> tuple[str, ...]:
        return trained.names(self.config.kind)

    without_gradient = trained.WITHOUT_GRADIENT
    at_once = None

    @property
    def target_shape(self) -> tuple[int, ...]:
        return (3,) if self.config.kind == "cells" else ()

    @property
    def identity(self) -> str:
        return self.config.kind

    def targets(self, cond: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        return trained.targets(self.config.kind, cond, prompts)

    def read(self, params: Any, images: Array) -> dict[str, Array]:
        """What the network says; a gradient computes it again rather than keeping it."""
        return jax.checkpoint(Judge(self.config).apply)(params, images)

    def score(self, params: Any, images: Array, target: Array) -> dict[str, Array]:
        return trained.score(self.config.kind, self.read(params, images), target)

    def features(self, params: Any, images: Array) -> Array:
        return self.read(params, images)["features"]

    def measured(self, params: Any, images: Array, target: Array) -> dict[str, Array]:
        outputs = self.read(params, images)
        return trained.score(self.config.kind, outputs, target) | {"features": outputs["features"]}

    def abstract(self, image_size: int) -> Any:
        pictures = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.float32)
        return jax.eval_shape(Judge(self.config).init, jax.random.key(0), pictures)


@dataclasses.dataclass(frozen=True)
class ClipJudge:
    """One or several rewards of `rewards.clip`, each a network of its own; targets are token ids, the same for all.

    The features are those of the first network's pictures, of length 1. `workdir` is the stage that keeps the
    tokenizer, which targets alone need.
    """

    rewards: tuple[Formula, ...]
    workdir: str = ""

    without_gradient = ()

    def __post_init__(self):
        if not self.rewards:
            raise ValueError("a judge of model.kind=clip has no rewards")
        texts = {(reward.config.text.length, reward.config.text.end) for reward in self._readers}
        if len(texts) > 1:
            raise ValueError("the rewards of a judge read the same tokens, and these have texts of other sizes")

    @property
    def _readers(self) -> list[Formula]:
        return [reward for reward in self.rewards if reward.reads_prompt]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(reward.kind for reward in self.rewards)

    @property
    def at_once(self) -> int:
        return min(reward.batch_size for reward in self.rewards)

    @property
    def target_shape(self) -> tuple[int, ...]:
        return (self._readers[0].config.text.length,) if self._readers else (1,)

    @property
    def identity(self) -> str:
        return str(self.rewards)

    @functools.cached_property
    def _tokens(self) -> ClipTokens:
        if not paths.is_remote(self.workdir):
            return ClipTokens(os.path.join(self.workdir, TOKENIZER), *self.target_shape)
        with tempfile.TemporaryDirectory() as folder:  # the library reads local files
            for file in epath.Path(self.workdir, TOKENIZER).iterdir():
                file.copy(os.path.join(folder, file.name))
            return ClipTokens(folder, *self.target_shape)

    def targets(self, cond: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        if not self._readers:  # by the picture alone
            return np.zeros((len(prompts), *self.target_shape), np.int32)
        return self._tokens.encode(prompts)

    def score(self, params: Any, images: Array, target: Array) -> dict[str, Array]:
        found = self.measured(params, images, target)
        return {name: found[name] for name in self.names}

    def features(self, params: Any, images: Array) -> Array:
        first = self.rewards[0]
        return first.pictures(params[first.kind], images)

    def measured(self, params: Any, images: Array, target: Array) -> dict[str, Array]:
        found = {}
        for reward in self.rewards:
            own = params[reward.kind]
            pictures_BP = reward.pictures(own, images)
            texts_BP = reward.texts(own, target) if reward.reads_prompt else None
            found[reward.kind] = reward.value(own, pictures_BP, texts_BP)
            found.setdefault("features", pictures_BP)
        return found

    def abstract(self, image_size: int) -> Any:
        return {reward.kind: reward.abstract() for reward in self.rewards}


def judge_of(model: Mapping[str, Any], workdir: str = "") -> TrainedJudge | ClipJudge:
    """The judge of a stage's `model` settings; `workdir` is that stage. ValueError or UserError where they cannot be."""
    return _clip(workdir, **model) if model["kind"] == "clip" else TrainedJudge(JudgeConfig(**model))


def _clip(
    workdir: str, *, kind: str, rewards: Mapping[str, Any], dtype: str, remat: bool, batch_size: int
) -> ClipJudge:
    for name in rewards:
        if name not in KINDS:
            raise unknown("reward of a judge of model.kind=clip", name, KINDS)
    sizes = {name: computed_in(sizes_of(rewards[name]), dtype, remat) for name in KINDS if name in rewards}
    return ClipJudge(tuple(Formula(name, found, batch_size) for name, found in sizes.items()), workdir)


def sizes_of(settings: str | Mapping[str, Any]) -> ClipConfig:
    """Sizes that a config names: one of `models.clip.PUBLISHED`, or the fields of both towers."""
    if isinstance(settings, str):
        if settings not in PUBLISHED:
            raise unknown("CLIP", settings, PUBLISHED)
        return PUBLISHED[settings]
    if set(settings) != {"text", "picture"}:
        raise UserError(f"sizes of a CLIP are one of {', '.join(PUBLISHED)}, or its text and picture")
    return ClipConfig(TextConfig(**settings["text"]), PictureConfig(**settings["picture"]))


def settings_of(sizes: ClipConfig) -> str | dict[str, dict]:
    """Undo `sizes_of`; how the blocks compute is no size."""
    named = [name for name, known in PUBLISHED.items() if known == sizes]
    if named:
        return named[0]
    towers = {name: dataclasses.asdict(tower) for name, tower in (("text", sizes.text), ("picture", sizes.picture))}
    return {name: {key: x for key, x in of.items() if key not in ("dtype", "remat")} for name, of in towers.items()}
