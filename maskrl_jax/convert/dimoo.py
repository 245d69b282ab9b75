"""Weights of Lumina-DiMOO as parameters of `Dimoo` and back, and straight from the published shards.

Strict: one line names every tensor that is missing, left over or misshapen. Linear weights arrive as [out, in] and
one layer at a time; ours are [in, out] with a leading axis of layers (specs/lumina_dimoo.md section 1).
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.traverse_util
import numpy as np

from maskrl_jax.convert import files
from maskrl_jax.convert.keys import refuse_misfits
from maskrl_jax.models.dimoo import DimooConfig

ROOT = "model.transformer"
SIZES = {
    "vocab_size": "embedding_size",
    "width": "d_model",
    "depth": "n_layers",
    "heads": "n_heads",
    "kv_heads": "n_kv_heads",
    "mlp_width": "mlp_hidden_size",
    "rope_theta": "rope_theta",
    "rms_eps": "rms_norm_eps",
}
# What the published code can do and `Dimoo` does not; a folder that leaves one out has it like this.
FIXED = {
    "activation_type": ("silu",),
    "block_type": ("llama",),
    "layer_norm_type": ("rms",),
    "rope": (True,),
    "weight_tying": (False,),
    "include_bias": (False,),
    "include_qkv_bias": (False, None),
    "bias_for_layer_norm": (False, None),
    "attention_layer_norm": (False,),
    "alibi": (False,),
    "scale_logits": (False,),
    "input_emb_norm": (False,),
    "multi_query_attention": (False, None),
}


class Place(NamedTuple):
    """Where a published tensor belongs."""

    path: tuple[str, ...]  # of the parameter
    layer: int | None  # row of a stacked parameter
    transposed: bool
    shape: tuple[int, ...]  # as published


def config_of(published: Mapping[str, Any], **options) -> DimooConfig:
    """Return the sizes that a published folder's config.json gives.

    `options` are further fields of `DimooConfig`, such as the dtype, and the codebook_size where it is another than
    the published 8192. Raises ValueError for a model of another kind.
    """
    for name, allowed in FIXED.items():
        if name in published and published[name] not in allowed:
            raise ValueError(f"{name} {published[name]!r} is not supported, only {allowed[0]!r}")
    given = dict(published)
    given["embedding_size"] = given.get("embedding_size") or given.get("vocab_size")
    if given.get("n_kv_heads") is None:
        given["n_kv_heads"] = given.get("n_heads")
    missing = [theirs for theirs in SIZES.values() if given.get(theirs) is None]
    if missing:
        raise ValueError(f"the model's config lacks {', '.join(missing)}")
    return DimooConfig(**{ours: given[theirs] for ours, theirs in SIZES.items()}, **options)


def settings_of(folder: Path | str) -> dict[str, Any]:
    """Sizes from the config.json of a published folder, as settings of a generator's stage."""
    found = config_of(files.json_object(Path(folder, "config.json")))
    return {name: getattr(found, name) for name in SIZES}


def params_of(state: Mapping[str, np.ndarray], config: DimooConfig, dtype: str | None = None) -> dict:
    """Map a state dict to the variables of `Dimoo(config)`, in the dtype of the state or the one asked for."""
    refuse_misfits({name: x.shape for name, x in state.items()}, _shapes(config))
    return _placed(state.items(), config, dtype)


def load(folder: Path | str, config: DimooConfig, dtype: str | None = None) -> dict:
    """The same from a folder of safetensors files: every tensor is read once, and no second copy is ever made.

    All names and shapes are checked against the headers before anything is allocated. What is held besides the result
    is one tensor, and pages of the files that the system may drop. Files that are missing or damaged are a UserError.
    """
    shards = files.shards(folder)
    refuse_misfits({name: shape for name, (_, shape) in files.shapes(shards).items()}, _shapes(config))
    return _placed(files.stream(shards), config, dtype)


def state_of(params: Mapping, config: DimooConfig) -> dict[str, np.ndarray]:
    """Map parameters back to the published names: the inverse of `params_of`, equal to the byte."""
    flat = flax.traverse_util.flatten_dict(params["params"])
    state = {}
    for name, place in places(config).items():
        leaf = np.asarray(flat[place.path])
        x = leaf if place.layer is None else leaf[place.layer]
        state[name] = np.ascontiguousarray(x.T if place.transposed else x)
    return state


def places(config: DimooConfig) -> dict[str, Place]:
    """Every published tensor's place, by name."""
    c = config
    inner, outer = c.kv_heads * c.head_width, (c.vocab_size, c.width)
    parts = {
        "attn_norm": ("norm", (c.width,)),
        "q_proj": ("query", (c.width, c.width)),
        "k_proj": ("key", (inner, c.width)),
        "v_proj": ("value", (inner, c.width)),
        "attn_out": ("out", (c.width, c.width)),
        "ff_norm": ("mlp_norm", (c.width,)),
        "ff_proj": ("mlp_gate", (c.mlp_width, c.width)),
        "up_proj": ("mlp_up", (c.mlp_width, c.width)),
        "ff_out": ("mlp_out", (c.width, c.mlp_width)),
    }
    found = {
        f"{ROOT}.wte.weight": Place(("tokens",), None, False, outer),
        f"{ROOT}.ln_f.weight": Place(("norm_out", "scale"), None, False, (c.width,)),
        f"{ROOT}.ff_out.weight": Place(("head",), None, False, outer),
    }
    for layer in range(c.depth):
        for theirs, (ours, shape) in parts.items():
            is_kernel = len(shape) == 2
            path = ("blocks", ours, "kernel" if is_kernel else "scale")
            found[f"{ROOT}.blocks.{layer}.{theirs}.weight"] = Place(path, layer, is_kernel, shape)
    return found


def _shapes(config: DimooConfig) -> dict[str, tuple[int, ...]]:
    return {name: place.shape for name, place in places(config).items()}


def _placed(tensors: Iterable[tuple[str, np.ndarray]], config: DimooConfig, dtype: str | None) -> dict:
    """Copy tensors, one at a time, into arrays that are allocated when the first of their parts arrives."""
    flat: dict[tuple[str, ...], np.ndarray] = {}
    where = places(config)
    for name, tensor in tensors:
        place = where[name]
        x = tensor.T if place.transposed else tensor
        if place.path not in flat:
            stacked = () if place.layer is None else (config.depth,)
            flat[place.path] = np.empty((*stacked, *x.shape), dtype or x.dtype)
        target = flat[place.path]
        if dtype is None and target.dtype != x.dtype:
            raise ValueError(f"{name} is {x.dtype}, other layers are {target.dtype}; ask for one dtype")
        target[... if place.layer is None else place.layer] = x
        del tensor, x  # before the next is read
    return {"params": flax.traverse_util.unflatten_dict(flat)}
