"""The frozen half of a published Meissonic, both ways: its VQ tokenizer and the text encoder beside it.

A state has the names of both folders: `vqvae.<name>` and `text_encoder.<name>`. Strict as in `vq_model` and `clip`.
"""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from maskrl_jax.convert import clip, diffusers_folder, files, vq_model
from maskrl_jax.models.clip import TextConfig
from maskrl_jax.models.vq_model import VQModelConfig

VQ, TEXT = "vqvae", "text_encoder"
Sizes = tuple[VQModelConfig, TextConfig]


def read_state(folder: str | pathlib.Path) -> dict[str, np.ndarray]:
    """All tensors of the two components of a published folder."""
    codes = diffusers_folder.read_state(pathlib.Path(folder, VQ))
    text = files.gather(files.shards(pathlib.Path(folder, TEXT), "model"))
    return {f"{VQ}.{name}": x for name, x in codes.items()} | {f"{TEXT}.{name}": x for name, x in text.items()}


def read_sizes(folder: str | pathlib.Path) -> Sizes:
    """Sizes of both, from their config.json. ValueError for what is missing or not supported."""
    codes, text = (diffusers_folder.read_settings(pathlib.Path(folder, name)) for name in (VQ, TEXT))
    return vq_model.config_of(codes), clip.text_config_of(text)


def settings_of(folder: str | pathlib.Path) -> dict[str, Any]:
    """The same as settings of a tokenizer's stage."""
    codes, text = read_sizes(folder)
    text = {name: x for name, x in dataclasses.asdict(text).items() if name not in ("remat", "dtype")}
    return vq_model.model_settings(codes) | {"text": text}


def params_of(state: Mapping[str, np.ndarray], sizes: Sizes) -> dict:
    """Variables of the tokenizer, with those of the text encoder under "text", float32."""
    if other := [name for name in state if not name.startswith((f"{VQ}.", f"{TEXT}."))]:
        raise ValueError(f"the state has {other[0]}, which is neither in {VQ} nor in {TEXT}")
    codes = vq_model.params_of(part(state, VQ), sizes[0])
    return codes | {"text": clip.text_params_of(part(state, TEXT), sizes[1])}


def state_of(params: Mapping[str, Any], sizes: Sizes) -> dict[str, np.ndarray]:
    """Map them back, byte for byte."""
    codes = vq_model.state_of({"params": params["params"]}, sizes[0])
    text = clip.text_state_of(params["text"], sizes[1])
    return {f"{VQ}.{name}": x for name, x in codes.items()} | {f"{TEXT}.{name}": x for name, x in text.items()}


def part(state: Mapping[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
    """The tensors of `VQ` or of `TEXT`, by their names there."""
    return {key.removeprefix(f"{name}."): x for key, x in state.items() if key.startswith(f"{name}.")}
