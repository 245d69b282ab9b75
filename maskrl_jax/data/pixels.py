"""Pictures of files as bytes."""

import numpy as np
from PIL import Image


def rgb(image: Image.Image) -> np.ndarray:
    """Pixels uint8 [H,W,3]; ValueError where a channel has more than 8 bits, which Pillow would cut to white."""
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"its channels have more than 8 bits (mode {image.mode}); save it with 8")
    return np.asarray(image.convert("RGB"))


def square(image: Image.Image, size: int) -> np.ndarray:
    """Middle square, resized by Pillow's bicubic filter, which averages where it shrinks: uint8 [size,size,3].

    ValueError as `rgb`.
    """
    side = min(image.size)
    left, top = ((length - side) // 2 for length in image.size)
    middle = image.crop((left, top, left + side, top + side))  # first: resize(box=...) reads beyond the box
    return np.asarray(Image.fromarray(rgb(middle)).resize((size, size), Image.Resampling.BICUBIC))
