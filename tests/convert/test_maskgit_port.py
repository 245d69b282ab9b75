"""The mapping from the reference's names is strict; tests/models/test_maskgit_port.py checks its numbers."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskrl_jax.convert.maskgit_port import params_of, state_of
from maskrl_jax.models.maskgit_port import MaskGITPort, PortConfig

CONFIG = PortConfig(num_tokens=4, codebook_size=5, num_classes=2, width=6, depth=2, heads=2, mlp_width=7)
QKV = "transformer.layers.1.0.fn.mha.in_proj_weight"


def state():
    """A state dict of 4 tokens, 5 + 1 + 3 rows, width 6, MLP 7 and two blocks, with a number of its own in each."""
    shapes = {"tok_emb.weight": (9, 6), "pos_emb": (1, 5, 6), "bias": (5, 9)}
    linear = {"first_layer.2": (6, 6), "first_layer.6": (6, 6), "last_layer.2": (6, 6)}
    norms = ["first_layer.0", "first_layer.4", "last_layer.0", "last_layer.4"]
    for block in ("transformer.layers.0", "transformer.layers.1"):
        shapes |= {f"{block}.0.fn.mha.in_proj_weight": (18, 6), f"{block}.0.fn.mha.in_proj_bias": (18,)}
        linear |= {f"{block}.0.fn.mha.out_proj": (6, 6), f"{block}.1.fn.net.0": (7, 6), f"{block}.1.fn.net.3": (6, 7)}
        norms += [f"{block}.0.norm", f"{block}.1.norm"]
    for name, shape in linear.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    for name in norms:
        shapes |= {f"{name}.weight": (6,), f"{name}.bias": (6,)}
    return {name: np.full(shape, i, np.float32) for i, (name, shape) in enumerate(shapes.items())}


def refused(state, message, **sizes):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        params_of(state, dataclasses.replace(CONFIG, **sizes))


def test_parameters_fit_the_model_and_every_key_has_one_place():
    ids, cond = jnp.zeros((1, 4), jnp.int32), jnp.zeros(1, jnp.int32)
    expected = jax.eval_shape(MaskGITPort(CONFIG).init, jax.random.key(0), ids, cond)
    found = params_of(state(), CONFIG)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), found) == jax.tree.map(lambda x: (x.shape, x.dtype), expected)
    assert sorted(x.flat[0] for x in jax.tree.leaves(found)) == list(range(len(state())))


def test_linear_weights_are_transposed():
    weight = np.arange(108, dtype=np.float32).reshape(18, 6)
    kernel = params_of(state() | {QKV: weight}, CONFIG)["params"]["blocks_1"]["attention"]["qkv"]["kernel"]
    np.testing.assert_array_equal(kernel, weight.T)


@pytest.mark.parametrize("name", state())
def test_missing_key_is_named(name):
    refused({key: value for key, value in state().items() if key != name}, f"the state lacks {name}")


def test_deeper_model_misses_the_next_block():
    refused(state(), "the state lacks transformer.layers.2.0.norm.weight", depth=3)


def test_keys_left_over_are_named():
    refused(state() | {"norm.bias": np.zeros(6)}, "the state holds norm.bias without a place")
    refused(
        state(),
        "the state holds transformer.layers.1.0.fn.mha.in_proj_bias and 11 other keys without a place",
        depth=1,
    )


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("tok_emb.weight", (9,), "[9], not [9, 6]"),
        ("pos_emb", (5, 6), "[5, 6], not [1, 5, 6]"),
        ("bias", (9,), "[9], not [5, 9]"),
        (QKV, (6, 18), "[6, 18], not [18, 6]"),
        ("last_layer.4.weight", (5,), "[5], not [6]"),
        ("transformer.layers.1.1.fn.net.0.weight", (8, 6), "[8, 6], not [7, 6]"),
    ],
)
def test_wrong_shape_is_named(name, shape, message):
    refused(state() | {name: np.zeros(shape)}, f"{name} has shape {message}")


def test_state_of_other_sizes_is_refused():
    refused(state(), "tok_emb.weight has shape [9, 6], not [11, 6]", codebook_size=7)


def test_parameters_lead_back_to_the_state():
    made = {name: np.random.default_rng(0).normal(size=x.shape).astype(np.float32) for name, x in state().items()}
    back = state_of(params_of(made, CONFIG), CONFIG)
    assert back.keys() == made.keys()
    jax.tree.map(np.testing.assert_array_equal, back, made)
