"""A state dict of which every key is taken once: what was not asked for, or does not fit, is refused."""

from collections.abc import Mapping

import numpy as np


class Keys:
    """A state dict of which every key is taken once."""

    def __init__(self, state: Mapping[str, np.ndarray]):
        self.left = dict(state)

    def take(self, name: str, *shape: int | None) -> np.ndarray:
        """Return an array of this shape; None stands for any length."""
        if name not in self.left:
            raise ValueError(f"the state lacks {name}")
        array = np.asarray(self.left.pop(name), np.float32)
        fits = array.ndim == len(shape) and all(want in (None, n) for want, n in zip(shape, array.shape, strict=True))
        if not fits:
            wanted = ", ".join("*" if n is None else str(n) for n in shape)
            raise ValueError(f"{name} has shape {list(array.shape)}, not [{wanted}]")
        return array

    def linear(self, name: str, inputs: int, outputs: int | None, separator: str = ".") -> dict:
        """Return a Dense layer of a Linear one, whose weight is [out, in]."""
        kernel = self.take(f"{name}{separator}weight", outputs, inputs).T
        return {"kernel": kernel, "bias": self.take(f"{name}{separator}bias", kernel.shape[1])}

    def conv(self, name: str, inputs: int, outputs: int, size: int = 3) -> dict:
        """Return a convolution, whose weight is [out, in, height, width]."""
        kernel = self.take(f"{name}.weight", outputs, inputs, size, size)
        return {"kernel": kernel.transpose(2, 3, 1, 0), "bias": self.take(f"{name}.bias", outputs)}

    def norm(self, name: str, width: int) -> dict:
        """Return a layer norm."""
        return {"scale": self.take(f"{name}.weight", width), "bias": self.take(f"{name}.bias", width)}

    def finish(self) -> None:
        """Refuse keys that nobody took."""
        if self.left:
            first, *others = sorted(self.left)
            more = f" and {len(others)} other keys" if others else ""
            raise ValueError(f"the state holds {first}{more} without a place")
