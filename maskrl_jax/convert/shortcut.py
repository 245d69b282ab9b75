"""Weights of the reference's shortcut networks as parameters of ours (shortcut spec, end of section 3), and back.

Strict as in `maskgit_port`: a ValueError of one line names the key that is missing, left over or misshapen.
"""

from collections.abc import Mapping

import numpy as np

from maskrl_jax.convert.keys import Keys, read, write
from maskrl_jax.models.dimoo_shortcut import DimooShortcutConfig
from maskrl_jax.models.shortcut import TIME_WIDTH, ShortcutConfig


def params_of(state: Mapping[str, np.ndarray], config: ShortcutConfig) -> dict:
    """Map a state dict of the MaskGIT form to the variables of `Shortcut(config)`, float32.

    The frozen tables E and P are no part of the state. Linear weights arrive as [out,in], the rows of in_proj
    as query, key, value. Without controls (our form of that ablation) the keys of the cross-attention are absent.
    """
    return read(_params, state, config)


def state_of(params: Mapping, config: ShortcutConfig) -> dict[str, np.ndarray]:
    """Map variables of `Shortcut(config)` to a state dict of the MaskGIT form: the inverse of `params_of`."""
    return write(_params, params, config)


def dimoo_params_of(state: Mapping[str, np.ndarray], config: DimooShortcutConfig) -> dict:
    """Map a state dict of the DiMOO form to the variables of `DimooShortcut(config)`, float32.

    Without controls the first self block is read from the names of the cross block that it replaces (our
    assumption: no state dict of that ablation is published).
    """
    return read(_dimoo_params, state, config)


def dimoo_state_of(params: Mapping, config: DimooShortcutConfig) -> dict[str, np.ndarray]:
    """Map variables of `DimooShortcut(config)` to a state dict of the DiMOO form: the inverse of `dimoo_params_of`."""
    return write(_dimoo_params, params, config)


def _params(keys: Keys, config: ShortcutConfig) -> dict:
    if config.local_mixing:
        raise ValueError("published shortcut weights have no local_mixing; set it to False")
    c, h = config, config.inner
    params = _around(keys, c)
    for index in range(c.n_block):
        block = params[f"block_{index}"] = {}
        for name in ("cross", "self") if c.controls else ("self",):
            stem = f"blocks.{index}.{name}_attn"
            qkv = keys.linear(f"{stem}.fn.mha.in_proj", h, 3 * h, separator="_")
            block |= {
                f"{name}_norm": keys.norm(f"{stem}.norm", h),
                f"{name}_query": {part: x[..., :h] for part, x in qkv.items()},
                f"{name}_key_value": {part: x[..., h:] for part, x in qkv.items()},
                f"{name}_out": keys.linear(f"{stem}.fn.mha.out_proj", h, h),
                f"{name}_mlp_norm": keys.norm(f"{stem}_ff.norm", h),
                f"{name}_mlp_in": keys.linear(f"{stem}_ff.fn.net.0", h, 4 * h),
                f"{name}_mlp_out": keys.linear(f"{stem}_ff.fn.net.3", 4 * h, h),
            }
    params["norm_tail"] = keys.norm("last_layer.0", h)
    params["tail"] = keys.linear("last_layer.1", h, h)
    params["norm_out"] = keys.norm("last_layer.3", h)
    return params


def _dimoo_params(keys: Keys, config: DimooShortcutConfig) -> dict:
    c, h = config, config.inner
    params = _around(keys, c)
    sizes = {
        "query": ("q_proj", h, h),
        "key": ("k_proj", h, h),
        "value": ("v_proj", h, h),
        "out": ("attn_out", h, h),
        "mlp_gate": ("ff_proj", h, c.mlp_width),
        "mlp_up": ("up_proj", h, c.mlp_width),
        "mlp_out": ("ff_out", c.mlp_width, h),
    }
    for index in range(c.n_block):
        for ours, theirs in (("first", "cross_attn"), ("second", "self_attn")):
            stem = f"blocks.{index}.{theirs}"
            block = params[f"block_{index}_{ours}"] = {
                "norm": {"scale": keys.take(f"{stem}.attn_norm.weight", h)},
                "mlp_norm": {"scale": keys.take(f"{stem}.ff_norm.weight", h)},
            }
            for name, (key, inputs, outputs) in sizes.items():
                block[name] = {"kernel": keys.take(f"{stem}.{key}.weight", outputs, inputs).T}
    params["norm_out"] = {"scale": keys.take("ln_f.weight", h)}
    return params


def _around(keys: Keys, config: ShortcutConfig | DimooShortcutConfig) -> dict:
    """Take what both forms share: the projections and the time modulation."""
    c, h = config, config.inner
    params = {}
    if c.ratio != 1:
        params["features_in"] = keys.linear("proj_in", c.width, h)
        params["features_out"] = keys.linear("proj_out", h, c.width)
        if c.controls:
            params["controls_in"] = keys.linear("new_token_proj_in", c.width, h)
    if c.embed_t:
        hidden = round((TIME_WIDTH * h) ** 0.5)
        params["time"] = {
            "embed_in": keys.linear("time_embedder.mlp.0", TIME_WIDTH, hidden),
            "embed_out": keys.linear("time_embedder.mlp.2", hidden, h),
            "modulation": keys.linear("adaLN_modulation", h, 2 * h),
        }
    return params
