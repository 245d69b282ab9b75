"""Rewards that are a CLIP, from local weights: CLIPScore, PickScore, HPSv2.1 and LAION's aesthetic score.

With E the projected features of picture x and prompt c, at length 1, and cos = E(x) . E(c):

  clip_score  100 max(cos, 0). Hessel et al. 2021 (arXiv 2104.08718) have the factor 2.5 and "A photo depicts " before
              the caption; that of the tables of image generators, and ours, is 100 without it. Any CLIP; say which.
  pick_score  exp(s) cos with the checkpoint's own s, about 20..23 (Kirstain et al. 2023, arXiv 2305.01569).
  hps         cos, about 0.2..0.35, times 100 in tables: HPSv2.1 (Wu et al. 2023, arXiv 2306.09341, and its code).
              A picture is resized as floats and padded with black to a square, not cropped.
  aesthetic   M(E(x)), about 1..10, the prompt is not read: the linear layers M of LAION's
              improved-aesthetic-predictor on OpenAI's L/14.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from maskrl_jax.convert import clip as convert
from maskrl_jax.convert import files
from maskrl_jax.data.clip_tokens import ClipTokens
from maskrl_jax.errors import UserError, unknown
from maskrl_jax.models.clip import LAION_H14, OPENAI_L14, AestheticHead, Clip, ClipConfig, unit
from maskrl_jax.models.clip_pixels import Pixels, prepare

Array = jax.Array
KEPT = 4096  # prompts whose features are kept, those asked for last
WEIGHTS, HEAD, SIZES = "model.safetensors", "aesthetic.safetensors", "config.json"


@dataclasses.dataclass(frozen=True)
class Kind:
    """Which weights a reward is of, their sizes where no config.json tells, and how its reference sees a picture."""

    weights: str
    sizes: ClipConfig
    fit: str
    as_bytes: bool = True
    reads_prompt: bool = True


KINDS = {
    "clip_score": Kind("a CLIP's, such as those of openai/clip-vit-large-patch14", OPENAI_L14, "crop"),
    "pick_score": Kind("those of yuvalkirstain/PickScore_v1", LAION_H14, "crop"),
    "hps": Kind("the state_dict of HPS_v2.1_compressed.pt, saved as safetensors", LAION_H14, "pad", as_bytes=False),
    "aesthetic": Kind("those of openai/clip-vit-large-patch14", OPENAI_L14, "crop_even", reads_prompt=False),
}


@dataclasses.dataclass(frozen=True)
class Formula:
    """A reward as pure functions of the variables {"clip": of `Clip`, "head": of `AestheticHead`}; differentiable.

    Of `clip` a reward that reads no prompt has the picture tower alone.
    """

    kind: str
    config: ClipConfig
    batch_size: int = 32  # so many pictures or texts go through a tower at once

    def __post_init__(self):
        if self.kind not in KINDS:
            raise unknown("reward", self.kind, KINDS)
        if self.batch_size < 1:
            raise ValueError(f"batch_size {self.batch_size} must be at least 1")

    @property
    def reads_prompt(self) -> bool:
        return KINDS[self.kind].reads_prompt

    @property
    def pixels(self) -> Pixels:
        known = KINDS[self.kind]
        return Pixels(self.config.picture.image_size, known.fit, known.as_bytes)

    def pictures(self, params: Any, images: Array) -> Array:
        """Features of length 1, float32 [B,P], of pictures [B,H,W,3] in [0,1]."""

        def features(x):
            return self._apply(params, prepare(x, self.pixels), "picture_features")

        return self._in_batches(features, images)

    def texts(self, params: Any, ids: Array) -> Array:
        """Features of length 1, float32 [B,P], of token ids int32 [B,L]."""
        return self._in_batches(lambda x: self._apply(params, x, "text_features"), ids)

    def value(self, params: Any, pictures_BP: Array, texts_BP: Array | None) -> Array:
        """The reward of such features, float32 [B]; `texts_BP` are not read where prompts are not."""
        if self.kind == "aesthetic":
            return AestheticHead().apply(params["head"], pictures_BP)
        cosine = (pictures_BP * texts_BP).sum(-1)
        if self.kind == "clip_score":
            return 100 * jnp.maximum(cosine, 0.0)
        return jnp.exp(params["clip"]["params"]["logit_scale"]) * cosine if self.kind == "pick_score" else cosine

    def abstract(self) -> Any:
        """Shapes of the variables."""
        size, struct = self.config.picture.image_size, jax.ShapeDtypeStruct
        inputs = struct((1, size, size, 3), jnp.float32), struct((1, self.config.text.length), jnp.int32)
        found = {"clip": jax.eval_shape(Clip(self.config).init, jax.random.key(0), *inputs)}
        if self.kind == "aesthetic":
            features = struct((1, self.config.picture.projection), jnp.float32)
            found["head"] = jax.eval_shape(AestheticHead().init, jax.random.key(0), features)
        return self.needed(found)

    def needed(self, params: Any) -> Any:
        """The variables without a text tower that is never asked."""
        if self.reads_prompt:
            return params
        towers = {name: tree for name, tree in params["clip"]["params"].items() if name != "text"}
        return params | {"clip": {"params": towers}}

    def _apply(self, params, inputs, method):
        return unit(Clip(self.config).apply(params["clip"], inputs, method=method))

    def _in_batches(self, features, rows):
        if len(rows) <= self.batch_size:
            return features(rows)
        return jax.lax.map(lambda row: features(row[None])[0], rows, batch_size=self.batch_size)


class ClipReward:
    """`score(images, prompts)` on the default device; differentiable in the images, also inside another program.

    `params` and `values` are for programs that hold the weights themselves. Text features of `KEPT` prompts are
    kept.
    """

    def __init__(self, kind: str, config: ClipConfig, params: Any, tokens: ClipTokens | None, batch_size: int = 32):
        """Take the variables of `Formula`; pictures go in such batches."""
        self.formula = Formula(kind, config, batch_size)
        self.params, self._tokens = jax.device_put(params), tokens
        self._known: dict[str, np.ndarray] = {}
        self._values = jax.jit(self.values)

    def score(self, images: Array, prompts: Sequence[str]) -> Array:
        """Score pictures [B,H,W,3] float32 in [0,1] by their prompts: float32 [B]; NaN where a picture is not finite.

        Raises ValueError where the two do not match in number, or are no pictures.
        """
        if images.ndim != 4 or images.shape[-1] != 3 or len(images) != len(prompts):
            raise ValueError(f"pictures {images.shape} and {len(prompts)} prompts; wanted are [B,H,W,3] and B")
        return self._values(self.params, jax.device_put(images), jax.device_put(self.text_features(prompts)))

    def text_features(self, prompts: Sequence[str]) -> np.ndarray:
        """Features of length 1, float32 [B,P]; zeros where the reward does not read prompts."""
        if not self.formula.reads_prompt:
            return np.zeros((len(prompts), self.formula.config.text.projection), np.float32)
        wanted, size = dict.fromkeys(prompts), self.formula.batch_size
        found = {prompt: self._known.pop(prompt) for prompt in wanted if prompt in self._known}
        new = [prompt for prompt in wanted if prompt not in found]
        for start in range(0, len(new), size):
            part = new[start : start + size]
            ids = self._tokens.encode(part + [""] * (size - len(part)))  # one shape, one program
            features = jax.device_get(_encode(self.formula, self.params, jax.device_put(ids)))
            found |= {prompt: row.copy() for prompt, row in zip(part, features, strict=False)}  # no view of the batch
        self._known |= found
        for prompt in list(self._known)[:-KEPT]:
            del self._known[prompt]
        return np.stack([found[prompt] for prompt in prompts])

    def values(self, params: Any, images: Array, texts_BP: Array) -> Array:
        """Pure: score pictures by `text_features`, float32 [B], a batch of `batch_size` after the other."""
        return self.formula.value(params, self.formula.pictures(params, images), texts_BP)


@functools.partial(jax.jit, static_argnums=0)
def _encode(formula: Formula, params: Any, ids: Array) -> Array:
    return formula.texts(params, ids)


def open_reward(
    kind: str, folder: str, *, dtype: str = "float32", remat: bool = False, batch_size: int = 32
) -> ClipReward:
    """Open a reward of `KINDS` from a folder with model.safetensors and a tokenizer, and no download.

    A config.json of Hugging Face gives sizes other than the published ones; `aesthetic` needs aesthetic.safetensors
    beside it and no tokenizer. The layout is that of Hugging Face or of open_clip.

    Args:
      dtype: of the blocks' arithmetic, float32 or bfloat16.
      remat: whether a gradient computes blocks again rather than keeping their values.

    Raises:
      UserError: one line about the file that is missing or does not fit.
    """
    config, params, tokens = read_reward(kind, folder)
    return ClipReward(kind, computed_in(config, dtype, remat), params, tokens, batch_size)


def computed_in(config: ClipConfig, dtype: str, remat: bool) -> ClipConfig:
    """The same sizes with other arithmetic of the blocks."""
    towers = (config.text, config.picture)
    return ClipConfig(*(dataclasses.replace(tower, dtype=dtype, remat=remat) for tower in towers))


def read_reward(kind: str, folder: str) -> tuple[ClipConfig, Any, ClipTokens | None]:
    """Sizes, variables and tokenizer (None where prompts are not read) from a folder; see `open_reward`."""
    if kind not in KINDS:
        raise unknown("reward", kind, KINDS)
    place, known = pathlib.Path(folder), KINDS[kind]
    state = _state(place / WEIGHTS, kind, known.weights)
    try:
        sizes = place / SIZES
        config = convert.config_of(files.json_object(sizes)) if sizes.exists() else known.sizes
        params = {"clip": convert.params_of(state, config)}
    except (KeyError, ValueError) as error:
        raise UserError(f"reward {kind!r}: {place} does not hold {known.weights}: {error}") from error
    if kind == "aesthetic":
        head = _state(place / HEAD, kind, "the layers of sac+logos+ava1-l14-linearMSE.pth, saved as safetensors")
        try:
            params["head"] = convert.aesthetic_params_of(head, config.picture.projection)
        except ValueError as error:
            raise UserError(f"reward {kind!r}: {place / HEAD} does not fit: {error}") from error
    tokens = ClipTokens(folder, config.text.length) if known.reads_prompt else None
    if tokens and tokens.end != config.text.end:
        raise UserError(f"{place}: the tokenizer ends a text by {tokens.end}, the weights by {config.text.end}")
    return config, params, tokens


def _state(path: pathlib.Path, kind: str, wanted: str) -> dict[str, np.ndarray]:
    if not path.exists():
        raise UserError(f"reward {kind!r} wants {path}: {wanted}; copy it there, nothing is downloaded")
    return files.read(str(path))
