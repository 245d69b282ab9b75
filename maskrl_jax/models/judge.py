"""The judge: a small CNN that reads an image's content; its features also serve the Frechet distance."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from maskrl_jax.models.layers import Conv3
from maskrl_jax.models.vqgan import to_patches

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class JudgeConfig:
    """Static sizes. `cells` judges classify every cell of a grid, `class` judges the whole image."""

    kind: str = "cells"  # "cells" | "class"
    num_classes: int = 17  # cells: 0 = no object centre; class: number of classes
    patch: int = 4
    width: int = 64

    def __post_init__(self):
        if self.kind not in ("cells", "class"):
            raise ValueError(f"judge kind {self.kind!r} is not one of cells, class")
        for name in ("num_classes", "patch", "width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} must be at least 1")


class Judge(nn.Module):
    """Patch embedding, three 3x3 layers, and a map head or a pooled head.

    Pooling (max and mean) feeds the image-level outputs: flattening instead does not generalise on
    this task (measured).
    """

    config: JudgeConfig

    @nn.compact
    def __call__(self, images_BHWC: Array) -> dict[str, Array]:
        """Images [B,H,W,3] in [0,1] -> features [B,2D] and logits.

        cells: "cells" [B,S,S,C], "mixed" [B,S,S] (is this neighbourhood stitched from two images?),
        "tone" [B] (background). class: "class" [B,C].
        """
        c = self.config
        x = nn.gelu(nn.Dense(c.width)(to_patches(images_BHWC * 2 - 1, c.patch)))
        x = nn.gelu(Conv3(c.width)(x))
        x = x + nn.gelu(Conv3(c.width)(x))
        x = x + nn.gelu(Conv3(c.width)(x))
        features = jnp.concatenate([x.max((1, 2)), x.mean((1, 2))], axis=-1)
        if c.kind == "class":
            return {"features": features, "class": nn.Dense(c.num_classes)(features)}
        return {
            "features": features,
            "cells": nn.Dense(c.num_classes)(x),
            "mixed": nn.Dense(1)(x)[..., 0],
            "tone": nn.Dense(1)(features)[:, 0],
        }
