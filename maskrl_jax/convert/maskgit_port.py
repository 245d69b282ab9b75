"""Weights of the PyTorch reproduction of MaskGIT as the parameters of `MaskGITPort`."""

from collections.abc import Mapping

import numpy as np

from maskrl_jax.convert.keys import Keys


def params_of(state: Mapping[str, np.ndarray], depth: int) -> dict:
    """Map a state dict of the reference to the parameters of a `MaskGITPort` of `depth` blocks, float32.

    Strict: every key has one place and every place its key, with shapes that agree with each other. The reference
    stores Linear weights as [out, in] and the rows of in_proj as query, key, value, in the order of our qkv.

    Raises:
      ValueError: one line that names the key that is missing, left over or of the wrong shape.
    """
    keys = Keys(state)
    tokens = keys.take("tok_emb.weight", None, None)
    vocab, width = tokens.shape
    position = keys.take("pos_emb", 1, None, width)[0]
    params = {
        "tokens": tokens,
        "position": position,
        "bias": keys.take("bias", len(position), vocab),
        "first": _stage(keys, "first_layer", width),
        "entry": keys.linear("first_layer.6", width, width),
        "last": _stage(keys, "last_layer", width),
    }
    hidden = None  # the first block tells, the others must agree
    for i in range(depth):
        attention, mlp = (f"transformer.layers.{i}.{part}" for part in (0, 1))
        mlp_in = keys.linear(f"{mlp}.fn.net.0", width, hidden)
        hidden = len(mlp_in["bias"])
        params[f"blocks_{i}"] = {
            "norm_attention": keys.norm(f"{attention}.norm", width),
            "attention": {
                "qkv": keys.linear(f"{attention}.fn.mha.in_proj", width, 3 * width, separator="_"),
                "out": keys.linear(f"{attention}.fn.mha.out_proj", width, width),
            },
            "norm_mlp": keys.norm(f"{mlp}.norm", width),
            "mlp_in": mlp_in,
            "mlp_out": keys.linear(f"{mlp}.fn.net.3", hidden, width),
        }
    keys.finish()
    return {"params": params}


def _stage(keys: Keys, name: str, width: int) -> dict:
    """Read norm, Linear, (GELU,) norm: indices 0, 2, 4 of the reference, whose 1 is dropout and whose 3 the GELU."""
    return {
        "norm_in": keys.norm(f"{name}.0", width),
        "dense": keys.linear(f"{name}.2", width, width),
        "norm_out": keys.norm(f"{name}.4", width),
    }
