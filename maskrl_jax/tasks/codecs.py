"""Tokenizers as the stages above see them: pictures to codes and back, whatever network does it."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from maskrl_jax.errors import unknown
from maskrl_jax.models.conv_autoencoder import ConvSizes
from maskrl_jax.models.google_vqgan import GoogleVQGAN, GoogleVQGANConfig
from maskrl_jax.models.taming_vqgan import TamingVQGAN, TamingVQGANConfig
from maskrl_jax.models.vqgan import Tokenizer, TokenizerConfig, nearest_code
from maskrl_jax.tasks.task import Parent

Array = jax.Array
OURS = "patch"


@dataclasses.dataclass(frozen=True)
class Published:
    """A published network at pictures of a size; it has `encode`, `decode` and a codebook among its parameters."""

    form: str
    network: nn.Module
    image_size: int

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


def sizes(settings: Any) -> TokenizerConfig | Published:
    """What a config's `model` says; `form` is `patch` (ours, where none is named), `taming` or `google`."""
    own = dict(settings)
    form = own.pop("form", OURS)
    if form == OURS:
        return TokenizerConfig(**own)
    makers = {"taming": _taming, "google": _google}
    if form not in makers:
        raise unknown("form of a tokenizer", form, (OURS, *makers))
    image_size = own.pop("image_size", 256)
    return Published(form, makers[form](own), image_size)


def _taming(own: dict) -> nn.Module:
    conv = {"conv": ConvSizes(**own.pop("conv"))} if "conv" in own else {}
    return TamingVQGAN(TamingVQGANConfig(**conv, **own))


def _google(own: dict) -> nn.Module:
    return GoogleVQGAN(GoogleVQGANConfig(**own))


def load(parent: Parent) -> Codec:
    """Open a trained tokenizer."""
    found = sizes(parent.config.model)
    if isinstance(found, Published):
        return codec(found, parent.params)
    return codec(found, {"model": parent.params, "codebook": parent.extra["codebook"]["codes"]})


def codec(config: TokenizerConfig | Published, params: Any) -> Codec:
    """Encode and decode functions of a tokenizer's sizes, around the given parameters."""
    make = _published if isinstance(config, Published) else _ours
    return Codec(config, params, *make(config))


def abstract(settings: Any) -> Any:
    """Shapes of the parameters that a codec of a config's `model` has, without training one."""
    found = sizes(settings)
    image = jax.ShapeDtypeStruct((1, found.image_size, found.image_size, 3), jnp.float32)
    if isinstance(found, Published):
        return jax.eval_shape(found.network.init, jax.random.key(0), image)
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

    return encode, decode


def _published(config: Published):
    def encode(p, images):
        return config.network.apply(p, images, method="encode").reshape(len(images), -1)

    def decode(p, ids):
        grid = ids.reshape(len(ids), config.side, config.side)
        return jnp.clip(config.network.apply(p, grid, method="decode"), 0.0, 1.0)

    return encode, decode
