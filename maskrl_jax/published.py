"""Published weights as stages, and networks of runs in their published layouts (convert/ maps the names)."""

import os
import runpy
from collections.abc import Mapping
from typing import Any

import jax
from ml_collections import ConfigDict

from maskrl_jax import clip_stage, paths, runner, stored, verify
from maskrl_jax.convert import files, meissonic
from maskrl_jax.errors import UserError, unknown
from maskrl_jax.families import FAMILIES, Family

REWARDS = "clip-rewards"  # no family of one network, but a folder of several


def read(
    name: str,
    path: str,
    out: str,
    *,
    config: str = "",
    below: Mapping[str, str],
    store: str,
    entry: str = "",
    compare: bool = False,
) -> None:
    """Make a stage in `out` of the weights in a file or folder of a family.

    Args:
      config: file[:argument] of the stage's config; by default that of the published sizes.
      below: workdirs of the stages that the weights stand on, by name; the judge, by which a generator is measured, may
        be left out.
      store: where data sets and measurements go.
      entry: see `convert.files.read`.
      compare: whether outputs are compared with those of the reference before anything is kept; see `verify`.

    Raises UserError for what is missing, left over, misshapen or in the way.
    """
    _free(out)
    family = None if name == REWARDS else _family(name)
    if compare:
        verify.require(name)
    if family is None:
        if below or entry:
            raise UserError(f"weights of {name!r} stand on no other stage and are safetensors; give their folder alone")
        return clip_stage.read(path, _config(config or "configs/judge.py:clip", "judge"), out, store, compare)
    for parent in family.parents:
        if parent not in below:
            flag = "base" if parent == "maskgit" else parent
            raise UserError(f"weights of {name!r} need a {parent}: convert it first, give --{flag}=<its folder>")
    if needless := sorted(below.keys() - {*family.parents, "judge"}):
        raise UserError(f"weights of {name!r} stand on no {needless[0]}; leave that out")
    if family.folder and not os.path.isdir(path):
        raise UserError(f"{path} is no folder; weights of {name!r} are one, give the folder that holds {family.folder}")
    state = family.open(path, entry)
    try:
        made = _made(family, path, config, state, below)
        params = family.params(state, made)
        family.check(made)
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        reason = error.args[0] if error.args else type(error).__name__
        raise UserError(
            f"{path} does not fit family {name!r} at the sizes of {config or 'the published config'} and of what is below "
            f"it: {reason}{'; with --config its config.json is not read' if config and family.folder else ''}"
        ) from error
    if compare:
        verify.tokenizer(name, path, state, params, family.sizes(made))
    runner.keep(made, out, store, dict(below), params, family.extra(made))
    print(f"{out}: a {made.task!r} stage of {sum(x.size for x in jax.tree.leaves(params)):,} parameters")


def write(name: str, workdir: str, out: str, like: str = "") -> None:
    """Write the network of a run in a family's layout; UserError where it has no such network.

    Args:
      out: a safetensors file; with `like`, a folder that is made.
      like: published folder of a Meissonic, which is copied with this network in the place of its own.
    """
    if name == REWARDS:
        raise UserError(f"weights of {name!r} are never changed here; there is nothing to write back")
    family = _family(name)
    _free(out)
    context, params = runner.open_workdir(workdir)
    task = context.config.task
    if task not in (family.task, *family.runs):
        known = ", ".join((family.task, *family.runs))
        raise UserError(f"{workdir} holds a {task!r} stage, which has no network of {name!r}; that have: {known}")
    config = context.config if task == family.task else context.config.parents[family.task]
    if task in ("speed_rl", "mask_grpo"):  # which have a head beside it
        params = params["model"]
    if like and name != "meissonic":
        raise UserError(f"--like is for the folder of a meissonic; weights of {name!r} are one file")
    try:
        if like:
            meissonic.write(like, out, params)
        else:
            files.write(out, family.state(params, config))
    except ValueError as error:
        raise UserError(f"the network of {workdir} does not fit the layout of {name!r}: {error}") from error
    print(f"{out}: the network of {workdir} in the layout of {name!r}")


def _free(out: str) -> None:
    if paths.is_remote(out):
        raise UserError(f"--out={out} must be on a local disk; copy what is made there to the bucket")
    if os.path.exists(out):
        raise UserError(f"{out} exists already; name another --out")


def _family(name: str) -> Family:
    if name not in FAMILIES:
        raise unknown("family", name, (*FAMILIES, REWARDS))
    return FAMILIES[name]


def _stage(task: str, workdir: str) -> ConfigDict:
    config = stored.read_config(workdir)
    if config is None or config.task != task or not stored.is_finished(workdir):
        raise UserError(f"{workdir} holds no finished {task!r} stage; convert it, or train it to its end")
    return config


def _made(family: Family, path: str, config: str, state: Any, below: Mapping[str, str]) -> ConfigDict:
    """The config of the stage that weights become; without a config of the user's, with what their folder says."""
    made, texts = _config(config or family.config(state), family.task), family.tokens(path)
    if not config:
        made.model.update(family.told(path))
        made.data.update(texts)
    elif "pad" in texts and made.data.get("pad") != texts["pad"]:
        raise UserError(f"{path}: its tokenizer pads with {texts['pad']}; set data.pad of {config} to that")
    for parent, workdir in below.items():
        if parent not in made.parents:
            raise UserError(f"a {made.task!r} stage stands on no {parent}; leave that out")
        made.parents[parent] = _stage(made.parents[parent].task, workdir)
        made.init[parent] = workdir
    if not config:
        family.agree(path, made)
    return made


def _config(file: str, task: str) -> ConfigDict:
    """The config of a file, as `main --config` takes it, of a stage of this task."""
    path, _, argument = file.partition(":")
    try:
        config = runpy.run_path(path)["get_config"](argument)
        found = config.task
    except (OSError, ImportError, KeyError, SyntaxError) as error:
        raise UserError(
            f"{path} is no config ({type(error).__name__}: {error}); run this in the folder that holds configs/"
        ) from error
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{file} gives no config: {' '.join(str(error).split())}") from error
    if found != task:
        raise UserError(f"these weights become a {task!r} stage, not {found!r}; give another --config")
    return config
