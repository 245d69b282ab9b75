"""Numbers that are the same everywhere: an integer hash in place of a random generator."""

import jax
import jax.numpy as jnp
import numpy as np

from maskrl_jax.convert.inception import THEIRS
from maskrl_jax.models.inception import CLASSES, POOL, SIZE, InceptionV3


def hashed(shape, seed):
    """Return float32 numbers of this shape, even in [-1, 1), all of them set by the seed."""
    x = np.arange(int(np.prod(shape)), dtype=np.uint32) + np.uint32(seed * 0x9E3779B1 % 2**32)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = (x ^ (x >> np.uint32(shift))) * np.uint32(factor)
    x ^= x >> np.uint32(16)
    return (x / 2.0**31 - 1).astype(np.float32).reshape(shape)


def images(count, height, width, seed=0):
    """Return bytes [count, height, width, 3]."""
    return ((hashed((count, height, width, 3), seed) + 1) * 128).astype(np.uint8)


def inception_shapes():
    """Return name -> shape of the published state dict, in torch's order of axes."""
    image = jax.ShapeDtypeStruct((1, SIZE, SIZE, 3), jnp.float32)
    tree = dict(jax.eval_shape(InceptionV3().init, jax.random.key(0), image)["params"])
    del tree["fc"]
    shapes = {"fc.weight": (CLASSES, POOL), "fc.bias": (CLASSES,)}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        *places, name = (part.key for part in path)
        order = (3, 2, 0, 1) if name == "kernel" else (0,)
        shapes[".".join((*places, THEIRS[name]))] = tuple(leaf.shape[axis] for axis in order)
    return dict(sorted(shapes.items()))


def inception_state():
    """Return a state dict whose activations neither vanish nor explode, with batch norms away from the identity."""
    state = {}
    for seed, (name, shape) in enumerate(inception_shapes().items()):
        values = hashed(shape, seed)
        if name.endswith((".conv.weight", "fc.weight")):
            values *= np.float32((6 / np.prod(shape[1:])) ** 0.5)
        elif name.endswith("running_var"):
            values = 1 + values / 2
        elif name.endswith("bn.weight"):
            values = 1 + values / 4
        else:
            values /= 8
        state[name] = values
    return state
