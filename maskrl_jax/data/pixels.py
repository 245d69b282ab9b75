"""Pictures of files as bytes."""

import numpy as np
from PIL import Image


def rgb(image: Image.Image) -> np.ndarray:
    """Pixels uint8 [H,W,3]; ValueError where a channel has more than 8 bits, which Pillow would cut to white."""
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"its channels have more than 8 bits (mode {image.mode}); save it with 8")
    return np.asarray(image.convert("RGB"))
