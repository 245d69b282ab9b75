"""Shared layers against the operations that they stand for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskrl_jax.models import layers


def grid(height=4, width=3, channels=2):
    return jax.random.normal(jax.random.key(0), (2, height, width, channels))


def convolve(x, kernel, groups=1):
    axes = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=axes, feature_group_count=groups)


def test_neighbourhood_lists_the_nine_cells_row_by_row():
    x = jnp.arange(9.0).reshape(1, 3, 3, 1)
    found = layers.neighbourhood(x)
    assert found[0, 1, 1].tolist() == list(range(9))
    assert found[0, 0, 0].tolist() == [0, 0, 0, 0, 0, 1, 0, 3, 4]


def test_conv3_is_a_convolution_with_zero_padding():
    x, layer = grid(), layers.Conv3(5)
    params = layer.init(jax.random.key(1), x)
    dense = params["params"]["kernel"]
    dense["bias"] = jnp.arange(5.0)
    expected = convolve(x, dense["kernel"].reshape(3, 3, 2, 5)) + dense["bias"].reshape(1, 1, 1, 5)
    np.testing.assert_allclose(layer.apply(params, x), expected, atol=1e-5)


def test_sparse_conv3_is_a_convolution_of_a_grid_of_few_cells():
    """Its kernel is the convolution's, mirrored: a cell sends what its neighbours would gather."""
    layer, positions = layers.SparseConv3(4), jnp.array([[0, 7, 10, 3], [15, 5, 6, 9]])
    values, valid = jax.random.normal(jax.random.key(0), (2, 4, 3)), jnp.array([[True] * 4, [True, True, False, True]])
    params = layer.init(jax.random.key(1), values, positions, valid)
    kernel = params["params"]["kernel"]["kernel"].reshape(3, 3, 3, 3)  # in, row, column, out
    grid = jnp.zeros((2, 16, 3)).at[jnp.arange(2)[:, None], positions].set(values * valid[..., None])
    expected = convolve(grid.reshape(2, 4, 4, 3), jnp.transpose(kernel, (1, 2, 0, 3))[::-1, ::-1])
    np.testing.assert_allclose(layer.apply(params, values, positions, valid), expected.reshape(2, 16, 3), atol=1e-5)


def test_depthwise_filter_starts_at_zero_and_is_a_grouped_convolution():
    x, layer = grid(), layers.DepthwiseConv3()
    params = layer.init(jax.random.key(1), x)
    np.testing.assert_array_equal(layer.apply(params, x), jnp.zeros_like(x))
    kernel = jax.random.normal(jax.random.key(2), (3, 3, 2))
    found = layer.apply({"params": {"kernel": kernel}}, x)
    np.testing.assert_allclose(found, convolve(x, kernel[:, :, None], groups=2), atol=1e-5)


def test_relative_bias_depends_on_the_offset_alone():
    """A 2 x 2 grid and one other token; offsets (row, column) of key from query, table 3 x 3."""
    layer = layers.RelativeBias(heads=1, side=2, length=5)
    params = layer.init(jax.random.key(0))
    np.testing.assert_array_equal(layer.apply(params), np.zeros((1, 1, 5, 5)))
    table = jnp.arange(9.0).reshape(1, 9)
    found = np.asarray(layer.apply({"params": {"table": table}}))[0, 0]
    expected = np.array([[4, 3, 1, 0], [5, 4, 2, 1], [7, 6, 4, 3], [8, 7, 5, 4]])
    np.testing.assert_array_equal(found[:4, :4], expected)
    assert (found[4] == 0).all() and (found[:, 4] == 0).all()


def test_attention_is_the_textbook_formula():
    x, layer = jax.random.normal(jax.random.key(0), (2, 5, 6)), layers.Attention(heads=2)
    bias = jax.random.normal(jax.random.key(2), (1, 2, 5, 5))
    params = layer.init(jax.random.key(1), x, bias)
    p = jax.tree.map(np.asarray, params["params"])
    query, key, value = np.split(np.asarray(x) @ p["qkv"]["kernel"] + p["qkv"]["bias"], 3, axis=-1)
    heads = [slice(0, 3), slice(3, 6)]
    rows = []
    for head, part in enumerate(heads):
        weight = query[..., part] @ key[..., part].swapaxes(1, 2) / np.sqrt(3) + np.asarray(bias)[0, head]
        rows.append(np.asarray(jax.nn.softmax(weight)) @ value[..., part])
    expected = np.concatenate(rows, -1) @ p["out"]["kernel"] + p["out"]["bias"]
    np.testing.assert_allclose(layer.apply(params, x, bias), expected, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_layer_norm_computes_in_float32(dtype):
    """1000 and 1001 are the same number in bfloat16's eight bits, so only the input is rounded."""
    x = jnp.array([[1000.0, 1004.0]], dtype)
    layer = layers.layer_norm("norm")
    found = layer.apply(layer.init(jax.random.key(0), x), x)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, [[-1.0, 1.0]], atol=1e-6)
