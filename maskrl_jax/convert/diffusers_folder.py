"""Model folders in diffusers' layout: a subfolder a component, each with its settings and its safetensors files.

Weights lie in one file `diffusion_pytorch_model.safetensors`, or in several that
`diffusion_pytorch_model.safetensors.index.json` tells. Nothing is unpickled. What is missing or damaged is a UserError
of one line with its path.
"""

import pathlib
import shutil
import tempfile
from collections.abc import Mapping
from typing import Any

import numpy as np

from maskrl_jax.convert import files
from maskrl_jax.convert.keys import refuse_misfits
from maskrl_jax.errors import UserError

STEM = "diffusion_pytorch_model"
WEIGHTS = f"{STEM}.safetensors"
INDEX = f"{WEIGHTS}.index.json"
SETTINGS = ("config.json", "scheduler_config.json")


def read_settings(component: str | pathlib.Path) -> dict[str, Any]:
    """Settings of a component's folder."""
    for name in SETTINGS:
        if (path := pathlib.Path(component, name)).is_file():
            return files.json_object(path)
    raise UserError(f"{component} holds no {' or '.join(SETTINGS)}")


def read_state(component: str | pathlib.Path) -> dict[str, np.ndarray]:
    """All tensors of a component by name, in the types they are stored in."""
    return files.gather(files.shards(component, STEM))


def write_folder(
    source: str | pathlib.Path, target: str | pathlib.Path, states: Mapping[str, Mapping[str, np.ndarray]]
) -> None:
    """Copy a model's folder with new weights of some components; all other files stay byte for byte.

    Args:
      source: the published folder.
      target: made here, by rename at the end: a kill half-way leaves no half of a model under that name.
      states: by component (subfolder), tensors of the names and shapes that the source has; they go into files of the
        same names, in the types given here.

    Raises:
      UserError: the target exists, or the source is damaged.
      ValueError: one line that names the tensors that are missing, left over or misshapen.
    """
    source, target = pathlib.Path(source), pathlib.Path(target)
    if target.exists():
        raise UserError(f"{target} exists; choose another folder or remove it")
    if source.resolve() in target.resolve().parents:
        raise UserError(f"{target} lies in {source}, which is copied; choose another folder")
    places = {name: files.shapes(files.shards(source / name, STEM)) for name in states}
    for name, state in states.items():
        wanted = {tensor: shape for tensor, (_, shape) in places[name].items()}
        refuse_misfits({tensor: x.shape for tensor, x in state.items()}, wanted)
    replaced = {file.relative_to(source) for own in places.values() for file, _ in own.values()}
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{target.name}.", dir=target.parent) as folder:
        aside = pathlib.Path(folder, target.name)
        ignore = lambda folder, names: [n for n in names if pathlib.Path(folder, n).relative_to(source) in replaced]  # noqa: E731
        shutil.copytree(source, aside, ignore=ignore)
        for name, state in states.items():
            for file in {file for file, _ in places[name].values()}:
                own = {tensor: state[tensor] for tensor, (place, _) in places[name].items() if place == file}
                files.write(aside / file.relative_to(source), own)
        aside.rename(target)
