"""Published weights as stages, and networks of runs in their published layouts (convert/ maps the names)."""

import dataclasses
import importlib
import os
import runpy
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from maskrl_jax import runner, stored
from maskrl_jax.convert import files
from maskrl_jax.data.dataset import conditioning_of
from maskrl_jax.errors import UserError, unknown
from maskrl_jax.evaluate.bench import Evaluation
from maskrl_jax.models.shortcut import ShortcutConfig
from maskrl_jax.sampling.maskgit import SamplerConfig
from maskrl_jax.tasks import codecs, continuous, generators, kl_vae

State = Mapping[str, np.ndarray]
MAR_WIDTHS = {768: "base", 1024: "large", 1280: "huge"}
MAR_SCALE = 0.2325  # latents of KL-16 times this have unit variance (specs/mar.md section 2)


@dataclasses.dataclass(frozen=True)
class Family:
    """Weights of one layout."""

    module: str  # of maskrl_jax.convert, with params_of and state_of
    task: str  # of the stage
    config: Callable[[State], str]  # the stage's config file:argument at published sizes, told from the weights
    sizes: Callable[[ConfigDict], Any]  # static sizes of the network of such a stage
    runs: tuple[str, ...] = ()  # tasks of other runs that hold such a network, of the sizes of their parent `task`
    parents: tuple[str, ...] = ()  # stages below it
    extra: Callable[[ConfigDict], dict] = lambda config: {}  # what such a stage keeps beside its parameters
    check: Callable[[ConfigDict, Any], None] = lambda config, sizes: None  # ValueError for a sampler that does not fit

    def params(self, state: State, config: ConfigDict) -> dict:
        """Parameters of the stage's network; ValueError names what is missing, left over or misshapen."""
        return self._module().params_of(state, self.sizes(config))

    def state(self, params: Any, config: ConfigDict) -> dict[str, np.ndarray]:
        """The published state dict of a network; ValueError where it has parts that the layout lacks."""
        return self._module().state_of(params, self.sizes(config))

    def _module(self):
        return importlib.import_module(f"maskrl_jax.convert.{self.module}")


def _pixels(tokens: int, patch: int = 16) -> int:
    return patch * round(tokens**0.5)


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
    conditioning = conditioning_of(config.data.name, config.data.text_length)
    return continuous.model_config(config, kl_vae.model_config(config.parents.tokenizer.model), conditioning)


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


def _mar_steps(config: ConfigDict, sizes: Any) -> None:
    sampler = continuous.MarSampler(**config.sampler)
    sampler.plan(sizes.num_tokens)
    continuous.check_steps(Evaluation(**config.evaluation), sampler, sizes.num_tokens)


def _steps(config: ConfigDict, sizes: Any) -> None:
    settings = Evaluation(**config.evaluation)
    generators.check_steps(SamplerConfig(**config.sampler), (settings.glance_steps, *settings.steps), sizes.num_tokens)


def _codec(form: str) -> Callable[[ConfigDict], Any]:
    def sizes(config):
        found = codecs.sizes(config.model)
        if not isinstance(found, codecs.Published) or found.form != form:
            raise UserError(f"weights of this family are of a tokenizer of model.form={form}, which this one is not")
        return found.network.config

    return sizes


def _generator(form: str) -> Callable[[ConfigDict], Any]:
    def sizes(config):
        conditioning = conditioning_of(config.data.name, config.data.text_length)
        found = generators.model_config(config, config.parents.tokenizer, conditioning)
        if not isinstance(found, generators.PUBLISHED[form]):
            raise UserError(f"weights of this family are of a generator of model.form={form}, which this one is not")
        return found

    return sizes


def _shortcut_sizes(config: ConfigDict) -> ShortcutConfig:
    base = config.parents.maskgit
    conditioning = conditioning_of(base.data.name, base.data.text_length)
    sizes = generators.model_config(base, base.parents.tokenizer, conditioning)
    return ShortcutConfig(num_tokens=sizes.num_tokens, width=sizes.width, **config.model)


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
    "maskgit-port": Family(
        module="maskgit_port",
        task="maskgit",
        config=lambda state: f"configs/maskgit.py:port{_pixels(_length(state, 'pos_emb', 1) - 1)}",
        sizes=_generator("port"),
        check=_steps,
        parents=("tokenizer",),
    ),
    "google-maskgit": Family(
        module="google_maskgit",
        task="maskgit",
        config=lambda state: (
            f"configs/maskgit.py:google{_pixels(_length(state, 'params/Embed_0/position_embeddings/embedding', 0) - 1)}"
        ),
        sizes=_generator("google"),
        check=_steps,
        parents=("tokenizer",),
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
        sizes=_shortcut_sizes,
        parents=("tokenizer", "maskgit"),
    ),
}


def read(
    name: str, path: str, out: str, *, config: str = "", below: Mapping[str, str], store: str, entry: str = ""
) -> None:
    """Make a stage in `out` of the weights in a file or folder of a family.

    Args:
      config: file[:argument] of the stage's config; by default that of the published sizes.
      below: workdirs of the stages that the weights stand on, by name; the judge, by which a generator is measured, may
        be left out.
      store: where data sets and measurements go.
      entry: see `convert.files.read`.

    Raises UserError for what is missing, left over, misshapen or in the way.
    """
    family = _family(name)
    if os.path.exists(out):
        raise UserError(f"{out} exists already; name another --out")
    for parent in family.parents:
        if parent not in below:
            flag = "base" if parent == "maskgit" else parent
            raise UserError(f"weights of {name!r} need a {parent}: convert it first, give --{flag}=<its folder>")
    if needless := sorted(below.keys() - {*family.parents, "judge"}):
        raise UserError(f"weights of {name!r} stand on no {needless[0]}; leave that out")
    state = files.read(path, entry)
    try:
        made = _config(config or family.config(state), family.task)
        for parent, workdir in below.items():
            if parent not in made.parents:
                raise UserError(f"a {made.task!r} stage stands on no {parent}; leave that out")
            made.parents[parent] = _stage(made.parents[parent].task, workdir)
            made.init[parent] = workdir
        params = family.params(state, made)
        family.check(made, family.sizes(made))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        reason = error.args[0] if error.args else type(error).__name__
        raise UserError(
            f"{path} does not fit family {name!r} at the sizes of {config or 'the published config'} and of what is below "
            f"it: {reason}"
        ) from error
    runner.keep(made, out, store, dict(below), params, family.extra(made))
    print(f"{out}: a {made.task!r} stage of {sum(x.size for x in jax.tree.leaves(params)):,} parameters")


def write(name: str, workdir: str, out: str) -> None:
    """Write the network of a run in a family's layout, as safetensors; UserError where it has no such network."""
    family = _family(name)
    if os.path.exists(out):
        raise UserError(f"{out} exists already; name another --out")
    context, params = runner.open_workdir(workdir)
    task = context.config.task
    if task not in (family.task, *family.runs):
        known = ", ".join((family.task, *family.runs))
        raise UserError(f"{workdir} holds a {task!r} stage, which has no network of {name!r}; that have: {known}")
    config = context.config if task == family.task else context.config.parents[family.task]
    try:
        state = family.state(params, config)
    except ValueError as error:
        raise UserError(f"the network of {workdir} does not fit the layout of {name!r}: {error}") from error
    files.write(out, state)
    print(f"{out}: the network of {workdir} in the layout of {name!r}")


def _family(name: str) -> Family:
    if name not in FAMILIES:
        raise unknown("family", name, FAMILIES)
    return FAMILIES[name]


def _stage(task: str, workdir: str) -> ConfigDict:
    config = stored.read_config(workdir)
    if config is None or config.task != task or not stored.is_finished(workdir):
        raise UserError(f"{workdir} holds no finished {task!r} stage; convert it, or train it to its end")
    return config


def _config(file: str, task: str) -> ConfigDict:
    """The config of a file, as `main --config` takes it, of a stage of this task."""
    path, _, argument = file.partition(":")
    try:
        config = runpy.run_path(path)["get_config"](argument)
    except (OSError, ImportError, KeyError, SyntaxError) as error:
        raise UserError(
            f"{path} is no config ({type(error).__name__}: {error}); run this in the folder that holds configs/"
        ) from error
    if config.task != task:
        raise UserError(f"these weights become a {task!r} stage, not {config.task!r}; give another --config")
    return config
