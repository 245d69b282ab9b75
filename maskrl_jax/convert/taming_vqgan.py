"""Weights of the VQGAN of taming-transformers as parameters of `TamingVQGAN`, and back (specs/maskgit.md section 2).

Strict as in `maskgit_port`: a ValueError of one line names the key that is missing, left over or misshapen.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from maskrl_jax.convert.conv_autoencoder import decoder_params, encoder_params
from maskrl_jax.convert.keys import Keys, read, write
from maskrl_jax.models.conv_autoencoder import ConvSizes
from maskrl_jax.models.taming_vqgan import TamingVQGANConfig

TRAINING = "loss."  # discriminator and perceptual network lie in the published file beside the model


def config_of(params: Mapping[str, Any]) -> TamingVQGANConfig:
    """Sizes from `model.params` of the published model.yaml: `ddconfig`, `n_embed` and `embed_dim`.

    Attention is at the levels whose nominal size, `resolution` halved once a level, is in `attn_resolutions`.
    """
    made = params["ddconfig"]
    if made.get("double_z"):
        raise ValueError("ddconfig.double_z is for Gaussian latents; a VQGAN has none")
    levels = range(len(made["ch_mult"]))
    attended = tuple(i for i in levels if made["resolution"] // 2**i in made["attn_resolutions"])
    sizes = ConvSizes(made["ch"], tuple(made["ch_mult"]), made["num_res_blocks"], attended, attended)
    return TamingVQGANConfig(sizes, made["z_channels"], params["n_embed"], params["embed_dim"])


def params_of(state: Mapping[str, np.ndarray], config: TamingVQGANConfig) -> dict:
    """Map a state dict to the variables of `TamingVQGAN(config)`, float32; kernels arrive as [out,in,h,w].

    What the published file holds of its training (`loss.*`) is left out.
    """
    return read(_params, {name: x for name, x in state.items() if not name.startswith(TRAINING)}, config)


def state_of(params: Mapping, config: TamingVQGANConfig) -> dict[str, np.ndarray]:
    """Map variables of `TamingVQGAN(config)` to the reference's state dict: the inverse of `params_of`."""
    return write(_params, params, config)


def _params(keys: Keys, config: TamingVQGANConfig) -> dict:
    channels, width = config.channels, config.code_width
    return {
        "encoder": encoder_params(keys, config.conv, channels),
        "decoder": decoder_params(keys, config.conv, channels),
        "quant": keys.conv("quant_conv", channels, width, 1),
        "post_quant": keys.conv("post_quant_conv", width, channels, 1),
        "codebook": keys.take("quantize.embedding.weight", config.codebook_size, width),
    }
