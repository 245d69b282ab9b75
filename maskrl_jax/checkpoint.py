"""Checkpoints: orbax behind three methods, and the way to read a finished stage's parameters."""

import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from maskrl_jax import paths
from maskrl_jax.errors import UserError
from maskrl_jax.parallel import Parallel

FOLDER = "checkpoints"


class Checkpoints:
    """Save and restore a TrainState under `<workdir>/checkpoints`, the newest `keep` of them.

    Saves run in the background and become visible by one rename: a process killed at any moment leaves the
    earlier ones intact. What pmap saved, sharded restores, on any number of devices, and the reverse.
    """

    def __init__(self, workdir: str, parallel: Parallel, keep: int = 1):
        self._folder = _folder(workdir)
        self._parallel = parallel
        self._manager = _Manager(self._folder, options=ocp.CheckpointManagerOptions(max_to_keep=keep, create=True))

    def latest(self) -> int | None:
        """Return the step of the newest complete checkpoint, None if there is none."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any) -> None:
        """Save the state of a step in the background; a step that is saved already stays as it is."""
        if step == self.latest():
            return
        # Orbax reports a refused save by its return value only.
        if not self._manager.save(step, args=ocp.args.StandardSave(self._parallel.to_global(state))):
            raise RuntimeError(f"{self._folder}: orbax refused to save step {step}")

    def restore(self, state: Any) -> Any:
        """Return the newest checkpoint with the shapes, dtypes and placement of `state`.

        `state` is given up: its buffers are freed first, so that a state need not fit twice. Raises UserError
        where there is no checkpoint or where it is of another model.
        """
        step = self.latest()
        if step is None:
            raise UserError(f"no checkpoint under {self._folder}; train first or name another --workdir")
        target = jax.tree.map(_abstract, self._parallel.to_global(state))
        jax.tree.map(lambda x: x.delete(), state)
        try:
            restored = self._manager.restore(step, args=ocp.args.StandardRestore(target))
        except (ValueError, KeyError, TypeError, FileNotFoundError) as error:
            raise UserError(
                f"checkpoint {step} under {self._folder} is damaged or does not fit this config "
                f"({_first_line(error)}); delete it, use the config it was trained with, or another --workdir"
            ) from error
        return self._parallel.to_local(restored)

    def close(self) -> None:
        """Wait for the last save and release the folder."""
        self._manager.wait_until_finished()
        self._manager.close()


class _Manager(ocp.CheckpointManager):
    """Orbax's own, but for one question: asked from its threads, it would move where all processes stop."""

    def reached_preemption(self, step: int) -> bool:
        return False  # Interruption asks instead, and what it finds is saved like anything else


def save_params(workdir: str, step: int, params: Any, extra: Any) -> None:
    """Write parameters from elsewhere where `load_params` finds them: no optimizer, so nothing can go on from there."""
    with ocp.CheckpointManager(_folder(workdir)) as manager:
        saved = manager.save(step, args=ocp.args.StandardSave({"ema": params, **({"extra": extra} if extra else {})}))
    if not saved:  # orbax refuses by its return value only
        raise RuntimeError(f"{workdir}: orbax refused to save step {step}")


def load_params(workdir: str) -> tuple[Any, Any]:
    """Return (params, extra) of the newest checkpoint as numpy: the moving average, for use as a parent.

    Raises UserError where there is no checkpoint or where it is not one of ours.
    """
    arrays = load_arrays(workdir, ("ema", "extra"))
    return arrays["ema"], arrays.get("extra", {})


def load_arrays(workdir: str, names: Sequence[str]) -> dict[str, Any]:
    """Return the named fields of the newest checkpoint's TrainState as trees of numpy arrays.

    `extra` is left out where it has no arrays. Raises UserError as `load_params`.
    """
    folder = _folder(workdir)
    remedy = "train that stage or point init.<parent> to its workdir"
    if not epath.Path(folder).is_dir():
        raise UserError(f"no checkpoint under {folder}; {remedy}")
    with ocp.CheckpointManager(folder, item_handlers=ocp.PyTreeCheckpointHandler()) as manager:
        step = manager.latest_step()
        if step is None:
            raise UserError(f"no complete checkpoint under {folder}; {remedy}")
        try:
            saved = manager.item_metadata(step).tree
            wanted = {name: saved[name] for name in names if name in saved or name != "extra"}
            target = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), wanted)
            how = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
            args = ocp.args.PyTreeRestore(target, restore_args=how, partial_restore=True)
            return manager.restore(step, args=args)
        except (ValueError, KeyError, TypeError, AttributeError, FileNotFoundError) as error:
            raise UserError(
                f"checkpoint {step} under {folder} is damaged or not one of a stage ({_first_line(error)}); "
                f"name another workdir, or delete {os.path.join(folder, str(step))} and, where it is there, "
                f"{os.path.join(workdir, 'done')} and run that stage's training command again"
            ) from error


def _folder(workdir):
    return os.path.join(paths.absolute(workdir), FOLDER)


def _abstract(x):
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)


def _first_line(error):
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
