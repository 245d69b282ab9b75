"""Weights of the reference's KL-VAE as parameters of ours, and back (specs/mar.md sections 2 and 9).

Strict as in `maskgit_port`: a ValueError of one line names the key that is missing, left over or misshapen.
"""

from collections.abc import Mapping

import numpy as np

from maskrl_jax.convert.conv_autoencoder import decoder_params, encoder_params
from maskrl_jax.convert.keys import Keys, read, write
from maskrl_jax.models.kl_vae import KLVAEConfig


def params_of(state: Mapping[str, np.ndarray], config: KLVAEConfig) -> dict:
    """Map a state dict to the variables of `KLVAE(config)` of form `conv`, float32; kernels arrive as [out,in,h,w]."""
    return read(_params, state, config)


def state_of(params: Mapping, config: KLVAEConfig) -> dict[str, np.ndarray]:
    """Map variables of `KLVAE(config)` of form `conv` to the reference's state dict: the inverse of `params_of`."""
    return write(_params, params, config)


def _params(keys: Keys, config: KLVAEConfig) -> dict:
    channels = config.channels
    return {
        "encoder": encoder_params(keys, config.conv, 2 * channels),
        "decoder": decoder_params(keys, config.conv, channels),
        "quant": keys.conv("quant_conv", 2 * channels, 2 * channels, 1),
        "post_quant": keys.conv("post_quant_conv", channels, channels, 1),
    }
