"""The mapping from Halton-MaskGIT's names is strict; tests/models/test_halton.py checks its numbers."""

import fixtures
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskrl_jax.convert.halton import params_of, state_of
from maskrl_jax.models.halton import HaltonConfig, HaltonMaskGIT

CONFIG = HaltonConfig(num_tokens=4, codebook_size=5, num_classes=3, width=6, depth=2, heads=2, mlp_width=8)
PARAMS = fixtures.random_params(HaltonMaskGIT(CONFIG), jnp.zeros((1, 4), jnp.int32), jnp.zeros(1, jnp.int32))
STATE = state_of(PARAMS, CONFIG)


def test_parameters_go_there_and_back():
    jax.tree.map(np.testing.assert_array_equal, params_of(STATE, CONFIG), PARAMS)


def test_every_missing_key_and_every_wrong_shape_is_named():
    for name, array in STATE.items():
        with pytest.raises(ValueError, match=f"^the state lacks {name}$"):
            params_of({key: x for key, x in STATE.items() if key != name}, CONFIG)
        with pytest.raises(ValueError, match=f"^{name} has shape "):
            params_of(STATE | {name: array[None]}, CONFIG)


def test_the_two_names_of_the_tied_table_must_agree():
    np.testing.assert_array_equal(STATE["head.weight"], STATE["tok_emb.weight"])
    with pytest.raises(ValueError, match="^head.weight is not the same as tok_emb.weight$"):
        params_of(STATE | {"head.weight": STATE["head.weight"] + 1}, CONFIG)
