"""The InceptionV3 of published Frechet Inception Distances: the TensorFlow graph of 2015-12-05, for inference only.

It differs from the network of the paper (Szegedy et al. 2016) and of torchvision: 1008 classes, no auxiliary head,
average pools that leave the padding out of the mean, and a max pool in the last block. Read from the public ports
(torch-fidelity, pytorch-fid), against which the tests compare it with random weights; the published weights themselves
have not been run here. There are no sizes to choose: another network gives other numbers.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

Array = jax.Array
SIZE = 299  # pixels a side
POOL, CLASSES = 2048, 1008
SPATIAL = 7  # channels of the 17 x 17 map whose distance is sFID (Nash et al. 2021)
SPATIAL_SIZE = 17 * 17 * SPATIAL
EPSILON = 1e-3
FORK = "fork"  # a 1x3 and a 3x1 convolution side by side

# A branch is a chain of (features, kernel size); "branch_pool" sees the pooled input.
Branches = dict[str, tuple[tuple[int, tuple[int, int] | str], ...]]


class Features(NamedTuple):
    """What the network says of B images, float32."""

    pool: Array  # [B,2048]: FID, precision and recall
    spatial: Array  # [B,2023]: sFID; 17 rows x 17 columns x 7 channels
    logits: Array  # [B,1008] without their bias: Inception Score


def _wide(pooled: int) -> Branches:
    """35 x 35, "InceptionA"."""
    return {
        "branch1x1": ((64, (1, 1)),),
        "branch5x5": ((48, (1, 1)), (64, (5, 5))),
        "branch3x3dbl": ((64, (1, 1)), (96, (3, 3)), (96, (3, 3))),
        "branch_pool": ((pooled, (1, 1)),),
    }


def _factorised(inner: int) -> Branches:
    """17 x 17, "InceptionC"."""
    return {
        "branch1x1": ((192, (1, 1)),),
        "branch7x7": ((inner, (1, 1)), (inner, (1, 7)), (192, (7, 1))),
        "branch7x7dbl": ((inner, (1, 1)), (inner, (7, 1)), (inner, (1, 7)), (inner, (7, 1)), (192, (1, 7))),
        "branch_pool": ((192, (1, 1)),),
    }


# "InceptionB" and "InceptionD", from 35 x 35 to 17 x 17 and from there to 8 x 8; "InceptionE" of 8 x 8.
HALVE_35: Branches = {
    "branch3x3": ((384, (3, 3)),),
    "branch3x3dbl": ((64, (1, 1)), (96, (3, 3)), (96, (3, 3))),
}
HALVE_17: Branches = {
    "branch3x3": ((192, (1, 1)), (320, (3, 3))),
    "branch7x7x3": ((192, (1, 1)), (192, (1, 7)), (192, (7, 1)), (192, (3, 3))),
}
FORKED: Branches = {
    "branch1x1": ((320, (1, 1)),),
    "branch3x3": ((384, (1, 1)), (384, FORK)),
    "branch3x3dbl": ((448, (1, 1)), (384, (3, 3)), (384, FORK)),
    "branch_pool": ((192, (1, 1)),),
}
# The names are those of the published state dict.
BLOCKS = {
    "Mixed_5b": (_wide(32), "average"),
    "Mixed_5c": (_wide(64), "average"),
    "Mixed_5d": (_wide(64), "average"),
    "Mixed_6a": (HALVE_35, "halve"),
    "Mixed_6b": (_factorised(128), "average"),
    "Mixed_6c": (_factorised(160), "average"),
    "Mixed_6d": (_factorised(160), "average"),
    "Mixed_6e": (_factorised(192), "average"),
    "Mixed_7a": (HALVE_17, "halve"),
    "Mixed_7b": (FORKED, "average"),
    "Mixed_7c": (FORKED, "max"),
}


def _halved(x: Array) -> Array:
    return nn.max_pool(x, (3, 3), (2, 2), "VALID")


def pooled(x: Array, kind: str) -> Array:
    """Pool 3 x 3 cells of [B,H,W,C] at every cell; what lies outside the map counts in neither pool."""
    if kind == "max":
        return nn.max_pool(x, (3, 3), (1, 1), "SAME")
    return nn.avg_pool(x, (3, 3), (1, 1), "SAME", count_include_pad=False)


class ConvNorm(nn.Module):
    """Convolution without bias, batch norm by stored moments, relu; all in float32 whatever the device's default."""

    features: int
    size: tuple[int, int] = (1, 1)
    stride: int = 1
    padding: str = "SAME"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        kernel = self.param(
            "kernel", nn.initializers.he_normal(), (*self.size, x.shape[-1], self.features), jnp.float32
        )
        zeros, ones = nn.initializers.zeros, nn.initializers.ones
        starts = {"scale": ones, "bias": zeros, "mean": zeros, "variance": ones}
        scale, bias, mean, variance = (self.param(name, start, (self.features,)) for name, start in starts.items())
        x = jax.lax.conv_general_dilated(
            x,
            kernel,
            (self.stride, self.stride),
            self.padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision=jax.lax.Precision.HIGHEST,
        )
        gain = scale * jax.lax.rsqrt(variance + EPSILON)
        return nn.relu(x * gain[None, None, None] + (bias - mean * gain)[None, None, None])


class Mixed(nn.Module):
    """Branches over one input, side by side.

    pool: "average" or "max", of the branch that pools; "halve": the last convolution of each branch takes every second
    cell, and the halved input itself is the last branch.
    """

    branches: Branches
    pool: str

    @nn.compact
    def __call__(self, x: Array) -> Array:
        out = [
            self._chain(name, convs, pooled(x, self.pool) if name == "branch_pool" else x)
            for name, convs in self.branches.items()
        ]
        return jnp.concatenate(out + [_halved(x)] if self.pool == "halve" else out, axis=-1)

    def _chain(self, name, convs, x):
        for index, (features, size) in enumerate(convs, 1):
            last = index == len(convs)
            name_here = name if len(convs) == 1 else f"{name}_{index}"
            if size == FORK:
                sides = (
                    ConvNorm(features, (1, 3), name=f"{name_here}a"),
                    ConvNorm(features, (3, 1), name=f"{name_here}b"),
                )
                x = jnp.concatenate([side(x) for side in sides], axis=-1)
            elif last and self.pool == "halve":
                x = ConvNorm(features, size, 2, "VALID", name=name_here)(x)
            else:
                x = ConvNorm(features, size, name=name_here)(x)
        return x


class InceptionV3(nn.Module):
    """Images [B,299,299,3] of values 0..255, resized already, to Features; a ValueError for another size."""

    @nn.compact
    def __call__(self, images_BHWC: Array) -> Features:
        if images_BHWC.shape[1:] != (SIZE, SIZE, 3):
            raise ValueError(f"images must be [B,{SIZE},{SIZE},3], not {list(images_BHWC.shape)}")
        x = (images_BHWC.astype(jnp.float32) - 128) / 128
        x = ConvNorm(32, (3, 3), 2, "VALID", name="Conv2d_1a_3x3")(x)
        x = ConvNorm(32, (3, 3), 1, "VALID", name="Conv2d_2a_3x3")(x)
        x = _halved(ConvNorm(64, (3, 3), name="Conv2d_2b_3x3")(x))
        x = ConvNorm(80, name="Conv2d_3b_1x1")(x)
        x = _halved(ConvNorm(192, (3, 3), 1, "VALID", name="Conv2d_4a_3x3")(x))
        for name, (branches, pool) in BLOCKS.items():
            x = Mixed(branches, pool, name=name)(x)
            if name == "Mixed_6d":  # its first branch is the graph's mixed_6/conv, after the relu
                spatial = x[..., :SPATIAL].reshape(len(x), -1)
        pool = x.mean((1, 2))
        # A Dense layer without bias: the score leaves it out.
        logits = nn.Dense(CLASSES, use_bias=False, precision=jax.lax.Precision.HIGHEST, name="fc")(pool)
        return Features(pool, spatial, logits)
