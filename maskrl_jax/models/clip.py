"""CLIP (arXiv 2103.00020): a picture tower and a text tower whose projections share a space.

Sizes and the order of operations are those of the published checkpoints of OpenAI and LAION. Pre-norm blocks on a
float32 residual stream; the text is causal, so that what follows the first end token does not change its pooled vector.
Axes: B batch, L text tokens, S tokens of a tower, D width, P projection.
"""

import dataclasses
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from maskrl_jax.models.layers import layer_norm, stack

Array = jax.Array
ACTIVATIONS = {"gelu": lambda x: nn.gelu(x, approximate=False), "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x)}
EPSILON = 1e-5  # of every norm
VOCABULARY = 49408  # of CLIP's byte-pair encoding, whose last two ids are start and end of a text


@dataclasses.dataclass(frozen=True, kw_only=True)
class TowerConfig:
    """What both towers have."""

    width: int  # D
    depth: int
    heads: int
    mlp_width: int
    projection: int  # P
    activation: str  # of `ACTIVATIONS`: OpenAI's weights are of quick_gelu, LAION's mostly of gelu
    remat: bool = False
    dtype: str = "float32"  # of the blocks; norms, softmax, the residual stream and the projection are float32

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is int and value < 1:
                raise ValueError(f"{field.name} {value} must be at least 1")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not divisible by heads {self.heads}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation {self.activation!r} is not one of {', '.join(ACTIVATIONS)}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextConfig(TowerConfig):
    """The text tower; `end` is the id at which a text is pooled."""

    vocabulary: int = VOCABULARY
    length: int = 77  # places, the most tokens of a text
    end: int = VOCABULARY - 1

    def __post_init__(self):
        super().__post_init__()
        if self.end >= self.vocabulary:
            raise ValueError(f"end {self.end} is not among the {self.vocabulary} ids")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PictureConfig(TowerConfig):
    """The picture tower, of square pictures in square patches."""

    image_size: int = 224
    patch: int

    def __post_init__(self):
        super().__post_init__()
        if self.image_size % self.patch:
            raise ValueError(f"image_size {self.image_size} is not divisible by patch {self.patch}")


@dataclasses.dataclass(frozen=True)
class ClipConfig:
    """Both towers."""

    text: TextConfig
    picture: PictureConfig

    def __post_init__(self):
        if self.text.projection != self.picture.projection:
            raise ValueError(f"projections {self.text.projection} and {self.picture.projection} differ")


def _published(projection: int, activation: str, text: tuple, picture: tuple, patch: int) -> ClipConfig:
    def sizes(width, depth, heads):
        own = {"width": width, "depth": depth, "heads": heads, "mlp_width": 4 * width}
        return own | {"projection": projection, "activation": activation}

    return ClipConfig(TextConfig(**sizes(*text)), PictureConfig(**sizes(*picture), patch=patch))


# Width, depth and heads of text and picture, as published.
OPENAI_B32 = _published(512, "quick_gelu", (512, 12, 8), (768, 12, 12), patch=32)
OPENAI_L14 = _published(768, "quick_gelu", (768, 12, 12), (1024, 24, 16), patch=14)
LAION_H14 = _published(1024, "gelu", (1024, 24, 16), (1280, 32, 16), patch=14)
PUBLISHED = {"b32": OPENAI_B32, "l14": OPENAI_L14, "h14": LAION_H14}


class TextStates(NamedTuple):
    """What the text tower knows of a text, float32."""

    penultimate: Array  # [B,L,D] after all blocks but the last, without a norm: what a generator attends to
    pooled: Array  # [B,P] normed last state at the first end token, projected, not normalised


class Clip(nn.Module):
    """Both towers and the scale of their cosine, stored as its logarithm."""

    config: ClipConfig

    def setup(self):
        self.text, self.picture = TextTower(self.config.text), PictureTower(self.config.picture)
        self.logit_scale = self.param("logit_scale", nn.initializers.constant(2.6592), ())

    def __call__(self, images: Array, ids: Array) -> Array:
        """Logits exp(scale) cos, float32 [B,B]: a row a picture, a column a text."""
        pictures_BP, texts_BP = unit(self.picture(images)), unit(self.text(ids).pooled)
        return jnp.exp(self.logit_scale) * pictures_BP @ texts_BP.T

    def picture_features(self, images: Array) -> Array:
        """Project normalised pictures [B,H,W,3] (`clip_pixels.prepare`) to float32 [B,P], not of unit length."""
        return self.picture(images)

    def text_features(self, ids: Array) -> Array:
        """Project token ids int32 [B,L] to float32 [B,P], not of unit length."""
        return self.text(ids).pooled


def unit(features: Array) -> Array:
    """Features [...,P] of length 1, float32."""
    return features / jnp.linalg.norm(features, axis=-1, keepdims=True)


class TextTower(nn.Module):
    """The text tower with its projection; alone it is the text encoder of a generator (specs/meissonic.md section 4)."""

    config: TextConfig

    @nn.compact
    def __call__(self, ids: Array) -> TextStates:
        """Read token ids int32 [B,L], L at most `length` (ValueError), padded behind the end token.

        Padding is attended by what follows it alone. An id that does not exist gives NaN, as does a text without
        an end token in `pooled`.
        """
        c = self.config
        length = ids.shape[1]
        if length > c.length:
            raise ValueError(f"{length} tokens exceed the {c.length} places of the text tower")
        init = nn.initializers.normal(0.02)
        known = jnp.where(ids < 0, c.vocabulary, ids)  # of what is too large the table makes NaN
        x_BLD = nn.Embed(c.vocabulary, c.width, embedding_init=init, name="tokens")(known)
        places_LD = self.param("places", nn.initializers.normal(0.01), (c.length, c.width))
        last_BLD, penultimate_BLD = Stack(c, causal=True, name="stack")(x_BLD + places_LD[None, :length])
        ends_BL = ids == c.end
        end_BD = jnp.take_along_axis(last_BLD, ends_BL.argmax(1)[:, None, None], axis=1)[:, 0]
        end_BD = jnp.where(ends_BL.any(1, keepdims=True), end_BD, jnp.nan)
        pooled_BP = nn.Dense(c.projection, use_bias=False, name="projection")(layer_norm("norm_out", EPSILON)(end_BD))
        return TextStates(penultimate_BLD, pooled_BP)


class PictureTower(nn.Module):
    """The picture tower with its projection."""

    config: PictureConfig

    @nn.compact
    def __call__(self, images: Array) -> Array:
        """Read normalised pictures [B,H,W,3] of `image_size` (ValueError): float32 [B,P]."""
        c = self.config
        if images.shape[1:] != (c.image_size, c.image_size, 3):
            raise ValueError(f"pictures of {images.shape[1:]}, not {(c.image_size, c.image_size, 3)}; prepare them")
        batch, side = len(images), c.image_size // c.patch
        patches = images.reshape(batch, side, c.patch, side, c.patch, 3).swapaxes(2, 3).reshape(batch, side**2, -1)
        cells_BND = nn.Dense(c.width, use_bias=False, name="patches")(patches)
        whole_D = self.param("whole", nn.initializers.normal(0.02), (c.width,))
        places_SD = self.param("places", nn.initializers.normal(0.02), (side**2 + 1, c.width))
        whole_B1D = jnp.broadcast_to(whole_D[None, None], (batch, 1, c.width))
        x_BSD = jnp.concatenate([whole_B1D, cells_BND], axis=1) + places_SD[None]
        last_BSD, _ = Stack(c, causal=False, name="stack")(layer_norm("norm_in", EPSILON)(x_BSD))
        pooled_BD = layer_norm("norm_out", EPSILON)(last_BSD[:, 0])
        return nn.Dense(c.projection, use_bias=False, name="projection")(pooled_BD)


class Stack(nn.Module):
    """Blocks in a loop, their parameters stacked: (last, last but one) states [B,S,D] float32."""

    config: TowerConfig
    causal: bool

    @nn.compact
    def __call__(self, x_BSD: Array) -> tuple[Array, Array]:
        c = self.config
        return stack(Block, c.depth, remat=c.remat)(c, self.causal, name="blocks")((x_BSD, x_BSD), None)[0]


class Block(nn.Module):
    """Pre-norm attention and MLP; a step of `nn.scan` that carries its own input along."""

    config: TowerConfig
    causal: bool

    @nn.compact
    def __call__(self, states: tuple[Array, Array], _: None) -> tuple[tuple[Array, Array], None]:
        c, dtype = self.config, jnp.dtype(self.config.dtype)
        before_BSD, _ = states
        batch, length, width = before_BSD.shape

        def dense(features, name):
            return nn.Dense(features, dtype=dtype, name=name)

        qkv = dense(3 * width, "qkv")(layer_norm("norm_attention", EPSILON)(before_BSD))
        query, key, value = jnp.split(qkv.reshape(batch, length, 3 * c.heads, width // c.heads), 3, axis=2)
        mixed = jax.nn.dot_product_attention(query, key, value, is_causal=self.causal)
        x_BSD = before_BSD + dense(width, "out")(mixed.reshape(batch, length, width))
        hidden = dense(c.mlp_width, "mlp_in")(layer_norm("norm_mlp", EPSILON)(x_BSD))
        return (x_BSD + dense(width, "mlp_out")(ACTIVATIONS[c.activation](hidden)), before_BSD), None


class AestheticHead(nn.Module):
    """LAION's predictor of how much a picture is liked, about 1..10, from its unit features; linear throughout.

    The reference drops out in training and has no activation between its layers.
    """

    widths: tuple[int, ...] = (1024, 128, 64, 16, 1)

    @nn.compact
    def __call__(self, features: Array) -> Array:
        """Unit features [B,P] -> float32 [B]."""
        for index, width in enumerate(self.widths):
            features = nn.Dense(width, name=f"layers_{index}")(features)
        return features[:, 0]
