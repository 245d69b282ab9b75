"""Tokenizers as the stages above see them: pictures to codes and back, whatever network does it.

A published text-to-image model brings a text encoder beside its tokenizer. It is as frozen, and the same for all that
is trained above it, so it is part of the tokenizer's stage: `told` turns prompts into what the generator reads.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from maskrl_jax.errors import unknown
from maskrl_jax.models import meissonic
from maskrl_jax.models.clip import LAION_H14, TextConfig, TextTower
from maskrl_jax.models.conv_autoencoder import ConvSizes
from maskrl_jax.models.google_vqgan import GoogleVQGAN, GoogleVQGANConfig
from maskrl_jax.models.taming_vqgan import TamingVQGAN, TamingVQGANConfig
from maskrl_jax.models.vq_model import PUBLISHED as VQ_SIZES
from maskrl_jax.models.vq_model import VQModel, VQModelConfig
from maskrl_jax.models.vqgan import Tokenizer, TokenizerConfig, nearest_code
from maskrl_jax.tasks.task import Parent

Array = jax.Array
OURS = "patch"
AT_ONCE = 4  # pictures that a device decodes at a time with a published network, whose maps are large (our choice)
AESTHETIC_SCORE = 6.0  # micro-condition of published samples (specs/meissonic.md section 2)


@dataclasses.dataclass(frozen=True)
class Published:
    """A published network at pictures of a size; it has `encode`, `decode` and a codebook among its parameters.

    Beside {"params"} of the network a stage keeps {"text"}, the variables of the text encoder, where there is one.
    """

    form: str
    network: nn.Module
    image_size: int
    text: TextConfig | None = None

    def __post_init__(self):
        if self.image_size < 1 or self.image_size % self.network.config.patch:
            raise ValueError(f"image_size {self.image_size} is not divisible by patch {self.network.config.patch}")

    @property
    def codebook_size(self) -> int:
        return self.network.config.codebook_size

    @property
    def side(self) -> int:
        return self.image_size // self.network.config.patch

    @property
    def num_tokens(self) -> int:
        return self.side**2


@dataclasses.dataclass(frozen=True)
class Codec:
    """A trained tokenizer as two functions of its parameters (a pytree that travels as `frozen`)."""

    config: TokenizerConfig | Published
    params: Any
    encode: Callable[[Any, Array], Array]  # (params, images [B,H,W,3] in [0,1]) -> ids [B,N] int32
    decode: Callable[[Any, Array], Array]  # (params, ids [B,N]) -> images [B,H,W,3] in [0,1]
    codebook: Callable[[Any], Array]  # params -> float32 [K,E]
    at_once: int | None = None  # pictures that a device shall decode at a time; None: all

    def told(self, params: Any, cond: Any, null: Any) -> tuple[Any, Any]:
        """What a generator reads of conditions [B,...] and of the null one: themselves, or the states of a text.

        Encoding a prompt again for every rollout costs next to nothing (Meissonic: 302 M weights on 77 tokens, for 1.5
        TFLOP of each call and branch).
        """
        text = getattr(self.config, "text", None)
        if text is None:
            return cond, null
        both = jnp.concatenate([cond, jnp.asarray(null)[None].astype(cond.dtype)])
        states, pooled = TextTower(text).apply(params["text"], both)
        size = self.config.image_size
        micro = jnp.tile(jnp.asarray([[size, size, 0, 0, AESTHETIC_SCORE]], jnp.float32), (len(both), 1))
        both = meissonic.Prompt(*jax.lax.stop_gradient((states, pooled, micro)))
        return jax.tree.map(lambda x: x[:-1], both), jax.tree.map(lambda x: x[-1], both)


def sizes(settings: Any) -> TokenizerConfig | Published:
    """What a config's `model` says; `form` is `patch` (ours, where none is named), `taming`, `google` or `amused`.

    `amused` is the tokenizer of aMUSEd, Meissonic and Lumina-DiMOO; with `text`, sizes of a CLIP text tower other than
    H/14's, it has Meissonic's text encoder beside it.
    """
    own = dict(settings)
    form = own.pop("form", OURS)
    if form == OURS:
        return TokenizerConfig(**own)
    makers = {"taming": _taming, "google": _google, "amused": _amused}
    if form not in makers:
        raise unknown("form of a tokenizer", form, (OURS, *makers))
    image_size, text = own.pop("image_size", 256), own.pop("text", None)
    if text is not None and form != "amused":
        raise ValueError(f"a tokenizer of form {form} has no text encoder; leave text out")
    text = None if text is None else dataclasses.replace(LAION_H14.text, **text)
    return Published(form, makers[form](own), image_size, text)


def _taming(own: dict) -> nn.Module:
    conv = {"conv": ConvSizes(**own.pop("conv"))} if "conv" in own else {}
    return TamingVQGAN(TamingVQGANConfig(**conv, **own))


def _google(own: dict) -> nn.Module:
    return GoogleVQGAN(GoogleVQGANConfig(**own))


def _amused(own: dict) -> nn.Module:
    conv = ConvSizes(**own.pop("conv")) if "conv" in own else VQ_SIZES
    return VQModel(VQModelConfig(conv, **own))


def load(parent: Parent) -> Codec:
    """Open a trained tokenizer."""
    found = sizes(parent.config.model)
    if isinstance(found, Published):
        return codec(found, parent.params)
    return codec(found, {"model": parent.params, "codebook": parent.extra["codebook"]["codes"]})


def codec(config: TokenizerConfig | Published, params: Any) -> Codec:
    """Encode and decode functions of a tokenizer's sizes, around the given parameters."""
    make = _published if isinstance(config, Published) else _ours
    at_once = AT_ONCE if isinstance(config, Published) else None
    return Codec(config, params, *make(config), at_once)


def abstract(settings: Any) -> Any:
    """Shapes of the parameters that a codec of a config's `model` has, without training one."""
    found = sizes(settings)
    image = jax.ShapeDtypeStruct((1, found.image_size, found.image_size, 3), jnp.float32)
    if isinstance(found, Published):
        made = jax.eval_shape(found.network.init, jax.random.key(0), image)
        if found.text:
            ids = jax.ShapeDtypeStruct((1, found.text.length), jnp.int32)
            made = made | {"text": jax.eval_shape(TextTower(found.text).init, jax.random.key(0), ids)}
        return made
    codebook = jax.ShapeDtypeStruct((found.codebook_size, found.code_width), jnp.float32)
    model = jax.eval_shape(Tokenizer(found).init, jax.random.key(0), image, codebook)
    return {"model": model, "codebook": codebook}


def _ours(config: TokenizerConfig):
    model = Tokenizer(config)

    def encode(p, images):
        codes = model.apply(p["model"], images, method="encode")
        return nearest_code(codes, p["codebook"]).reshape(len(images), -1)

    def decode(p, ids):
        grid = p["codebook"][ids].reshape(len(ids), config.side, config.side, -1)
        return jnp.clip(model.apply(p["model"], grid, method="decode"), 0.0, 1.0)

    return encode, decode, lambda p: p["codebook"]


def _published(config: Published):
    def apply(p, x, method):
        return config.network.apply({"params": p["params"]}, x, method=method)

    def encode(p, images):
        return apply(p, images, "encode").reshape(len(images), -1)

    def decode(p, ids):
        return jnp.clip(apply(p, ids.reshape(len(ids), config.side, config.side), "decode"), 0.0, 1.0)

    return encode, decode, lambda p: p["params"]["codebook"]
