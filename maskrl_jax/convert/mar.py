"""Weights of the reference's MAR as parameters of ours (specs/mar.md section 9), and back.

Strict as in `maskgit_port`: a ValueError of one line names the key that is missing, left over or misshapen.
"""

from collections.abc import Mapping

import numpy as np

from maskrl_jax.convert.keys import Keys, read, write
from maskrl_jax.models.mar import FREQUENCIES, MarConfig


def params_of(state: Mapping[str, np.ndarray], config: MarConfig) -> dict:
    """Map a state dict to the variables of `Mar(config)`, float32.

    Linear weights arrive as [out, in], the rows of qkv as query, key, value. The null vector becomes the last row of
    the table of classes.
    """
    return read(_params, state, config)


def state_of(params: Mapping, config: MarConfig) -> dict[str, np.ndarray]:
    """Map the variables of a `Mar(config)` of published form to the reference's state dict, float32.

    The inverse of `params_of`: what the published network has no place for (`conv_stem`, `pooled_width`,
    `relative_bias`, `local_mixing`) is refused by name.
    """
    return write(_params, params, config)


def _params(keys: Keys, config: MarConfig) -> dict:
    c, d = config, config.width
    classes = keys.take("class_emb.weight", c.cond_vocab - 1, d)
    return {
        "conditions": {"embedding": keys.join([classes, keys.take("fake_latent", 1, d)])},
        "mask": keys.take("mask_token", 1, 1, d)[0, 0],
        "encoder_places": keys.take("encoder_pos_embed_learned", 1, c.buffer + c.num_tokens, d)[0],
        "decoder_places": keys.take("decoder_pos_embed_learned", 1, c.buffer + c.num_tokens, d)[0],
        "head_places": keys.take("diffusion_pos_embed_learned", 1, c.num_tokens, d)[0],
        "tokens_in": keys.linear("z_proj", c.channels, d),
        "norm_in": keys.norm("z_proj_ln", d),
        "encoder_norm": keys.norm("encoder_norm", d),
        "decoder_norm": keys.norm("decoder_norm", d),
        "decoder_in": keys.linear("decoder_embed", d, d),
        "encoder_blocks": {"blocks": _blocks(keys, "encoder_blocks", c)},
        "decoder_blocks": {"blocks": _blocks(keys, "decoder_blocks", c)},
        "denoiser": _head(keys, "diffloss.net", c),
    }


def _blocks(keys: Keys, name: str, config: MarConfig) -> dict:
    """Take a stack of blocks: parameters with a leading axis of blocks."""
    d, hidden = config.width, round(config.mlp_ratio * config.width)
    blocks = []
    for index in range(config.depth):
        stem = f"{name}.{index}"
        blocks.append(
            {
                "norm_attention": keys.norm(f"{stem}.norm1", d),
                "qkv": keys.linear(f"{stem}.attn.qkv", d, 3 * d),
                "out": keys.linear(f"{stem}.attn.proj", d, d),
                "norm_mlp": keys.norm(f"{stem}.norm2", d),
                "mlp_in": keys.linear(f"{stem}.mlp.fc1", d, hidden),
                "mlp_out": keys.linear(f"{stem}.mlp.fc2", hidden, d),
            }
        )
    return keys.stack(blocks)


def _head(keys: Keys, name: str, config: MarConfig) -> dict:
    w = config.head_width
    head = {
        "time_in": keys.linear(f"{name}.time_embed.mlp.0", 2 * FREQUENCIES, w),
        "time_out": keys.linear(f"{name}.time_embed.mlp.2", w, w),
        "condition": keys.linear(f"{name}.cond_embed", config.width, w),
        "state_in": keys.linear(f"{name}.input_proj", config.channels, w),
        "last_modulation": keys.linear(f"{name}.final_layer.adaLN_modulation.1", w, 2 * w),
        "last": keys.linear(f"{name}.final_layer.linear", w, 2 * config.channels),
    }
    for index in range(config.head_depth):
        stem = f"{name}.res_blocks.{index}"
        head |= {
            f"norms_{index}": keys.norm(f"{stem}.in_ln", w),
            f"modulations_{index}": keys.linear(f"{stem}.adaLN_modulation.1", w, 3 * w),
            f"hidden_{index}": keys.linear(f"{stem}.mlp.0", w, w),
            f"out_{index}": keys.linear(f"{stem}.mlp.2", w, w),
        }
    return head
