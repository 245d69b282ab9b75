"""The families of published weights: which stage each becomes, its sizes, and where its names are mapped (convert/)."""

import dataclasses
import importlib
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from maskrl_jax.convert import diffusers_folder, dimoo, files, meissonic, meissonic_tokenizer, vq_model
from maskrl_jax.data.dataset import conditioning_of
from maskrl_jax.errors import UserError
from maskrl_jax.evaluate.bench import Evaluation
from maskrl_jax.sampling.maskgit import SamplerConfig
from maskrl_jax.tasks import codecs, continuous, forms, generators, kl_vae, shortcut_network

State = Mapping[str, np.ndarray]
PIXELS = (256, 512)  # of published generators of classes
MAR_WIDTHS = {768: "base", 1024: "large", 1280: "huge"}
MAR_SCALE = 0.2325  # latents of KL-16 times this have unit variance (specs/mar.md section 2)
GOOGLE_POSITIONS = "params/Embed_0/position_embeddings/embedding"
TUNED = ("speed_rl", "mask_grpo", "maskfocus")  # runs that hold a tuned network of their parent `maskgit`


@dataclasses.dataclass(frozen=True)
class Family:
    """Weights of one layout."""

    module: str  # of maskrl_jax.convert, with params_of and state_of
    task: str  # of the stage
    config: Callable[[Any], str]  # the stage's config file:argument at published sizes, told from the weights
    sizes: Callable[[ConfigDict], Any]  # static sizes of the network of such a stage
    runs: tuple[str, ...] = ()  # tasks of other runs that hold such a network, of the sizes of their parent `task`
    parents: tuple[str, ...] = ()  # stages below it
    extra: Callable[[ConfigDict], dict] = lambda config: {}  # what such a stage keeps beside its parameters
    check: Callable[[ConfigDict], None] = lambda config: None  # ValueError for a sampler that does not fit the grid
    open: Callable[[str, str], Any] = files.read  # (path, entry) -> the weights
    told: Callable[[str], dict] = lambda path: {}  # settings of the stage's model that a folder says of itself
    tokens: Callable[[str], dict] = lambda path: {}  # settings of the stage's data that a folder says of itself
    agree: Callable[[str, ConfigDict], None] = lambda path, config: None  # UserError where it contradicts what is below
    folder: str = ""  # what the folder holds, of weights that are no single file
    reads: str = "params_of"  # of the module
    writes: str = "state_of"

    def params(self, state: Any, config: ConfigDict) -> dict:
        """Parameters of the stage's network; ValueError names what is missing, left over or misshapen."""
        weights, read = config.model.get("weights", "float32"), getattr(self._module(), self.reads)
        if self.reads == "load":  # streamed in the type that is asked for, so that there is no second copy
            return read(state, self.sizes(config), weights)
        found = read(state, self.sizes(config))
        return found if weights == "float32" else jax.tree.map(lambda x: x.astype(weights), found)

    def state(self, params: Any, config: ConfigDict) -> dict[str, np.ndarray]:
        """The published state dict of a network; ValueError where it has parts that the layout lacks."""
        return getattr(self._module(), self.writes)(params, self.sizes(config))

    def _module(self):
        return importlib.import_module(f"maskrl_jax.convert.{self.module}")


def _at_pixels(form: str, tokens: int, patch: int = 16) -> str:
    """The config of a generator of so many tokens; UserError for a size that is not published."""
    pixels = patch * round(tokens**0.5)
    if pixels not in PIXELS:
        raise UserError(
            f"the weights are of {tokens} tokens, {pixels} pixels; published are {' and '.join(map(str, PIXELS))}: say in "
            "a --config of your own what these are"
        )
    return f"configs/maskgit.py:{form}{pixels}"


def _length(state: State, name: str, axis: int) -> int:
    if name not in state:
        raise ValueError(f"the state lacks {name}")
    if not -state[name].ndim <= axis < state[name].ndim:
        raise ValueError(f"{name} has shape {list(state[name].shape)}")
    return state[name].shape[axis]


def _mar_config(state: State) -> str:
    width = _length(state, "mask_token", -1)
    if width not in MAR_WIDTHS:
        raise UserError(f"no published MAR has width {width}; say in a --config of your own what it is")
    return f"configs/mar.py:{MAR_WIDTHS[width]}"


def _mar_sizes(config: ConfigDict) -> Any:
    conditioning = conditioning_of(config.data)
    return continuous.model_config(config, kl_vae.model_config(config.parents.tokenizer.model), conditioning)


def _mar_steps(config: ConfigDict) -> None:
    sampler, num_tokens = continuous.MarSampler(**config.sampler), _mar_sizes(config).num_tokens
    sampler.plan(num_tokens)
    continuous.check_steps(Evaluation(**config.evaluation), sampler, num_tokens)


def _kl_sizes(config: ConfigDict) -> Any:
    found = kl_vae.model_config(config.model)
    if found.form != "conv":
        raise UserError("weights of this family are of a VAE of model.form=conv, which this one is not")
    return found


def _latents(config: ConfigDict) -> dict:
    """Statistics of the latents: those of KL-16, which has one scale for all channels."""
    channels = kl_vae.model_config(config.model).channels
    square = np.full(channels, MAR_SCALE**-2, np.float32)
    return {"latents": {"mean": np.zeros(channels, np.float32), "square": square}}


def _codec(form: str) -> Callable[[ConfigDict], Any]:
    def sizes(config):
        found = codecs.sizes(config.model)
        if not isinstance(found, codecs.Published) or found.form != form:
            raise UserError(f"weights of this family are of a tokenizer of model.form={form}, which this one is not")
        if found.text:
            raise UserError("the config has a text encoder, which these weights have not; leave model.text out")
        return found.network.config

    return sizes


def _frozen_sizes(config: ConfigDict) -> Any:
    """Of Meissonic's tokenizer and text encoder."""
    found = codecs.sizes(config.model)
    if not isinstance(found, codecs.Published) or found.text is None:
        raise UserError(
            "weights of this family are of a tokenizer of form=amused with model.text, which this one is not"
        )
    return found.network.config, found.text


def _component(path: str) -> State:
    """The tensors of a tokenizer's folder; UserError for the folder of the whole model, which has it inside."""
    if (inside := pathlib.Path(path, meissonic_tokenizer.VQ)).is_dir():
        raise UserError(f"{path} is the folder of a whole model; give that of its tokenizer, {inside}")
    return diffusers_folder.read_state(path)


def _same_codes(path: str, config: ConfigDict) -> None:
    place = pathlib.Path(path, "transformer")
    told, found = diffusers_folder.read_settings(place), codecs.sizes(config.parents.tokenizer.model).codebook_size
    if told["codebook_size"] != found:
        raise UserError(
            f"{place}/config.json says codebook_size {told['codebook_size']}, and the tokenizer has {found} codes; give "
            "the tokenizer of this model, or correct the file"
        )


def _base(config: ConfigDict) -> forms.Sizes:
    return forms.model_config(config, config.parents.tokenizer, conditioning_of(config.data))


def _steps(config: ConfigDict) -> None:
    settings, num_tokens = Evaluation(**config.evaluation), _base(config).num_tokens
    asked = {"steps": settings.steps, "glance_steps": [settings.glance_steps]}
    generators.check_steps(SamplerConfig(**config.sampler), num_tokens, **asked)


def _generator(form: str) -> Callable[[ConfigDict], Any]:
    def sizes(config):
        if config.model.get("form", "ours") != form:
            raise UserError(f"weights of this family are of a generator of model.form={form}, which this one is not")
        found = _base(config)
        return found.network if form == "dimoo" else found

    return sizes


def _shortcut(form: str) -> Callable[[ConfigDict], Any]:
    def sizes(config):
        base = config.parents.maskgit
        if base.model.get("form", "ours") != form:
            raise UserError(
                f"weights of this family move features of a base of model.form={form}, which this one is not"
            )
        return shortcut_network.network_config(_base(base), config.model)

    return sizes


def _base_family(form: str, module: str, config: Callable[[Any], str], **more: Any) -> Family:
    """A base generator's family; runs that tune it hold such a network, too."""
    return Family(
        module=module,
        task="maskgit",
        config=config,
        sizes=_generator(form),
        runs=TUNED,
        check=_steps,
        parents=("tokenizer",),
        **more,
    )


FAMILIES = {
    "taming": Family(
        module="taming_vqgan",
        task="tokenizer",
        config=lambda state: "configs/tokenizer.py:taming256",
        sizes=_codec("taming"),
    ),
    "google-vqgan": Family(
        module="google_vqgan",
        task="tokenizer",
        config=lambda state: "configs/tokenizer.py:google256",
        sizes=_codec("google"),
    ),
    "maskgit-port": _base_family(
        "port",
        "maskgit_port",
        lambda state: _at_pixels("port", _length(state, "pos_emb", 1) - 1),
    ),
    "google-maskgit": _base_family(
        "google",
        "google_maskgit",
        lambda state: _at_pixels("google", _length(state, GOOGLE_POSITIONS, 0) - 1),
    ),
    "kl16": Family(
        module="kl_vae",
        task="kl_vae",
        config=lambda state: "configs/kl_vae.py:kl16",
        sizes=_kl_sizes,
        extra=_latents,
    ),
    "mar": Family(
        module="mar",
        task="mar",
        config=_mar_config,
        sizes=_mar_sizes,
        check=_mar_steps,
        runs=("marval", "marval_rl"),
        parents=("tokenizer",),
    ),
    "shortcut": Family(
        module="shortcut",
        task="shortcut",
        config=lambda state: "configs/shortcut.py:maskgit512",
        sizes=_shortcut("port"),
        parents=("tokenizer", "maskgit"),
    ),
    "amused": Family(
        module="vq_model",
        task="tokenizer",
        config=lambda state: "configs/tokenizer.py:amused1024",
        sizes=_codec("amused"),
        open=lambda path, entry: _component(path),
        folder="config.json and diffusion_pytorch_model.safetensors",
        told=vq_model.settings_of,
    ),
    "meissonic-tokenizer": Family(
        module="meissonic_tokenizer",
        task="tokenizer",
        config=lambda state: "configs/tokenizer.py:meissonic",
        sizes=_frozen_sizes,
        open=lambda path, entry: meissonic_tokenizer.read_state(path),
        folder="vqvae and text_encoder",
        told=meissonic_tokenizer.settings_of,
    ),
    "meissonic": _base_family(
        "meissonic",
        "meissonic",
        lambda state: "configs/maskgit.py:meissonic",
        open=lambda path, entry: diffusers_folder.read_state(pathlib.Path(path, "transformer")),
        told=meissonic.settings_of,
        tokens=meissonic.tokens_of,
        agree=_same_codes,
        folder="transformer",
    ),
    "dimoo": _base_family(
        "dimoo",
        "dimoo",
        lambda state: "configs/maskgit.py:dimoo",
        open=lambda path, entry: path,  # streamed, a tensor at a time
        folder="config.json and the shards",
        told=dimoo.settings_of,
        tokens=lambda path: {"tokenizer": path},
        reads="load",
    ),
    "dimoo-shortcut": Family(
        module="shortcut",
        task="shortcut",
        config=lambda state: "configs/shortcut.py:dimoo",
        sizes=_shortcut("dimoo"),
        parents=("tokenizer", "maskgit"),
        reads="dimoo_params_of",
        writes="dimoo_state_of",
    ),
}
