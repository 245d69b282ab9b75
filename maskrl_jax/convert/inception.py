"""Weights of the public FID checkpoint as parameters of ours; strict as in `maskgit_port`.

The state dict is that of `pt_inception-2015-12-05-6726825d.pth` (pytorch-fid) and, byte for byte, of
`weights-inception-2015-12-05-6726825d.pth` (torch-fidelity): torchvision's names over the TensorFlow graph's numbers.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from maskrl_jax.convert.keys import Keys
from maskrl_jax.models.inception import CLASSES, SIZE, InceptionV3

# SHA-256 of that file of 95,628,359 bytes. Its name carries the first 8 digits, and independent public repositories
# give all 64; the file was not downloaded here, so the digits are theirs.
PUBLISHED_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"

THEIRS = {
    "kernel": "conv.weight",
    "scale": "bn.weight",
    "bias": "bn.bias",
    "mean": "bn.running_mean",
    "variance": "bn.running_var",
}


def params_of(state: Mapping[str, np.ndarray]) -> dict:
    """Map a state dict to the variables of `InceptionV3`, float32; kernels arrive as [out,in,height,width].

    Training's counters (`num_batches_tracked`, absent from the published file) say nothing of inference and are passed
    over. The bias of the logits is checked and left: the Inception Score is taken without it.
    """
    keys = Keys({name: value for name, value in state.items() if not name.endswith(".num_batches_tracked")})
    image = jax.ShapeDtypeStruct((1, SIZE, SIZE, 3), jnp.float32)
    shapes = jax.eval_shape(InceptionV3().init, jax.random.key(0), image)["params"]
    head = {"kernel": keys.take("fc.weight", CLASSES, shapes.pop("fc")["kernel"].shape[0]).T}
    keys.take("fc.bias", CLASSES)
    params = jax.tree_util.tree_map_with_path(lambda path, leaf: _taken(keys, path, leaf.shape), shapes)
    keys.finish()
    return {"params": params | {"fc": head}}


def _taken(keys: Keys, path: tuple, shape: tuple[int, ...]) -> np.ndarray:
    *places, leaf = (part.key for part in path)
    name = ".".join((*places, THEIRS[leaf]))
    if leaf != "kernel":
        return keys.take(name, *shape)
    height, width, inputs, outputs = shape
    return keys.take(name, outputs, inputs, height, width).transpose(2, 3, 1, 0)
