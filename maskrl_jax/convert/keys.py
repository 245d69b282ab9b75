"""State dicts of others as parameters of ours, and back, from one description of what goes where.

A description is a function (Keys, ...) -> parameters that asks for every array of the state dict by name and shape.
`read` runs it on a state dict; `write` runs it on places that are still empty and fills them from the parameters, so
that the two directions cannot disagree. In a description arrays may be transposed, indexed and, as they come,
reshaped (all are views); `Keys.stack`, `join`, `reshape` and `tied` are there for what is no view.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np


def read(describe: Callable[..., dict], state: Mapping[str, np.ndarray], *sizes: Any) -> dict:
    """Return {"params": describe(keys, *sizes)}, float32, of a state dict of which every key is taken once.

    Raises:
      ValueError: one line that names the key that is missing, left over or of the wrong shape.
    """
    keys = Keys(state)
    params = describe(keys, *sizes)
    keys.finish()
    return {"params": params}


def write(describe: Callable[..., dict], params: Mapping, *sizes: Any) -> dict[str, np.ndarray]:
    """Return the state dict, float32, of which `read` makes these {"params": ...}.

    Raises:
      ValueError: one line that names the parameter that is missing, left over or of the wrong shape.
    """
    places = _Places()
    places.fill({"params": describe(places, *sizes)}, params, "")
    return places.state


class Keys:
    """A state dict of which every key is taken once: what was not asked for, or does not fit, is refused."""

    def __init__(self, state: Mapping[str, np.ndarray]):
        self.left = dict(state)

    def take(self, name: str, *shape: int | None) -> np.ndarray:
        """Return an array of this shape; None stands for any length (not where `write` is wanted)."""
        if name not in self.left:
            raise ValueError(f"the state lacks {name}")
        found = np.asarray(self.left.pop(name))
        if found.dtype.kind in "biuOSU":
            raise ValueError(f"{name} holds {found.dtype}, not floating-point numbers")
        array = np.asarray(found, np.float32)
        if not np.isfinite(array).all():
            raise ValueError(f"{name} holds numbers that are not finite")
        fits = array.ndim == len(shape) and all(want in (None, n) for want, n in zip(shape, array.shape, strict=True))
        if not fits:
            wanted = ", ".join("*" if n is None else str(n) for n in shape)
            raise ValueError(f"{name} has shape {list(array.shape)}, not [{wanted}]")
        return array

    def tied(self, names: Sequence[str], *shape: int) -> np.ndarray:
        """Return an array that the state holds under several names."""
        first, *others = (self.take(name, *shape) for name in names)
        for name, array in zip(names[1:], others, strict=True):
            if not np.array_equal(array, first):
                raise ValueError(f"{name} is not the same as {names[0]}")
        return first

    def stack(self, trees: Sequence[Any]) -> Any:
        """Return trees of one structure as one, whose arrays have a leading axis of trees: for `nn.scan`."""
        return jax.tree.map(lambda *arrays: np.stack(arrays), *trees)

    def join(self, arrays: Sequence[np.ndarray], axis: int = 0) -> np.ndarray:
        """Return arrays one after the other."""
        return np.concatenate(arrays, axis)

    def reshape(self, array: np.ndarray, *shape: int) -> np.ndarray:
        """Return an array, transposed or not, in another shape."""
        return array.reshape(shape)

    def linear(
        self, name: str, inputs: int, outputs: int | None, separator: str = ".", bias: bool = True
    ) -> dict[str, np.ndarray]:
        """Return a Dense layer of a Linear one, whose weight is [out, in]."""
        kernel = self.take(f"{name}{separator}weight", outputs, inputs).T
        layer = {"kernel": kernel}
        return layer | {"bias": self.take(f"{name}{separator}bias", kernel.shape[1])} if bias else layer

    def linears(self, names: Sequence[str], inputs: int, outputs: int) -> dict[str, np.ndarray]:
        """Return Linear layers of one input, each of so many outputs, as one Dense layer."""
        layers = [self.linear(name, inputs, outputs) for name in names]
        return {part: self.join([layer[part] for layer in layers], axis=-1) for part in ("kernel", "bias")}

    def conv(self, name: str, inputs: int, outputs: int, size: int = 3) -> dict[str, np.ndarray]:
        """Return a convolution, whose weight is [out, in, height, width]."""
        kernel = self.take(f"{name}.weight", outputs, inputs, size, size)
        return {"kernel": kernel.transpose(2, 3, 1, 0), "bias": self.take(f"{name}.bias", outputs)}

    def patch_conv(self, name: str, inputs: int, outputs: int, size: int = 1) -> dict[str, np.ndarray]:
        """Return a convolution without a bias whose stride is its size, as a Dense layer of patches [row, column, in]."""
        kernel = self.take(f"{name}.weight", outputs, inputs, size, size).transpose(2, 3, 1, 0)
        return {"kernel": self.reshape(kernel, size * size * inputs, outputs)}

    def transposed_patch_conv(self, name: str, inputs: int, outputs: int, size: int) -> dict[str, np.ndarray]:
        """Return a transposed one, weight [in, out, height, width], as a Dense layer to patches [row, column, out]."""
        kernel = self.take(f"{name}.weight", inputs, outputs, size, size).transpose(0, 2, 3, 1)
        return {"kernel": self.reshape(kernel, inputs, size * size * outputs)}

    def scale(self, name: str, width: int) -> dict[str, np.ndarray]:
        """Return a norm with a scale alone."""
        return {"scale": self.take(f"{name}.weight", width)}

    def norm(self, name: str, width: int) -> dict[str, np.ndarray]:
        """Return a norm with scale and bias."""
        return self.scale(name, width) | {"bias": self.take(f"{name}.bias", width)}

    def finish(self) -> None:
        """Refuse keys that nobody took."""
        if self.left:
            first, *others = sorted(self.left)
            more = f" and {len(others)} other keys" if others else ""
            raise ValueError(f"the state holds {first}{more} without a place")


class _Places(Keys):
    """Empty arrays for a state dict to be: what is filled in through the views that the calls return is in `state`."""

    def __init__(self):
        super().__init__({})
        self.state = {}

    def take(self, name: str, *shape: int) -> np.ndarray:
        if name in self.state:
            raise ValueError(f"{name} is taken twice")
        self.state[name] = np.empty(shape, np.float32)
        return self.state[name]

    def tied(self, names, *shape):
        return _Parts([self.take(name, *shape) for name in names], shape, lambda array: [array] * len(names))

    def stack(self, trees):
        return jax.tree.map(lambda *places: _Parts(places, (len(places), *places[0].shape), list), *trees)

    def join(self, arrays, axis=0):
        lengths = [place.shape[axis] for place in arrays]
        shape = list(arrays[0].shape)
        shape[axis] = sum(lengths)
        return _Parts(arrays, tuple(shape), lambda array: np.split(array, np.cumsum(lengths)[:-1], axis))

    def reshape(self, array, *shape):
        return _Parts([array], shape, lambda whole: [whole.reshape(array.shape)])

    def fill(self, places: Any, values: Any, path: str) -> None:
        """Write parameters into the places of a description, both nested alike."""
        if isinstance(places, Mapping):
            for name in sorted(places.keys() ^ values.keys()):
                lost = f"lack {path}{name}" if name in places else f"hold {path}{name} without a place"
                raise ValueError(f"the parameters {lost}")
            for name, place in places.items():
                self.fill(place, values[name], f"{path}{name}/")
            return
        array = np.asarray(values, np.float32)
        if array.shape != tuple(places.shape):
            raise ValueError(f"{path[:-1]} has shape {list(array.shape)}, not {list(places.shape)}")
        if isinstance(places, _Parts):
            for place, part in zip(places.places, places.cut(array), strict=True):
                self.fill(place, part, path)
            return
        if not any(_root(places) is array for array in self.state.values()):
            raise TypeError(f"the description of {path[:-1]} makes a copy; only views lead back to the state")
        places[...] = array


def _root(view: np.ndarray) -> np.ndarray:
    """The array that a view looks at."""
    return view if view.base is None else _root(view.base)


@dataclasses.dataclass(frozen=True)
class _Parts:
    """A parameter that is no view of one place: `cut` gives each of its places its own part."""

    places: Sequence[Any]
    shape: tuple[int, ...]
    cut: Callable[[np.ndarray], Sequence[np.ndarray]]


def refuse_misfits(found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]) -> None:
    """Compare the shapes of a whole state with those wanted; one ValueError names all that differs.

    For states too large to be copied; at most eight names of each kind are written out.
    """
    lacks = [name for name in wanted if name not in found]
    extra = sorted(name for name in found if name not in wanted)
    others = [
        f"{name} of shape {list(found[name])}, not {list(shape)}"
        for name, shape in wanted.items()
        if name in found and tuple(found[name]) != tuple(shape)
    ]
    told = {"lacks {}": lacks, "holds {} without a place": extra, "holds {}": others}
    problems = [phrase.format(_listed(names)) for phrase, names in told.items() if names]
    if problems:
        raise ValueError(f"the state {'; it '.join(problems)}")


def _listed(names: list[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
