"""Weights of google-research/maskgit's VQGAN as parameters of `GoogleVQGAN`, and back (specs/maskgit.md section 2).

The original is Flax too: a parameter tree, nested or with keys joined by '/', that begins with `params`. Kernels are as
ours; layers of a kind are numbered in the order of their calls. Strict as in `maskgit_port`.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from maskrl_jax.convert.keys import Keys, read, write
from maskrl_jax.models.google_vqgan import GoogleVQGANConfig


def params_of(tree: Mapping[str, Any], config: GoogleVQGANConfig) -> dict:
    """Map the original's parameter tree to the variables of `GoogleVQGAN(config)`, float32."""
    return read(_params, flatten_dict(dict(tree), sep="/"), config)


def state_of(params: Mapping, config: GoogleVQGANConfig) -> dict[str, np.ndarray]:
    """Map variables of `GoogleVQGAN(config)` to the original's tree, keys joined by '/': the inverse of `params_of`."""
    return write(_params, params, config)


def _params(keys: Keys, config: GoogleVQGANConfig) -> dict:
    return {
        "encoder": _encoder(keys, config),
        "decoder": _decoder(keys, config),
        "codebook": keys.take("params/quantizer/codebook", config.codebook_size, config.code_width),
    }


def _encoder(keys: Keys, config: GoogleVQGANConfig) -> dict:
    c, stem, levels = config, "params/encoder", len(config.multipliers)
    params = {"conv_in": _conv(keys, f"{stem}/Conv_0", 3, c.width, bias=False)}
    wide, number, convs = c.width, 0, 1
    for level, multiplier in enumerate([*c.multipliers, c.multipliers[-1]]):
        ours = f"level_{level}_block" if level < levels else "last_block"
        for index in range(c.blocks):
            params[f"{ours}_{index}"] = _block(keys, f"{stem}/ResBlock_{number}", wide, c.width * multiplier)
            wide, number = c.width * multiplier, number + 1
        if c.conv_downsample and level < levels - 1:
            params[f"level_{level}_down"] = _conv(keys, f"{stem}/Conv_{convs}", wide, wide, 4)
            convs += 1
    params["norm_out"] = _norm(keys, f"{stem}/GroupNorm_0", wide)
    params["conv_out"] = _conv(keys, f"{stem}/Conv_{convs}", wide, c.code_width, 1)
    return params


def _decoder(keys: Keys, config: GoogleVQGANConfig) -> dict:
    c, stem, levels = config, "params/decoder", len(config.multipliers)
    wide, number, convs = c.width * c.multipliers[-1], 0, 1
    params = {"conv_in": _conv(keys, f"{stem}/Conv_0", c.code_width, wide)}
    for level, multiplier in reversed(list(enumerate([*c.multipliers, c.multipliers[-1]]))):
        ours = f"level_{level}_block" if level < levels else "first_block"
        for index in range(c.blocks):
            params[f"{ours}_{index}"] = _block(keys, f"{stem}/ResBlock_{number}", wide, c.width * multiplier)
            wide, number = c.width * multiplier, number + 1
        if 0 < level < levels:
            params[f"level_{level}_up"] = _conv(keys, f"{stem}/Conv_{convs}", wide, wide)
            convs += 1
    params["norm_out"] = _norm(keys, f"{stem}/GroupNorm_0", wide)
    params["conv_out"] = _conv(keys, f"{stem}/Conv_{convs}", wide, 3)
    return params


def _block(keys: Keys, name: str, inputs: int, outputs: int) -> dict:
    block = {
        "norm1": _norm(keys, f"{name}/GroupNorm_0", inputs),
        "conv1": _conv(keys, f"{name}/Conv_0", inputs, outputs, bias=False),
        "norm2": _norm(keys, f"{name}/GroupNorm_1", outputs),
        "conv2": _conv(keys, f"{name}/Conv_1", outputs, outputs, bias=False),
    }
    if inputs != outputs:
        block["shortcut"] = _conv(keys, f"{name}/Conv_2", outputs, outputs, 1, bias=False)
    return block


def _conv(keys: Keys, name: str, inputs: int, outputs: int, size: int = 3, bias: bool = True) -> dict:
    kernel = {"kernel": keys.take(f"{name}/kernel", size, size, inputs, outputs)}
    return kernel | ({"bias": keys.take(f"{name}/bias", outputs)} if bias else {})


def _norm(keys: Keys, name: str, width: int) -> dict:
    return {part: keys.take(f"{name}/{part}", width) for part in ("scale", "bias")}
