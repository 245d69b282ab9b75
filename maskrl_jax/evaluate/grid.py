"""Tiles of small images, as the training loop logs them."""

import numpy as np

GAP = 2  # pixels between tiles


def image_grid(images: np.ndarray, columns: int, least_side: int = 64) -> np.ndarray:
    """Tile float images [n,H,W,3] in [0,1] into one uint8 [H',W',3], small ones enlarged by whole factors."""
    pixels = np.round(np.clip(images, 0, 1) * 255).astype(np.uint8)
    factor = max(1, -(-least_side // pixels.shape[1]))
    pixels = pixels.repeat(factor, axis=1).repeat(factor, axis=2)
    count, height, width, _ = pixels.shape
    rows = -(-count // columns)
    canvas = np.full((rows * (height + GAP) - GAP, columns * (width + GAP) - GAP, 3), 255, np.uint8)
    for place, tile in enumerate(pixels):
        top, left = place // columns * (height + GAP), place % columns * (width + GAP)
        canvas[top : top + height, left : left + width] = tile
    return canvas
