"""Model folders in diffusers' layout: a subfolder a component, each with its settings and its safetensors files.

Weights lie in one file `diffusion_pytorch_model.safetensors`, or in several that
`diffusion_pytorch_model.safetensors.index.json` tells. Nothing is unpickled.
"""

import json
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
SETTINGS = ("config.json", "scheduler_config.json")


def read_settings(component: str | pathlib.Path) -> dict[str, Any]:
    """Settings of a component's folder. Raises ValueError with its path where there are none."""
    for name in SETTINGS:
        if (path := pathlib.Path(component, name)).is_file():
            return _json(path)
    raise ValueError(f"{component} holds no {' or '.join(SETTINGS)}")


def read_state(component: str | pathlib.Path) -> dict[str, np.ndarray]:
    """All tensors of a component by name, in the types they are stored in.

    Raises:
      ValueError: one line with the path of what is missing or damaged.
    """
    state = {}
    for file, names in _files(component).items():
        with _opened(file) as tensors:
            state |= {name: tensors.get_tensor(name) for name in names}
    return state


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
      ValueError: the target exists, or one line that names the tensor that is missing, left over or misshapen.
    """
    source, target = pathlib.Path(source), pathlib.Path(target)
    if target.exists():
        raise ValueError(f"{target} exists; choose another folder or remove it")
    files = {name: _files(source / name) for name in states}
    for name, state in states.items():
        _same_tensors(files[name], state)
    replaced = {file.relative_to(source) for own in files.values() for file in own}
    aside = target.with_name(f"{target.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    ignore = lambda folder, names: [n for n in names if pathlib.Path(folder, n).relative_to(source) in replaced]  # noqa: E731
    shutil.copytree(source, aside, ignore=ignore)
    for name, state in states.items():
        for file, tensors in files[name].items():
            own = {tensor: np.ascontiguousarray(state[tensor]) for tensor in tensors}
            save_file(own, aside / file.relative_to(source), metadata={"format": "pt"})  # loaders ask for this word
    aside.rename(target)


def _files(component: str | pathlib.Path) -> dict[pathlib.Path, list[str]]:
    """The weight files of a component with the names that each holds."""
    folder = pathlib.Path(component)
    if (folder / INDEX).is_file():
        names = _json(folder / INDEX).get("weight_map")
        if not isinstance(names, dict):
            raise ValueError(f"{folder / INDEX} holds no weight_map")
        files: dict[pathlib.Path, list[str]] = {}
        for name, file in names.items():
            if pathlib.PurePath(file).name != file:
                raise ValueError(f"{folder / INDEX} names the file {file!r}, which is not beside it")
            files.setdefault(folder / file, []).append(name)
        for file, listed in files.items():
            with _opened(file) as tensors:
                if other := set(listed) ^ set(tensors.keys()):
                    raise ValueError(f"{folder / INDEX} and {file.name} disagree about {min(other)}")
        return files
    if not (folder / WEIGHTS).is_file():
        raise ValueError(f"{folder} holds neither {WEIGHTS} nor {INDEX}")
    with _opened(folder / WEIGHTS) as tensors:
        return {folder / WEIGHTS: list(tensors.keys())}


def _same_tensors(files: Mapping[pathlib.Path, list[str]], state: Mapping[str, np.ndarray]) -> None:
    """Refuse a state that is not of the published form."""
    wanted = {name for names in files.values() for name in names}
    for name in sorted(wanted ^ state.keys()):
        raise ValueError(f"the state {'lacks' if name in wanted else 'holds'} {name}")
    for file, names in files.items():
        with _opened(file) as tensors:
            for name in names:
                shape = tensors.get_slice(name).get_shape()
                if shape != list(state[name].shape):
                    raise ValueError(f"{name} has shape {list(state[name].shape)}, not {shape}")


def _opened(file: pathlib.Path) -> Any:
    if not file.is_file():
        raise ValueError(f"{file} is missing")
    try:
        return safe_open(file, framework="numpy")
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged: {error}") from error


def _json(path: pathlib.Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} is damaged: not a JSON object")
    return found
