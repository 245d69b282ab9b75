"""Weights of Halton-MaskGIT's transformer as parameters of `HaltonMaskGIT`, and back.

Strict as in `maskgit_port`: a ValueError of one line names the key that is missing, left over or misshapen.
"""

from collections.abc import Mapping

import numpy as np

from maskrl_jax.convert.keys import Keys, read, write
from maskrl_jax.models.halton import HaltonConfig


def params_of(state: Mapping[str, np.ndarray], config: HaltonConfig) -> dict:
    """Map a state dict of the reference to the variables of `HaltonMaskGIT(config)`, float32.

    Linear weights arrive as [out, in]. The state holds the tied table under two names, which must agree.
    """
    return read(_params, state, config)


def state_of(params: Mapping, config: HaltonConfig) -> dict[str, np.ndarray]:
    """Map variables of `HaltonMaskGIT(config)` to the reference's state dict, float32: the inverse of `params_of`."""
    return write(_params, params, config)


def _params(keys: Keys, config: HaltonConfig) -> dict:
    c, d = config, config.width
    params = {
        "tokens": keys.tied(["tok_emb.weight", "head.weight"], c.codebook_size + 1, d),
        "classes": keys.take("cls_emb.weight", c.num_classes + 1, d),
        "position": keys.take("pos_emb.weight", c.num_tokens, d),
        "blocks": keys.stack([_block(keys, f"transformer.layers.{i}", c) for i in range(c.depth)]),
        "modulation": keys.linear("last_norm.mlp.1", d, 2 * d),
        "norm_scale": keys.take("last_norm.norm_final.weight", d),
        "norm_bias": keys.take("last_norm.norm_final.bias", d),
        "bias": keys.take("head.bias", c.codebook_size + 1),
    }
    return params | ({"registers": keys.take("reg_tokens.weight", c.registers, d)} if c.registers else {})


def _block(keys: Keys, name: str, config: HaltonConfig) -> dict:
    d, hidden = config.width, config.hidden
    sizes = {
        "query": ("attn.wq", d, d),
        "key": ("attn.wk", d, d),
        "value": ("attn.wv", d, d),
        "out": ("attn.wo", d, d),
        "mlp_gate": ("ff.w1", d, hidden),
        "mlp_out": ("ff.w2", hidden, d),
        "mlp_up": ("ff.w3", d, hidden),
    }
    kernels = {
        ours: {"kernel": keys.take(f"{name}.{theirs}.weight", outputs, inputs).T}
        for ours, (theirs, inputs, outputs) in sizes.items()
    }
    return kernels | {
        "modulation": keys.linear(f"{name}.mlp.1", d, 6 * d),
        "norm_attention": {"scale": keys.take(f"{name}.ln1.weight", d)},
        "norm_mlp": {"scale": keys.take(f"{name}.ln2.weight", d)},
    }
