"""The embedded set `digits`: 1,797 real handwritten digits that scikit-learn carries, no download."""

import functools

import numpy as np
from PIL import Image

TRAIN_SIZE = 1_500
NUM_CLASSES = 10
WHITE = 16  # the largest value that a pixel of the source has


@functools.lru_cache(maxsize=4)
def load(split: str, image_size: int) -> tuple[dict[str, np.ndarray], list[str]]:
    """Return the columns of a split and the class names.

    Images are uint8 [n, image_size, image_size, 3], enlarged from 8 x 8 by bicubic interpolation; a fixed
    shuffle makes the split, because neighbours in the source come from one writer.
    """
    from sklearn.datasets import load_digits  # a slow import that no other set needs

    source = load_digits()
    order = np.random.default_rng(0).permutation(len(source.target))
    chosen = order[:TRAIN_SIZE] if split == "train" else order[TRAIN_SIZE:]
    images = np.stack([_enlarge(source.images[i], image_size) for i in chosen])
    label = source.target[chosen].astype(np.int32)
    for column in (images, label):
        column.setflags(write=False)  # shared by all who open the set
    return {"image": images, "cond": label, "label": label}, [str(i) for i in range(NUM_CLASSES)]


def _enlarge(image: np.ndarray, size: int) -> np.ndarray:
    small = Image.fromarray(np.round(image * (255 / WHITE)).astype(np.uint8))
    return np.repeat(np.asarray(small.resize((size, size), Image.Resampling.BICUBIC))[..., None], 3, axis=-1)
