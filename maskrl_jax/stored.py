"""What a stage's folder holds: the config it was trained with, whether it is complete, who works in it."""

import contextlib
import fcntl
import hashlib
import itertools
import json
import os
from collections.abc import Iterator
from typing import Any

import jax
from etils import epath
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from maskrl_jax import paths
from maskrl_jax.data.settings import read_keys
from maskrl_jax.errors import UserError

CONFIG = "config.json"
PARENTS = "parents.json"
DONE = "done"
# Keys that do not change what a stage computes, only how it is run and watched.
RUNNING = ("name", "log_every", "eval_every", "save_every", "keep", "profile_at", "parallel", "init")
NEUTRAL = (*RUNNING, "evaluation", "rollout_rows")
READING = ("encoded", "workers")  # of `data`: how pictures are read, or what was made of them by the tokenizer
SERVICE = ("name", "weight")  # of a reward service; its other keys say how it is reached
# Keys whose change makes a stored checkpoint another model or another run, or one that does not fit.
ARCHITECTURE = ("task", "seed", "model", "data", "parents", "init")
OPTIMIZER_STATE = tuple(f"optimizer.{key}" for key in ("name", "rates", "muon_skip"))


def stage_workdir(config: ConfigDict, store: str) -> str:
    """Return where the store keeps the stage of a config."""
    return os.path.join(store, f"{config.task}-{fingerprint(config)[:12]}")


def fingerprint(config: ConfigDict) -> str:
    """Return the SHA-256 of what determines a stage's result: its config without neutral keys, its parents.

    A parent that `init` replaces counts with its config and its trained parameters, or with its path where there are
    none.
    """
    own = {key: value for key, value in _served(plain(config)).items() if key not in (*NEUTRAL, "parents")}
    if "service" in own:
        own["service"] = {key: own["service"].get(key) for key in SERVICE}
    own["parents"] = {}
    for name, wanted in config.parents.items():
        path = config.init.get(name, "")
        found = read_config(path) if path else wanted
        own["parents"][name] = paths.absolute(path) if found is None else fingerprint(found)
        if path and found is not None:
            own["parents"][name] += f" {trained_id(path)}"
    return hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()


def default_workdir(file: str) -> str:
    """Where a run of a config file goes: configs/speed_rl.py:full -> runs/speed_rl-full."""
    path, _, argument = file.partition(":")
    name = os.path.splitext(os.path.basename(path))[0]
    return os.path.join("runs", f"{name}-{argument}" if argument else name)


def new_evaluation(workdir: str) -> str:
    """Make the first of <workdir>/evaluations/1, 2, ... that does not exist; return its path."""
    for number in itertools.count(1):
        path = epath.Path(workdir, "evaluations", str(number))
        with contextlib.suppress(FileExistsError):
            if not path.exists():
                path.mkdir(parents=True)  # no other evaluation can then take it
                return str(path)


def plain(config: ConfigDict) -> dict[str, Any]:
    """Return a config as JSON would give it back: dicts, lists, strings, numbers."""
    return json.loads(json.dumps(config.to_dict()))


def read_config(workdir: str) -> ConfigDict | None:
    """Return the config stored in a workdir, lists as tuples; None if there is none."""
    path = epath.Path(workdir, CONFIG)
    if not path.exists():
        return None
    try:
        return ConfigDict(tuples(json.loads(path.read_text())))
    except ValueError as error:
        raise UserError(f"{path} is not a config ({error}); use another --workdir") from error


def tuples(value: Any) -> Any:
    """Return a plain tree with tuples in the place of lists."""
    # Settings become fields of frozen dataclasses that are static to jit: they must hash.
    if isinstance(value, dict):
        return {key: tuples(inner) for key, inner in value.items()}
    return tuple(tuples(inner) for inner in value) if isinstance(value, list) else value


def data_of(config: ConfigDict) -> dict[str, Any]:
    """Return what a stage's data are, without how they are read."""
    return _data_of(plain(config.data))


def _data_of(data):
    return {key: value for key, value in read_keys(data).items() if key not in READING}


def is_done(config: ConfigDict, workdir: str) -> bool:
    """Say if the stage is complete; UserError where the config differs too much from the stored one."""
    found = changes(config, workdir)
    broken = [line for key, line in found.items() if key.split(".")[0] in ARCHITECTURE or key in OPTIMIZER_STATE]
    if broken:
        raise UserError(f"{workdir} was begun with another config: {'; '.join(broken)}; use another --workdir")
    complete = _done(workdir).get("step")
    if complete is None or complete < config.num_steps:
        return False
    if complete > config.num_steps:
        raise UserError(f"{workdir} is at step {complete}, num_steps is {config.num_steps}; use another --workdir")
    other = [line for key, line in found.items() if key.split(".")[0] not in NEUTRAL and not _of_reaching(key)]
    if other:
        raise UserError(f"{workdir} is finished with another config: {'; '.join(other)}; use another --workdir")
    return True


def changes(config: ConfigDict, workdir: str) -> dict[str, str]:
    """Return {dotted key: "key: stored -> new"} where a config differs from the one stored in a workdir."""
    stored = read_config(workdir)
    return {} if stored is None else differences(plain(stored), plain(config))


def differences(old: dict, new: dict) -> dict[str, str]:
    """Return {dotted key: "key: old -> new"} of two plain configs; neutral keys of parents do not count.

    A service without a url is none, as in configs of before there were services, and so are tokens without a kind.
    """
    old, new = _flat(_served(old)), _flat(_served(new))
    changed = [key for key in sorted({*old, *new}) if old.get(key) != new.get(key)]
    keys = [key for key in changed if not _neutral_in_parent(key)]
    return {key: f"{key}: {old.get(key, 'absent')} -> {new.get(key, 'absent')}" for key in keys}


def _neutral_in_parent(key):
    parts, neutral = key.split("."), set(NEUTRAL) - {"init"}
    if parts[0] == "parents" and _of_reaching(".".join(parts[-2:])):
        return True
    return any(parts[i] == "parents" and parts[i + 2] in neutral for i in range(0, len(parts) - 2, 2))


def _of_reaching(key):
    """Whether a key says only how a service is reached."""
    return key.startswith("service.") and key not in [f"service.{name}" for name in SERVICE]


def _served(config):
    """Return a plain config without the services, its own and its parents', that have no url, and how data are read."""
    own = {key: value for key, value in config.items() if key != "service" or value.get("url")}
    if "data" in own:
        own["data"] = _data_of(own["data"])
    for name in ("policy", "rollout"):  # runs of before there were conventions have no such key
        if name in own and own[name].get("timesteps") == "clock":
            own[name] = {key: value for key, value in own[name].items() if key != "timesteps"}
    if "parents" in own:
        own["parents"] = {name: _served(parent) for name, parent in own["parents"].items()}
    return own


def _flat(tree, prefix=""):
    found = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found


def is_finished(workdir: str) -> bool:
    """Say if a stage was trained to the end of the config in its workdir."""
    config = read_config(workdir)
    return config is not None and _done(workdir).get("step") == config.num_steps


def finish(workdir: str, step: int, trained: str) -> None:
    """Note that a stage is complete at this step; `trained` identifies its parameters."""
    paths.write(os.path.join(workdir, DONE), json.dumps({"step": step, "trained": trained}))


def trained_id(workdir: str) -> str | None:
    """Return what identifies the parameters of a finished stage, None where there is none."""
    return _done(workdir).get("trained")


def _done(workdir: str) -> dict[str, Any]:
    path = epath.Path(workdir, DONE)
    if not path.exists():
        return {}
    found = json.loads(path.read_text())
    return found if isinstance(found, dict) else {"step": found}  # of an earlier version: the step alone


def write_places(workdir: str, parents: dict[str, str], store: str, seen_from: str = "") -> None:
    """Note where a stage's parents and its store are, seen from where the workdir will be, if that is elsewhere."""
    # Relative, so that a folder of runs can be moved as a whole.
    place = seen_from or workdir
    places = {name: paths.relative(parent, place) for name, parent in parents.items()}
    text = json.dumps({"parents": places, "store": paths.relative(store, place)}, indent=1)
    paths.write(os.path.join(workdir, PARENTS), text)


def read_places(workdir: str) -> tuple[dict[str, str], str] | None:
    """Return the workdirs of a stage's parents and its store; None where they were not noted."""
    path = epath.Path(workdir, PARENTS)
    if not path.exists():
        return None
    places = json.loads(path.read_text())
    found = {name: paths.joined(workdir, place) for name, place in places["parents"].items()}
    return found, paths.joined(workdir, places["store"])


@contextlib.contextmanager
def lock(workdir: str) -> Iterator[None]:
    """Keep other runs out of a workdir, waiting for the one that is in; a kill frees the lock.

    A bucket has no locks: there all that is done is to let this run's processes in and out together.
    """
    together = multihost_utils.sync_global_devices
    if paths.is_remote(workdir):
        together(f"enter {workdir}")
        yield
        together(f"leave {workdir}")
        return
    try:
        os.makedirs(workdir, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise UserError(f"{workdir} is or lies below a file; name another --workdir") from error
    except OSError as error:
        raise UserError(f"cannot make {workdir} ({error.strerror}); name another --workdir") from error
    with open(os.path.join(workdir, ".lock"), "w") as file:
        if jax.process_index() == 0:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"waiting for another run that works in {workdir}", flush=True)
                fcntl.flock(file, fcntl.LOCK_EX)
        together(f"lock {workdir}")
        yield
        together(f"unlock {workdir}")
