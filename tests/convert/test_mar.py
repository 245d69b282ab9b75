"""MAR's weights lead back to the reference's names; tests/models/test_mar.py checks their numbers."""

import dataclasses

import fixtures
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskrl_jax.convert.mar import params_of, state_of
from maskrl_jax.models.mar import Mar, MarConfig

CONFIG = MarConfig(
    num_tokens=4, channels=2, cond_vocab=4, buffer=2, width=6, depth=2, heads=2, head_width=4, head_depth=2
)
ARGUMENTS = jnp.zeros((1, 4, 2)), jnp.arange(4)[None], jnp.zeros(1, jnp.int32)


def test_parameters_go_there_and_back():
    params = fixtures.random_params(Mar(CONFIG), *ARGUMENTS)
    state = state_of(params, CONFIG)
    jax.tree.map(np.testing.assert_array_equal, params_of(state, CONFIG), params)
    table = params["params"]["conditions"]["embedding"]
    np.testing.assert_array_equal(state["class_emb.weight"], table[:3])
    np.testing.assert_array_equal(state["fake_latent"], table[3:])


@pytest.mark.parametrize(("option", "named"), [("conv_stem", "stem"), ("local_mixing", "decoder_blocks/blocks/local")])
def test_what_the_published_network_has_no_place_for_is_refused_by_name(option, named):
    config = dataclasses.replace(CONFIG, **{option: True})
    params = fixtures.random_params(Mar(config), *ARGUMENTS)
    with pytest.raises(ValueError, match=f"^the parameters hold params/{named} without a place$"):
        state_of(params, config)
