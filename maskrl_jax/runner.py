"""Stages and their parents: trains what a config needs, once, and keeps it where later runs find it."""

import contextlib
import dataclasses
import fcntl
import hashlib
import importlib
import json
import os
import time
from collections.abc import Iterator
from typing import Any

import jax
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from maskrl_jax import checkpoint, loop
from maskrl_jax.errors import UserError, unknown
from maskrl_jax.parallel import Parallel
from maskrl_jax.phase import Phase
from maskrl_jax.state import OptimizerConfig, optimizer_of
from maskrl_jax.tasks.task import Context, Parent

TASKS = {
    "tokenizer": "maskrl_jax.tasks.tokenizer",
    "judge": "maskrl_jax.tasks.judge",
    "maskgit": "maskrl_jax.tasks.maskgit",
    "speed_rl": "maskrl_jax.tasks.speed_rl",
}
# Keys that do not change what a stage computes, only how it is run and watched.
RUNNING = ("name", "log_every", "eval_every", "save_every", "keep", "parallel", "init")
NEUTRAL = (*RUNNING, "evaluation")
# Keys whose change makes a stored checkpoint another model.
ARCHITECTURE = ("task", "model", "data", "parents", "init")
REQUIRED = ("seed", "num_steps", "batch_size", "max_bad_steps", "optimizer", *RUNNING, *ARCHITECTURE)
OPTIMIZER_KEYS = tuple(field.name for field in dataclasses.fields(OptimizerConfig))
CONFIG = "config.json"
PARENTS = "parents.json"
DONE = "done"


def run(config: ConfigDict, workdir: str, store: str) -> None:
    """Train a config's stage in workdir and, under `<store>`, every parent that is not trained yet.

    Prints the time of every stage. Raises UserError for a config that cannot run or does not fit the workdir.
    """
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
        parent, workdir = wanted, stage_workdir(wanted, store)
        _stage(wanted, workdir, store, seconds)
    params, extra = checkpoint.load_params(workdir)
    return Parent(config=_as_trained(parent), params=params, extra=extra, workdir=workdir)


def _as_trained(config):
    """Return the config with those parents in it that `init` put in the place of the ones it names."""
    replaced = {name: read_config(path) for name, path in config.init.items() if path}
    replaced = {name: parent for name, parent in replaced.items() if parent is not None}
    if not replaced:
        return config
    resolved = ConfigDict(_tuples(plain(config)))
    for name, parent in replaced.items():
        resolved.parents[name] = _as_trained(parent)
    return resolved


def _ready(name, wanted, workdir):
    """Return the config stored in a workdir that replaces a parent."""
    stored = read_config(workdir)
    if stored is None:
        raise UserError(f"init.{name}={workdir} has no {CONFIG}; point it to a {wanted.task!r} stage")
    if stored.get("task") != wanted.task:
        raise UserError(
            f"init.{name}={workdir} holds a {stored.get('task')!r} stage; point it to a {wanted.task!r} stage"
        )
    return stored


def stage_workdir(config: ConfigDict, store: str) -> str:
    """Return where the store keeps the stage of a config."""
    return os.path.join(store, f"{config.task}-{fingerprint(config)[:12]}")


def fingerprint(config: ConfigDict) -> str:
    """Return the SHA-256 of what determines a stage's result: its config without neutral keys, its parents.

    A parent that `init` replaces counts with the config stored there, or with its path where there is none.
    """
    own = {key: value for key, value in plain(config).items() if key not in (*NEUTRAL, "parents")}
    own["parents"] = {}
    for name, wanted in config.parents.items():
        path = config.init.get(name, "")
        parent = (read_config(path) or os.path.abspath(path)) if path else wanted
        own["parents"][name] = parent if isinstance(parent, str) else fingerprint(parent)
    return hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()


def plain(config: ConfigDict) -> dict[str, Any]:
    """Return a config as JSON would give it back: dicts, lists, strings, numbers."""
    return json.loads(json.dumps(config.to_dict()))


def read_config(workdir: str) -> ConfigDict | None:
    """Return the config stored in a workdir, lists as tuples; None if there is none."""
    path = os.path.join(workdir, CONFIG)
    if not os.path.exists(path):
        return None
    with open(path) as file:
        try:
            return ConfigDict(_tuples(json.load(file)))
        except ValueError as error:
            raise UserError(f"{path} is not a config ({error}); use another --workdir") from error


def _tuples(value):
    # Settings become fields of frozen dataclasses that are static to jit: they must hash.
    if isinstance(value, dict):
        return {key: _tuples(inner) for key, inner in value.items()}
    return tuple(_tuples(inner) for inner in value) if isinstance(value, list) else value


def _stage(config, workdir, store, seconds):
    """Train a stage in workdir unless that is done."""
    name = f"{config.task} ({workdir})"
    if _is_done(config, workdir):
        seconds.setdefault(name, 0.0)
        return
    trained = parents(config, store, seconds)
    with lock(workdir):
        if _is_done(config, workdir):  # by the run that held the lock
            return
        began = time.monotonic()
        if jax.process_index() == 0:
            for line in _changes(config, workdir).values():
                print(f"config changed since the last run: {line}", flush=True)
            _write(os.path.join(workdir, CONFIG), json.dumps(plain(config), indent=1, sort_keys=True))
            # Relative, so that a folder of runs can be moved as a whole.
            places = {name: os.path.relpath(parent.workdir, workdir) for name, parent in trained.items()}
            store_place = os.path.relpath(store, workdir)
            _write(os.path.join(workdir, PARENTS), json.dumps({"parents": places, "store": store_place}, indent=1))
        context = _context(config, trained, workdir, store)
        task = build(context)
        try:
            loop.train(task, context.config, workdir, context.parallel)
        finally:
            seconds[name] = time.monotonic() - began
        if jax.process_index() == 0:
            _write(os.path.join(workdir, DONE), str(config.num_steps))


def _context(config, trained, workdir, store):
    """Return what a stage is built from; its config names the parents as they are, also where init replaced them."""
    resolved = ConfigDict(_tuples(plain(config)))
    for name, parent in trained.items():
        resolved.parents[name] = parent.config
    return Context(resolved, trained, Parallel(config.parallel), os.path.join(store, "data"), workdir)


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
    """Return what a stage compiles, with abstract arguments; UserError for settings that cannot be."""
    # Nothing but the config goes in: a key that is missing or misspelt in one's own file ends here too.
    with _settings_of_the_user(config, (ValueError, TypeError, AttributeError, KeyError)):
        return task_module(config).phases(config, parallel)


@contextlib.contextmanager
def _settings_of_the_user(config, kinds=ValueError):
    # The pure rooms say ValueError of a setting that cannot be.
    try:
        yield
    except kinds as error:
        raise UserError(f"the config of task {config.task!r} cannot run: {' '.join(str(error).split())}") from error


def compilation_cache(store: str) -> None:
    """Keep compiled programs in the store, for all runs that share it."""
    jax.config.update("jax_compilation_cache_dir", os.path.join(os.path.abspath(store), "jax_cache"))


def is_finished(workdir: str) -> bool:
    """Say if a stage was trained to the end of the config in its workdir."""
    return _done_step(workdir) is not None


def open_workdir(workdir: str) -> tuple[Context, Any]:
    """Return the context of a trained run and the average of its parameters, to sample or measure from.

    Raises UserError where there is no run, or it or a parent has no checkpoint.
    """
    config = read_config(workdir)
    if config is None:
        raise UserError(f"{workdir} has no {CONFIG}; give the --workdir of a run")
    path = os.path.join(workdir, PARENTS)
    if not os.path.exists(path):
        raise UserError(f"{workdir} has no {PARENTS}; run its training command again")
    with open(path) as file:
        places = json.load(file)
    trained = {}
    for name, place in places["parents"].items():
        parent = os.path.normpath(os.path.join(workdir, place))
        stored = read_config(parent)
        if stored is None:
            raise UserError(f"parent {name} of {workdir} is not at {parent} any more; run the training command again")
        params, extra = checkpoint.load_params(parent)
        trained[name] = Parent(config=stored, params=params, extra=extra, workdir=parent)
    params, _ = checkpoint.load_params(workdir)
    store = os.path.normpath(os.path.join(workdir, places["store"]))
    compilation_cache(store)
    return _context(config, trained, workdir, store), params


def check(config: ConfigDict) -> None:
    """Raise UserError for what cannot run, here or in a parent, before anything is trained."""
    missing = [key for key in REQUIRED if key not in config]
    if missing:
        raise UserError(f"the config of task {config.get('task')!r} has no {', '.join(missing)}; add it")
    if config.task not in TASKS:
        raise unknown("task", config.task, TASKS)
    for key in ("num_steps", "batch_size", "log_every", "keep"):
        if config[key] < 1:
            raise UserError(f"{key}={config[key]} of task {config.task!r} must be at least 1")
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


def _is_done(config, workdir):
    """Say if the stage is complete; UserError where the config differs too much from the stored one."""
    changes = _changes(config, workdir)
    broken = [line for key, line in changes.items() if key.split(".")[0] in ARCHITECTURE]
    if broken:
        raise UserError(f"{workdir} was begun with another config: {'; '.join(broken)}; use another --workdir")
    complete = _done_step(workdir)
    if complete is None or complete < config.num_steps:
        return False
    if complete > config.num_steps:
        raise UserError(f"{workdir} is at step {complete}, num_steps is {config.num_steps}; use another --workdir")
    other = [line for key, line in changes.items() if key.split(".")[0] not in NEUTRAL]
    if other:
        raise UserError(f"{workdir} is finished with another config: {'; '.join(other)}; use another --workdir")
    return True


def _changes(config, workdir):
    stored = read_config(workdir)
    return {} if stored is None else differences(plain(stored), plain(config))


def differences(old: dict, new: dict) -> dict[str, str]:
    """Return {dotted key: "key: old -> new"} of two plain configs; neutral keys of parents do not count."""
    old, new = _flat(old), _flat(new)
    changed = [key for key in sorted({*old, *new}) if old.get(key) != new.get(key)]
    keys = [key for key in changed if not _neutral_in_parent(key)]
    return {key: f"{key}: {old.get(key, 'absent')} -> {new.get(key, 'absent')}" for key in keys}


def _neutral_in_parent(key):
    parts = key.split(".")
    return any(parts[i] == "parents" and parts[i + 2] in NEUTRAL for i in range(0, len(parts) - 2, 2))


def _flat(tree, prefix=""):
    found = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found


def _done_step(workdir):
    path = os.path.join(workdir, DONE)
    if not os.path.exists(path):
        return None
    with open(path) as file:
        return int(file.read())


def _write(path, text):
    # By rename: a process killed while it writes must not leave half a file.
    with open(path + ".tmp", "w") as file:
        file.write(text)
    os.replace(path + ".tmp", path)


@contextlib.contextmanager
def lock(workdir: str) -> Iterator[None]:
    """Keep other runs out of a workdir, waiting for the one that is in; a kill frees the lock."""
    os.makedirs(workdir, exist_ok=True)
    with open(os.path.join(workdir, ".lock"), "w") as file:
        if jax.process_index() == 0:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"waiting for another run that works in {workdir}", flush=True)
                fcntl.flock(file, fcntl.LOCK_EX)
        multihost_utils.sync_global_devices(f"lock {workdir}")
        yield
        multihost_utils.sync_global_devices(f"unlock {workdir}")
