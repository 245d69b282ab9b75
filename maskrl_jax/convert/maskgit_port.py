"""Weights of the PyTorch reproduction of MaskGIT as the parameters of `MaskGITPort`, and back."""

from collections.abc import Mapping

import numpy as np

from maskrl_jax.convert.keys import Keys, read, write
from maskrl_jax.models.maskgit_port import PortConfig


def params_of(state: Mapping[str, np.ndarray], config: PortConfig) -> dict:
    """Map a state dict of the reference to the variables of `MaskGITPort(config)`, float32.

    Strict: every key has one place and every place its key, with the shapes of the config. The reference
    stores Linear weights as [out, in] and the rows of in_proj as query, key, value, in the order of our qkv.

    Raises:
      ValueError: one line that names the key that is missing, left over or of the wrong shape.
    """
    return read(_params, state, config)


def state_of(params: Mapping, config: PortConfig) -> dict[str, np.ndarray]:
    """Map variables of `MaskGITPort(config)` to the reference's state dict, float32: the inverse of `params_of`."""
    return write(_params, params, config)


def _params(keys: Keys, config: PortConfig) -> dict:
    c, d = config, config.width
    length, vocab = c.num_tokens + c.cond_length, c.null_class + 1
    params = {
        "tokens": keys.take("tok_emb.weight", vocab, d),
        "position": keys.take("pos_emb", 1, length, d)[0],
        "bias": keys.take("bias", length, vocab),
        "first": _stage(keys, "first_layer", d),
        "entry": keys.linear("first_layer.6", d, d),
        "last": _stage(keys, "last_layer", d),
    }
    for i in range(c.depth):
        attention, mlp = (f"transformer.layers.{i}.{part}" for part in (0, 1))
        params[f"blocks_{i}"] = {
            "norm_attention": keys.norm(f"{attention}.norm", d),
            "attention": {
                "qkv": keys.linear(f"{attention}.fn.mha.in_proj", d, 3 * d, separator="_"),
                "out": keys.linear(f"{attention}.fn.mha.out_proj", d, d),
            },
            "norm_mlp": keys.norm(f"{mlp}.norm", d),
            "mlp_in": keys.linear(f"{mlp}.fn.net.0", d, c.mlp_width),
            "mlp_out": keys.linear(f"{mlp}.fn.net.3", c.mlp_width, d),
        }
    return params


def _stage(keys: Keys, name: str, width: int) -> dict:
    """Read norm, Linear, (GELU,) norm: indices 0, 2, 4 of the reference, whose 1 is dropout and whose 3 the GELU."""
    return {
        "norm_in": keys.norm(f"{name}.0", width),
        "dense": keys.linear(f"{name}.2", width, width),
        "norm_out": keys.norm(f"{name}.4", width),
    }
