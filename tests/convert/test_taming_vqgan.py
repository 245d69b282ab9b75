"""The mapping from taming-transformers' names is strict; tests/models/test_taming_vqgan.py checks its numbers."""

import fixtures
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskrl_jax.convert.taming_vqgan import config_of, params_of, state_of
from maskrl_jax.models.conv_autoencoder import ConvSizes
from maskrl_jax.models.taming_vqgan import TamingVQGAN, TamingVQGANConfig

CONFIG = TamingVQGANConfig(ConvSizes(32, (2, 1), 1, (1,), (1,)), channels=4, codebook_size=6, code_width=3)
PARAMS = fixtures.random_params(TamingVQGAN(CONFIG), jnp.zeros((1, 8, 8, 3)))
YAML = {
    "ddconfig": {
        **{"double_z": False, "z_channels": 256, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 128},
        **{"ch_mult": [1, 1, 2, 2, 4], "num_res_blocks": 2, "attn_resolutions": [16], "dropout": 0.0},
    },
    "n_embed": 1024,
    "embed_dim": 256,
}


def test_the_published_settings_are_the_default_sizes():
    assert config_of(YAML) == TamingVQGANConfig()


def test_gaussian_latents_are_refused():
    with pytest.raises(ValueError, match="^ddconfig.double_z is for Gaussian latents"):
        config_of(YAML | {"ddconfig": YAML["ddconfig"] | {"double_z": True}})


def test_parameters_go_there_and_back_where_channels_fall_and_widths_differ():
    jax.tree.map(np.testing.assert_array_equal, params_of(state_of(PARAMS, CONFIG), CONFIG), PARAMS)


def test_what_the_file_holds_of_its_training_is_left_out_and_nothing_else():
    state = state_of(PARAMS, CONFIG)
    params_of(state | {"loss.discriminator.main.0.weight": np.zeros(2)}, CONFIG)
    with pytest.raises(ValueError, match="^the state holds encoder.norm.weight without a place$"):
        params_of(state | {"encoder.norm.weight": np.zeros(2)}, CONFIG)
    del state["quantize.embedding.weight"]
    with pytest.raises(ValueError, match="^the state lacks quantize.embedding.weight$"):
        params_of(state, CONFIG)


def test_kernels_are_out_in_height_width():
    state = state_of(PARAMS, CONFIG)
    assert state["quant_conv.weight"].shape == (3, 4, 1, 1)
    kernel = PARAMS["params"]["encoder"]["conv_in"]["kernel"]
    np.testing.assert_array_equal(state["encoder.conv_in.weight"], kernel.transpose(3, 2, 0, 1))
