"""The mapping from the published names is strict; tests/models/test_inception.py checks its numbers."""

import re

import hashed
import jax
import numpy as np
import pytest

from maskrl_jax.convert.inception import PUBLISHED_SHA256, params_of

SHAPES = hashed.inception_shapes()
CONV = "Mixed_6c.branch7x7dbl_4.conv.weight"


def state():
    """Zeros of every shape, without their memory."""
    return {name: np.broadcast_to(np.float32(0), shape) for name, shape in SHAPES.items()}


def refused(state, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        params_of(state)


def test_names_are_the_published_ones():
    """94 convolutions with 5 arrays each and the head; a few names as in torchvision and the published file."""
    assert len(SHAPES) == 94 * 5 + 2
    some = ("Conv2d_1a_3x3.conv.weight", "Mixed_5b.branch5x5_2.bn.running_var", "Mixed_6a.branch3x3.bn.bias")
    some += ("Mixed_7a.branch7x7x3_4.conv.weight", "Mixed_7c.branch3x3dbl_3b.bn.weight", "fc.bias")
    assert set(some) <= set(SHAPES)
    assert SHAPES[CONV] == (160, 160, 7, 1)
    assert SHAPES["Mixed_7b.branch3x3_2a.conv.weight"] == (384, 384, 1, 3)


def test_kernels_are_transposed_and_moments_find_their_places():
    weight = np.random.default_rng(0).normal(size=SHAPES[CONV]).astype(np.float32)
    moments = {f"Mixed_6c.branch7x7dbl_4.bn.{name}": np.full(160, float(i)) for i, name in enumerate(
        ("weight", "bias", "running_mean", "running_var"))}  # fmt: skip
    found = params_of(state() | {CONV: weight} | moments)["params"]["Mixed_6c"]["branch7x7dbl_4"]
    np.testing.assert_array_equal(found["kernel"], weight.transpose(2, 3, 1, 0))
    assert [found[name][0] for name in ("scale", "bias", "mean", "variance")] == [0, 1, 2, 3]


def test_head_is_transposed_and_has_no_bias():
    weight = np.random.default_rng(0).normal(size=(1008, 2048)).astype(np.float32)
    found = params_of(state() | {"fc.weight": weight, "fc.bias": np.ones(1008)})["params"]["fc"]
    assert list(found) == ["kernel"]
    np.testing.assert_array_equal(found["kernel"], weight.T)


def test_counters_of_training_are_passed_over():
    params_of(state() | {"Conv2d_1a_3x3.bn.num_batches_tracked": np.int64(7)})


def test_arrays_are_float32():
    double = {name: value.astype(np.float64) for name, value in state().items() if value.size < 1000}
    assert {x.dtype for x in jax.tree.leaves(params_of(state() | double))} == {np.dtype(np.float32)}


@pytest.mark.parametrize("name", [CONV, "fc.bias", "Mixed_7c.branch_pool.bn.running_mean"])
def test_missing_key_is_named(name):
    refused({key: value for key, value in state().items() if key != name}, f"the state lacks {name}")


def test_keys_left_over_are_named():
    """Those of the auxiliary head of torchvision's own checkpoint, for instance."""
    refused(state() | {"AuxLogits.fc.bias": np.zeros(1000)}, "the state holds AuxLogits.fc.bias without a place")


def test_wrong_shapes_are_named():
    refused(state() | {"fc.weight": np.zeros((1000, 2048))}, "fc.weight has shape [1000, 2048], not [1008, 2048]")
    refused(state() | {CONV: np.zeros((160, 160, 1, 7))}, f"{CONV} has shape [160, 160, 1, 7], not [160, 160, 7, 1]")


def test_published_sum_begins_as_the_published_name():
    assert PUBLISHED_SHA256.startswith("6726825d") and len(PUBLISHED_SHA256) == 64
