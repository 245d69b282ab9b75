"""Weights of google-research/maskgit's transformer as parameters of `GoogleMaskGIT`, and back.

specs/maskgit.md section 1. The original is Flax too: a parameter tree, nested or with keys joined by '/', that begins
with `params`. Strict as in `maskgit_port`.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from maskrl_jax.convert.keys import Keys, read, write
from maskrl_jax.models.google_maskgit import GoogleMaskGITConfig


def params_of(tree: Mapping[str, Any], config: GoogleMaskGITConfig) -> dict:
    """Map the original's parameter tree to the variables of `GoogleMaskGIT(config)`, float32.

    Queries, keys and values [D,heads,D/heads] become one kernel, blocks get a leading axis.
    """
    return read(_params, flatten_dict(dict(tree), sep="/"), config)


def state_of(params: Mapping, config: GoogleMaskGITConfig) -> dict[str, np.ndarray]:
    """Map variables of `GoogleMaskGIT(config)` to the original's tree, keys joined by '/': inverse of `params_of`."""
    return write(_params, params, config)


def _params(keys: Keys, config: GoogleMaskGITConfig) -> dict:
    c, d = config, config.width
    embed, head = "params/Embed_0", "params/MlmLayer_0"
    return {
        "tokens": keys.take(f"{embed}/word_embeddings/embedding", c.vocab, d),
        "position": keys.take(f"{embed}/position_embeddings/embedding", c.cond_length + c.num_tokens, d),
        "norm_in": _norm(keys, f"{embed}/embeddings_ln", d),
        "blocks": keys.stack([_block(keys, f"params/TransformerLayer_{i}", c) for i in range(c.depth)]),
        "dense": _dense(keys, f"{head}/mlm_dense", d, d),
        "norm_out": _norm(keys, f"{head}/mlm_ln", d),
        "bias": keys.take(f"{head}/mlm_bias/bias", c.vocab),
    }


def _block(keys: Keys, name: str, config: GoogleMaskGITConfig) -> dict:
    d, heads, hidden = config.width, config.heads, config.mlp_width
    attention, mlp = f"{name}/Attention_0", f"{name}/Mlp_0"
    own = [f"{attention}/self_attention/{part}" for part in ("query", "key", "value")]
    kernels = [keys.take(f"{part}/kernel", d, heads, d // heads).reshape(d, d) for part in own]
    biases = [keys.take(f"{part}/bias", heads, d // heads).reshape(d) for part in own]
    out = f"{attention}/self_attention/out"
    return {
        "attention": {
            "qkv": {"kernel": keys.join(kernels, axis=1), "bias": keys.join(biases)},
            "out": {
                "kernel": keys.take(f"{out}/kernel", heads, d // heads, d).reshape(d, d),
                "bias": keys.take(f"{out}/bias", d),
            },
        },
        "norm_attention": _norm(keys, f"{attention}/attention_output_ln", d),
        "mlp_in": _dense(keys, f"{mlp}/intermediate_output", d, hidden),
        "mlp_out": _dense(keys, f"{mlp}/layer_output", hidden, d),
        "norm_mlp": _norm(keys, f"{mlp}/layer_output_ln", d),
    }


def _dense(keys: Keys, name: str, inputs: int, outputs: int) -> dict:
    return {"kernel": keys.take(f"{name}/kernel", inputs, outputs), "bias": keys.take(f"{name}/bias", outputs)}


def _norm(keys: Keys, name: str, width: int) -> dict:
    return {part: keys.take(f"{name}/{part}", width) for part in ("scale", "bias")}
