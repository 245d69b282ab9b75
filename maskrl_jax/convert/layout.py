"""Where the parameters of a model lie in a published state dict, told once and read in both directions.

A layout is a tree like the parameters with a `Place` or a `Stack` in the place of every array.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from maskrl_jax.convert.keys import Keys


@dataclasses.dataclass(frozen=True)
class Place:
    """A parameter as tensors of a state: equal ones, joined along their first axis (the outputs of a layer)."""

    names: tuple[str, ...]
    shape: tuple[int, ...]  # of each tensor
    order: tuple[int, ...]  # axes of the tensors in ours
    ours: tuple[int, ...]  # our shape, which may join neighbouring axes

    def read(self, keys: Keys) -> np.ndarray:
        """Take the tensors; float32."""
        tensors = [keys.take(name, *self.shape) for name in self.names]
        whole = np.concatenate(tensors) if len(tensors) > 1 else tensors[0]
        return whole.transpose(self.order).reshape(self.ours)

    def write(self, array: np.ndarray) -> dict[str, np.ndarray]:
        """The tensors of a parameter, contiguous."""
        joined = (len(self.names) * self.shape[0], *self.shape[1:])
        whole = array.reshape([joined[axis] for axis in self.order]).transpose(np.argsort(self.order))
        return dict(zip(self.names, map(np.ascontiguousarray, np.split(whole, len(self.names))), strict=True))


@dataclasses.dataclass(frozen=True)
class Stack:
    """A parameter with a leading axis of blocks, each with a place of its own."""

    places: tuple[Place, ...]

    @property
    def ours(self) -> tuple[int, ...]:
        return (len(self.places), *self.places[0].ours)

    def read(self, keys: Keys) -> np.ndarray:
        return np.stack([place.read(keys) for place in self.places])

    def write(self, array: np.ndarray) -> dict[str, np.ndarray]:
        parts = [place.write(x) for place, x in zip(self.places, array, strict=True)]
        return {name: x for part in parts for name, x in part.items()}


def params_of(state: Mapping[str, np.ndarray], layout: dict) -> dict:
    """Read {"params": ...} float32 from a state dict of which every key has one place.

    Raises:
      ValueError: one line that names the key that is missing, left over or of the wrong shape.
    """
    keys = Keys(state)
    params = jax.tree.map(lambda place: place.read(keys), layout)
    keys.finish()
    return {"params": params}


def state_of(params: Any, layout: dict) -> dict[str, np.ndarray]:
    """Write {"params": ...} as a state dict: the inverse of `params_of`, byte for byte.

    Raises:
      ValueError: one line that names the parameter that is missing, left over or of the wrong shape.
    """
    places, given = (_by_path(tree) for tree in (layout, params["params"]))
    for path in sorted(places.keys() ^ given.keys()):
        raise ValueError(f"the parameters {'lack' if path in places else 'hold'} {path}")
    state = {}
    for path, place in places.items():
        array = np.asarray(given[path])
        if array.shape != place.ours:
            raise ValueError(f"parameter {path} has shape {list(array.shape)}, not {list(place.ours)}")
        state |= place.write(array)
    return state


def stacked(layouts: list[dict]) -> dict:
    """The layout of blocks that run in a loop."""
    return jax.tree.map(lambda *places: Stack(places), *layouts)


def table(name: str, *shape: int) -> Place:
    """A tensor as it is."""
    return Place((name,), shape, tuple(range(len(shape))), shape)


def linear(name: str, inputs: int, outputs: int, bias: bool = True) -> dict[str, Place]:
    """A Linear layer, weight [out,in], as a Dense one."""
    return joined((name,), inputs, outputs, bias)


def joined(names: tuple[str, ...], inputs: int, outputs: int, bias: bool = True) -> dict[str, Place]:
    """Linear layers of one input and equal outputs as one Dense layer."""
    weights, biases = (tuple(f"{name}.{part}" for name in names) for part in ("weight", "bias"))
    whole = len(names) * outputs
    layer = {"kernel": Place(weights, (outputs, inputs), (1, 0), (inputs, whole))}
    return layer | {"bias": Place(biases, (outputs,), (0,), (whole,))} if bias else layer


def conv(name: str, inputs: int, outputs: int, size: int = 3) -> dict[str, Place]:
    """A convolution with a bias, weight [out,in,height,width]."""
    kernel = Place((f"{name}.weight",), (outputs, inputs, size, size), (2, 3, 1, 0), (size, size, inputs, outputs))
    return {"kernel": kernel, "bias": table(f"{name}.bias", outputs)}


def patch_conv(name: str, inputs: int, outputs: int, size: int) -> dict[str, Place]:
    """A convolution without a bias whose stride is its size, as a Dense layer over flattened patches."""
    shape, ours = (outputs, inputs, size, size), (size * size * inputs, outputs)
    return {"kernel": Place((f"{name}.weight",), shape, (2, 3, 1, 0), ours)}


def transposed_patch_conv(name: str, inputs: int, outputs: int, size: int) -> dict[str, Place]:
    """A transposed one, weight [in,out,height,width], as a Dense layer that makes flattened patches."""
    shape, ours = (inputs, outputs, size, size), (inputs, size * size * outputs)
    return {"kernel": Place((f"{name}.weight",), shape, (0, 2, 3, 1), ours)}


def scale(name: str, width: int) -> dict[str, Place]:
    """A norm with a scale alone."""
    return {"scale": table(f"{name}.weight", width)}


def norm(name: str, width: int) -> dict[str, Place]:
    """A norm with scale and bias."""
    return scale(name, width) | {"bias": table(f"{name}.bias", width)}


def _by_path(tree: Any) -> dict[str, Any]:
    return {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in jax.tree.leaves_with_path(tree)}
