"""Stages and their parents: trains what a config needs, once, and keeps it where later runs find it."""

import contextlib
import dataclasses
import importlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from maskrl_jax import checkpoint, dry_run, loop, paths, stored
from maskrl_jax.errors import UserError, unknown
from maskrl_jax.evaluate import measured
from maskrl_jax.parallel import Parallel
from maskrl_jax.phase import Phase
from maskrl_jax.state import OptimizerConfig, optimizer_of
from maskrl_jax.target import local_target
from maskrl_jax.tasks.task import Context, Parent

TASKS = {
    "tokenizer": "maskrl_jax.tasks.tokenizer",
    "kl_vae": "maskrl_jax.tasks.kl_vae",
    "judge": "maskrl_jax.tasks.judge",
    "maskgit": "maskrl_jax.tasks.maskgit",
    "mar": "maskrl_jax.tasks.mar",
    "marval": "maskrl_jax.tasks.marval",
    "marval_rl": "maskrl_jax.tasks.marval_rl",
    "speed_rl": "maskrl_jax.tasks.speed_rl",
    "mask_grpo": "maskrl_jax.tasks.mask_grpo",
    "maskfocus": "maskrl_jax.tasks.maskfocus",
    "shortcut": "maskrl_jax.tasks.shortcut",
}
REQUIRED = ("num_steps", "batch_size", "max_bad_steps", "optimizer", *stored.RUNNING, *stored.ARCHITECTURE)
OPTIMIZER_KEYS = tuple(sorted({field.name for field in dataclasses.fields(OptimizerConfig)} - {"updates_per_step"}))


def run(config: ConfigDict, workdir: str, store: str) -> None:
    """Train a config's stage in workdir and, under `<store>`, every parent that is not trained yet.

    Prints the time of every stage. Raises UserError for a config that cannot run or does not fit the workdir.
    """
    measured.code()  # now: files may change while the parents train
    for name, place in config.init.items():
        if place and name in config.parents:  # else `check` says so
            _ready(name, config.parents[name], place)
    check(config)
    seconds = {}
    try:
        _stage(config, workdir, store, seconds)
    finally:
        if jax.process_index() == 0:
            for name, spent in seconds.items():
                print(f"{name}: {spent:.0f} s" if spent else f"{name}: finished before", flush=True)


def parents(config: ConfigDict, store: str, seconds: dict[str, float]) -> dict[str, Parent]:
    """Return the trained parents of a stage, after training those that are missing."""
    return {name: _parent(name, config, store, seconds) for name in config.parents}


def _parent(name, config, store, seconds):
    wanted, workdir = config.parents[name], config.init.get(name, "")
    if workdir:
        parent = _ready(name, wanted, workdir)
    else:
        parent, workdir = wanted, stored.stage_workdir(wanted, store)
        _stage(wanted, workdir, store, seconds)
    params, extra = checkpoint.load_params(workdir)
    return Parent(config=_as_trained(parent), params=params, extra=extra, workdir=workdir)


def _as_trained(config):
    """Return the config with those parents in it that `init` put in the place of the ones it names."""
    replaced = {name: stored.read_config(path) for name, path in config.get("init", {}).items() if path}
    # What is no such stage is refused when it is opened (`_ready`).
    tasks = {name: parent.task for name, parent in config.get("parents", {}).items()}
    replaced = {name: found for name, found in replaced.items() if found and found.get("task") == tasks.get(name)}
    if not replaced:
        return config
    resolved = ConfigDict(stored.tuples(stored.plain(config)))
    for name, parent in replaced.items():
        resolved.parents[name] = _as_trained(parent)
    return resolved


def _ready(name, wanted, workdir):
    """Return the config stored in a workdir that replaces a parent."""
    found = stored.read_config(workdir)
    if found is None:
        raise UserError(f"init.{name}={workdir} has no {stored.CONFIG}; point it to a {wanted.task!r} stage")
    if found.get("task") != wanted.task:
        raise UserError(
            f"init.{name}={workdir} holds a {found.get('task')!r} stage; point it to a {wanted.task!r} stage"
        )
    if not stored.is_finished(workdir):
        raise UserError(f"init.{name}={workdir} is not trained to its end; run its training command again")
    return found


def _stage(config, workdir, store, seconds):
    """Train a stage in workdir unless that is done."""
    name = f"{config.task} ({workdir})"
    if _agreed(stored.is_done(config, workdir)):
        seconds.setdefault(name, 0.0)
        other = [line for key, line in stored.changes(config, workdir).items() if key.startswith("evaluation.")]
        if other and jax.process_index() == 0:
            print(
                f"{workdir} is finished and not measured again; its report has another {'; '.join(other)}", flush=True
            )
        return
    _test_service(config)
    trained = parents(config, store, seconds)
    with stored.lock(workdir):
        if _agreed(stored.is_done(config, workdir)):  # by the run that held the lock
            return
        began = time.monotonic()
        if jax.process_index() == 0:
            if stored.is_finished(workdir):
                print(
                    f"{workdir} was finished and goes on with more steps; its report is replaced at the end", flush=True
                )
            for line in stored.changes(config, workdir).values():
                print(f"config changed since the last run: {line}", flush=True)
            paths.write(
                os.path.join(workdir, stored.CONFIG), json.dumps(stored.plain(config), indent=1, sort_keys=True)
            )
            stored.write_places(workdir, {name: parent.workdir for name, parent in trained.items()}, store)
        context = _context(config, trained, workdir, store)
        task = dataclasses.replace(build(context), peak_seconds=_peak_seconds(config, context.parallel))
        try:
            loop.train(task, context.config, workdir, context.parallel)
        finally:
            seconds[name] = time.monotonic() - began
        trained_id = _trained_id(workdir)
        if jax.process_index() == 0:
            stored.finish(workdir, config.num_steps, trained_id)


def _test_service(config):
    """Find a reward service that is missing or wrong before parents are trained; process 0 alone asks one."""
    settings, reason = config.get("service", {"url": ""}), None
    if not settings["url"]:
        return
    from maskrl_jax.tasks import base  # late: it draws figures, too

    if jax.process_index() == 0:
        try:
            with _settings_of_the_user(config):
                base.opened_service(base.service_of(settings, ()))
        except UserError as error:
            reason = error
    if _agreed(reason is not None):
        raise reason or UserError(f"no reward service at {settings['url']}; process 0 says why")


def keep(
    config: ConfigDict,
    workdir: str,
    store: str,
    parents: dict[str, str],
    params: Any,
    extra: Any,
    beside: Mapping[str, str] | None = None,
) -> None:
    """Leave what a trained stage leaves, of parameters from elsewhere; `parents` are workdirs by name.

    `beside` are files that it needs, by their path within the stage; they are copied. The folder appears by rename: a
    kill half-way leaves no half of a stage under its name.
    """
    place = os.path.abspath(workdir)
    os.makedirs(os.path.dirname(place), exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{os.path.basename(place)}.", dir=os.path.dirname(place)) as folder:
        aside = os.path.join(folder, os.path.basename(place))
        os.mkdir(aside)
        paths.write(os.path.join(aside, stored.CONFIG), json.dumps(stored.plain(config), indent=1, sort_keys=True))
        stored.write_places(aside, parents, store, seen_from=place)
        for name, file in (beside or {}).items():
            os.makedirs(os.path.dirname(os.path.join(aside, name)), exist_ok=True)
            shutil.copyfile(file, os.path.join(aside, name))
        checkpoint.save_params(aside, config.num_steps, params, extra)
        stored.finish(aside, config.num_steps, measured.identity(params, extra))
        os.rename(aside, place)


def _trained_id(workdir: str) -> str:
    """Identify what stages above would start from."""
    return measured.identity(*checkpoint.load_params(workdir))


def _agreed(answer: bool) -> bool:
    """Process 0's answer: what is on a disk need not look the same to all processes, but they must go one way."""
    return bool(multihost_utils.broadcast_one_to_all(np.array(answer)))


def _peak_seconds(config, parallel):
    """Seconds that a step's FLOPs take at the devices' published peak; None where peak or FLOPs are not known."""
    target, programs = local_target(), phases(config, parallel)
    # A loop that ends on data has no FLOPs that a compiler could count.
    if target.chip is None or any(phase.loop_trips > 1 for phase in programs):
        return None
    needs = [dry_run.measure(phase, parallel, target).needs for phase in programs]
    return sum(one.time.compute for one in needs if one is not None)


def _context(config, trained, workdir, store):
    """Return what a stage is built from; its config names the parents as they are, also where init replaced them."""
    resolved = ConfigDict(stored.tuples(stored.plain(config)))
    for name, parent in trained.items():
        resolved.parents[name] = parent.config
    return Context(resolved, trained, Parallel(config.parallel), store, workdir)


def task_module(config: ConfigDict) -> Any:
    """Import the module of a config's task."""
    if config.task not in TASKS:
        raise unknown("task", config.task, TASKS)
    return importlib.import_module(TASKS[config.task])


def build(context: Context) -> Any:
    """Build a stage."""
    with _settings_of_the_user(context.config):
        return task_module(context.config).build(context)


def phases(config: ConfigDict, parallel: Parallel) -> list[Phase]:
    """Return what a stage compiles, with abstract arguments, on the parents that `init` gives it.

    UserError for settings that cannot be.
    """
    # Nothing but the config goes in: a key that is missing or misspelt in one's own file ends here too.
    kinds = (ValueError, TypeError, AttributeError, KeyError, ArithmeticError, re.error)
    with _settings_of_the_user(config, kinds):
        return task_module(config).phases(_as_trained(config), parallel)


@contextlib.contextmanager
def _settings_of_the_user(config, kinds=ValueError):
    # The pure rooms say ValueError of a setting that cannot be.
    try:
        yield
    except kinds as error:
        reason = " ".join(str(error.args[0] if error.args else error).split())
        if isinstance(error, (AttributeError, KeyError)):
            reason = f"no key {reason.strip(chr(34))}"
        raise UserError(f"the config of task {config.task!r} cannot run: {reason}") from error


def compilation_cache(store: str) -> None:
    """Keep compiled programs in the store, for all runs that share it."""
    jax.config.update("jax_compilation_cache_dir", os.path.join(paths.absolute(store), "jax_cache"))


def open_workdir(workdir: str) -> tuple[Context, Any]:
    """Return the context of a trained run and the average of its parameters, to sample or measure from.

    Raises UserError where there is no run, or it or a parent has no checkpoint.
    """
    measured.code()
    config = stored.read_config(workdir)
    if config is None:
        raise UserError(f"{workdir} has no {stored.CONFIG}; give the --workdir of a run")
    places = stored.read_places(workdir)
    if places is None:
        raise UserError(f"{workdir} has no {stored.PARENTS}; run its training command again")
    (workdirs, store), trained = places, {}
    for name, parent in workdirs.items():
        found = stored.read_config(parent)
        if found is None:
            raise UserError(f"parent {name} of {workdir} is not at {parent} any more; run the training command again")
        params, extra = checkpoint.load_params(parent)
        trained[name] = Parent(config=found, params=params, extra=extra, workdir=parent)
    params, _ = checkpoint.load_params(workdir)
    compilation_cache(store)
    return _context(config, trained, workdir, store), params


def check_keys(config: ConfigDict) -> None:
    """Raise UserError for a config that lacks what every stage has, or is of no task."""
    missing = [key for key in REQUIRED if key not in config]
    if missing:
        raise UserError(f"the config of task {config.get('task')!r} has no {', '.join(missing)}; add it")
    if config.task not in TASKS:
        raise unknown("task", config.task, TASKS)


def check(config: ConfigDict) -> None:
    """Raise UserError for what cannot run, here or in a parent, before anything is trained."""
    check_keys(config)
    for key in ("num_steps", "batch_size", "log_every", "keep"):
        if config[key] < 1:
            raise UserError(f"{key}={config[key]} of task {config.task!r} must be at least 1")
    if config.seed < 0 or config.get("eval_samples", 1) < 1:
        raise UserError(f"seed must be at least 0 and eval_samples at least 1 in the config of task {config.task!r}")
    if not 0 <= config.profile_at < config.num_steps:
        raise UserError(f"profile_at={config.profile_at} is not a step of {config.num_steps}; use 0 for no trace")
    for name in config.init:
        if name not in config.parents:
            raise unknown("parent in init", name, config.parents.keys())
    unused = {key for key in config.optimizer if key not in OPTIMIZER_KEYS}
    if unused:
        raise unknown("optimizer setting", min(unused), OPTIMIZER_KEYS)
    optimizer_of(config.optimizer, config.num_steps)
    parallel = Parallel(config.parallel)
    parallel.rows(config.batch_size)
    phases(config, parallel)
    for name, parent in config.parents.items():
        if not config.init.get(name, ""):
            check(parent)
