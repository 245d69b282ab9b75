"""Networks of every form as one kind of generator: functions of parameters, tokens, timestep and condition.

`model.form` of a base's config names one: `ours`, where a config names none; for classes `port` and `google`, forms A
and B of specs/maskgit.md; for texts `meissonic` and `dimoo`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from maskrl_jax.data.dataset import Conditioning
from maskrl_jax.errors import UserError, unknown
from maskrl_jax.models.dimoo import Dimoo, DimooConfig
from maskrl_jax.models.google_maskgit import GoogleMaskGIT, GoogleMaskGITConfig
from maskrl_jax.models.maskgit import MaskGIT, MaskGITConfig
from maskrl_jax.models.maskgit_port import MaskGITPort, PortConfig
from maskrl_jax.models.meissonic import MICRO_CONDITIONS, Meissonic, MeissonicConfig, Prompt
from maskrl_jax.sampling import dimoo as dimoo_sampling
from maskrl_jax.sampling import dimoo_sequence
from maskrl_jax.sampling.dimoo_sequence import Layout
from maskrl_jax.tasks import codecs

Array = jax.Array
CLASSES = {"port": PortConfig, "google": GoogleMaskGITConfig}
FORMS = ("ours", *CLASSES, "meissonic", "dimoo")


@dataclasses.dataclass(frozen=True)
class DimooSizes:
    """Lumina-DiMOO on a square grid; its codes are 0..K-1 and MASK the code K, its conditions token ids, -1 padding."""

    network: DimooConfig
    layout: Layout

    def __post_init__(self):
        if self.network.code_offset != self.layout.code_offset:
            raise ValueError(
                f"code 0 has the id {self.layout.code_offset} in the layout and {self.network.code_offset} in the network"
            )

    @property
    def num_tokens(self) -> int:
        return self.layout.num_tokens

    @property
    def codebook_size(self) -> int:
        return self.layout.codebook_size

    @property
    def mask_id(self) -> int:
        return self.layout.codebook_size

    @property
    def width(self) -> int:
        return self.network.width


Sizes = MaskGITConfig | PortConfig | GoogleMaskGITConfig | MeissonicConfig | DimooSizes


@dataclasses.dataclass(frozen=True)
class Generator:
    """A base model as functions of its parameters. Axes: T >= N positions of a feature, image tokens first.

    `row_features` and `row_head` are the same network for losses that score positions by themselves: features
    [B,N,D'] of the image tokens alone, and a head that takes any of their rows.
    """

    init: Callable[[Array], Any]  # key -> params
    logits: Callable[[Any], Callable]  # params -> logits_fn(ids, timestep, cond) [B,N,K] float32
    features: Callable[[Any], Callable]  # params -> feature_fn(ids, timestep, cond) [B,T,D]
    head: Callable[[Any], Callable]  # params -> head_fn(features [B,T,D]) -> logits [B,N,K]
    row_features: Callable[[Any], Callable]  # params -> feature_fn(ids, timestep, cond) [B,N,D']
    row_head: Callable[[Any], Callable]  # params -> head_fn(rows [...,D']) -> logits [...,K]
    controls: Callable[[Any], Callable] | None  # params -> fn(ids [b,n], positions [b,n]) -> [b,n,D], for a shortcut


def model_config(config: Any, tokenizer: Any, conditioning: Conditioning) -> Sizes:
    """Sizes that follow from the tokenizer and the data, and those that the config names."""
    found = codecs.sizes(tokenizer.model)
    own, form = dict(config.model), config.model.get("form", "ours")
    for key in ("form", "weights"):
        own.pop(key, None)
    if form not in FORMS:
        raise unknown("model.form", form, FORMS)
    wanted = "class" if form in CLASSES else "caption"
    if form != "ours" and conditioning.kind != wanted:
        has = {"class": "classes", "caption": "captions"}
        raise UserError(
            f"model.form={form} is conditioned on {has[wanted]}, and {config.data.name} has {has[conditioning.kind]}"
        )
    grid = {"num_tokens": found.num_tokens, "codebook_size": found.codebook_size}
    if form == "ours":
        return MaskGITConfig(**grid, cond_vocab=conditioning.vocab_size, cond_length=max(conditioning.length, 1), **own)
    if form in CLASSES:
        if form == "google":
            _refuse_guidance(config)
        return CLASSES[form](**grid, num_classes=conditioning.vocab_size - 1, **own)
    if form == "meissonic":
        return _meissonic_sizes(own, found, conditioning)
    if conditioning.null[-1] != dimoo_sequence.UNCONDITIONAL[-1]:
        raise UserError("model.form=dimoo reads prompts in a template of its own; set data.tokens=dimoo")
    layout = Layout(found.side, found.side, codebook_size=found.codebook_size, **own.pop("layout", {}))
    return DimooSizes(DimooConfig(codebook_size=found.codebook_size, **own), layout)


def _refuse_guidance(config: Any) -> None:
    tuned = dict(config.evaluation).get("tune_guidance", (1.0,))
    if config.sampler.guidance != 1 or config.cond_drop or any(x != 1 for x in tuned):
        raise UserError(
            "model.form=google knows no null class; set sampler.guidance=1, evaluation.tune_guidance=(1.0,), cond_drop=0"
        )


def _meissonic_sizes(own: dict, tokenizer: Any, conditioning: Conditioning) -> MeissonicConfig:
    text = getattr(tokenizer, "text", None)
    if text is None:
        raise UserError("model.form=meissonic needs a tokenizer of form=amused with a text encoder; see model.text")
    if (conditioning.vocab_size, conditioning.length) != (text.vocabulary, text.length):
        raise UserError(
            f"the text encoder reads {text.length} of {text.vocabulary} ids, the data gives {conditioning.length} of "
            f"{conditioning.vocab_size}; set data.tokens=clip and data.text_length={text.length}"
        )
    side = tokenizer.side
    sizes = MeissonicConfig(grid=(side, side), codebook_size=tokenizer.codebook_size, **own)
    if (text.width, text.projection) != (sizes.text_width, sizes.width):
        raise ValueError(
            f"the text encoder gives states of {text.width} and a vector of {text.projection}; the network takes "
            f"{sizes.text_width} and {sizes.width}"
        )
    return sizes


def knows_null(config: Sizes) -> bool:
    """Whether a network was trained without its condition too, so that it can be guided."""
    return not isinstance(config, GoogleMaskGITConfig)


def generator(config: Sizes) -> Generator:
    """Wrap a network of these sizes."""
    if isinstance(config, DimooSizes):
        return _dimoo(config)
    if isinstance(config, MeissonicConfig):
        return _meissonic(config)
    return _maskgit(config)


def _maskgit(config: MaskGITConfig | PortConfig | GoogleMaskGITConfig) -> Generator:
    kinds = {MaskGITConfig: MaskGIT, PortConfig: MaskGITPort, GoogleMaskGITConfig: GoogleMaskGIT}
    model, count = kinds[type(config)](config), config.num_tokens

    def features(p):
        return lambda ids, timestep, cond: model.apply(p, ids, cond, method="features")

    def head(p):
        return lambda features: model.apply(p, features, method="logits")

    def rows(p):
        return lambda *args: features(p)(*args)[:, :count]

    row_head = head
    if isinstance(config, PortConfig):  # whose head has biases of its own at every place: a row brings its place along

        def rows(p):
            def placed(*args):
                found = features(p)(*args)[:, :count]
                place = jnp.arange(count, dtype=found.dtype)[None, :, None]
                return jnp.concatenate([found, jnp.broadcast_to(place, (len(found), count, 1))], axis=-1)

            return placed

        def row_head(p):
            return lambda x: model.apply(p, x[..., :-1], x[..., -1].astype(jnp.int32), method="logits_at")

    elif isinstance(config, GoogleMaskGITConfig):

        def row_head(p):
            return lambda x: model.apply(p, x, method="row_logits")

    empty, cond = jnp.zeros((1, count), jnp.int32), jnp.zeros((1, config.cond_length), jnp.int32)
    return Generator(
        init=lambda key: model.init(key, empty, cond),
        logits=lambda p: lambda ids, timestep, cond: model.apply(p, ids, cond),
        features=features,
        head=head,
        row_features=rows,
        row_head=row_head,
        controls=lambda p: lambda ids, positions: model.apply(p, ids, positions, method="controls"),
    )


def _meissonic(config: MeissonicConfig) -> Generator:
    model = Meissonic(config)

    def init(key):
        cond = Prompt(
            jnp.zeros((1, 1, config.text_width)), jnp.zeros((1, config.width)), jnp.zeros((1, MICRO_CONDITIONS))
        )
        return model.init(key, jnp.zeros((1, config.num_tokens), jnp.int32), jnp.zeros(1), cond)

    def features(p):
        return lambda ids, timestep, cond: model.apply(p, ids, timestep, cond, method="features")

    def head(p):
        return lambda features: model.apply(p, features, method="logits")

    logits = lambda p: lambda *args: model.apply(p, *args)  # noqa: E731
    return Generator(init, logits, features, head, features, head, controls=None)


def _dimoo(config: DimooSizes) -> Generator:
    """Text to image alone. Controls are `sampling.dimoo.advanced`'s own."""
    model, count = Dimoo(config.network), config.num_tokens

    def bound(p):
        return lambda *args, **options: model.apply(p, *args, **options)

    def parts(p):
        return dimoo_sampling.parts(bound(p), config.layout, None, None)

    def features(p):
        return lambda ids, timestep, cond: parts(p).features(ids, timestep, dimoo_prompt(cond))

    return Generator(
        init=lambda key: model.init(key, jnp.zeros((1, 1), jnp.int32)),
        logits=lambda p: lambda *args: parts(p).head(features(p)(*args)),
        features=features,
        head=lambda p: parts(p).head,
        row_features=lambda p: lambda *args: features(p)(*args)[:, :count],
        row_head=lambda p: lambda x: bound(p)(x, method="logits"),
        controls=None,
    )


def dimoo_prompt(cond: Array) -> dimoo_sequence.Prompt:
    """A condition of token ids int32 [...,P], -1 where there is padding, as the sampler knows it."""
    return dimoo_sequence.Prompt(jnp.maximum(cond, 0), cond >= 0)
