"""One description of a mapping gives both directions, and both refuse what has no place."""

import re

import jax
import numpy as np
import pytest

from maskrl_jax.convert.keys import Keys, read, write


def describe(keys, width):
    """A transposed weight, a stack of two, rows of two arrays, halves of one, and a table under two names."""
    fused = keys.take("fused", 2 * width)
    return {
        "dense": keys.linear("fc", 2, width),
        "stack": keys.stack([{"bias": keys.take(f"blocks.{i}", width)} for i in range(2)]),
        "rows": keys.join([keys.take("classes", 3, width), keys.take("null", 1, width)]),
        "columns": keys.join([keys.take("q", 2, 1, width).reshape(2, width), keys.take("k", 2, width)], axis=1),
        "first": fused[:width],
        "second": fused[width:],
        "table": keys.tied(["embed", "head"], 5, width),
        "qkv": keys.linears(["wide_1", "wide_2"], 2, width),
        "out": keys.linear("out", 2, width, bias=False),
        "down": keys.patch_conv("down", 2, width, 2),
        "up": keys.stack([keys.transposed_patch_conv("up", 2, width, 2)]),
        "conv": keys.conv("conv", 2, width),
        "norm": keys.scale("norm", width),
    }


def state(width=3):
    shapes = {"fused": (2 * width,), "fc.weight": (width, 2), "fc.bias": (width,), "blocks.0": (width,)}
    shapes |= {"blocks.1": (width,), "classes": (3, width), "null": (1, width), "q": (2, 1, width), "k": (2, width)}
    shapes |= {f"wide_{i}.{part}": shapes[f"fc.{part}"] for i in (1, 2) for part in ("weight", "bias")}
    shapes |= {"out.weight": (width, 2), "down.weight": (width, 2, 2, 2), "up.weight": (2, width, 2, 2)}
    shapes |= {"conv.weight": (width, 2, 3, 3), "conv.bias": (width,), "norm.weight": (width,)}
    draw = np.random.default_rng(0)
    made = {name: draw.normal(size=x).astype(np.float32) for name, x in shapes.items()}
    table = np.random.default_rng(9).normal(size=(5, width)).astype(np.float32)
    return made | {"embed": table, "head": table.copy()}


def refused(call, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        call()


def test_read_places_every_array():
    given, found = state(), read(describe, state(), 3)["params"]
    np.testing.assert_array_equal(found["dense"]["kernel"], given["fc.weight"].T)
    np.testing.assert_array_equal(found["stack"]["bias"], [given["blocks.0"], given["blocks.1"]])
    np.testing.assert_array_equal(found["rows"][3], given["null"][0])
    np.testing.assert_array_equal(found["columns"][:, 3:], given["k"])
    np.testing.assert_array_equal(found["second"], given["fused"][3:])
    np.testing.assert_array_equal(found["table"], given["head"])


def test_layers_compute_what_theirs_do():
    given, found = state(), read(describe, state(), 3)["params"]
    x, patch = np.float32([1, 2]), np.random.default_rng(1).normal(size=(2, 2, 2))  # row, column, channel
    wide = np.concatenate([given["wide_1.weight"] @ x, given["wide_2.weight"] @ x])
    np.testing.assert_allclose(x @ found["qkv"]["kernel"], wide, rtol=1e-5)
    np.testing.assert_array_equal(found["qkv"]["bias"][3:], given["wide_2.bias"])
    assert found["out"].keys() == {"kernel"} and found["norm"].keys() == {"scale"}
    down = np.einsum("ocab,abc->o", given["down.weight"], patch)
    np.testing.assert_allclose(patch.reshape(-1) @ found["down"]["kernel"], down, rtol=1e-5)
    up = np.einsum("coab,c->abo", given["up.weight"], x)
    np.testing.assert_allclose((x @ found["up"]["kernel"][0]).reshape(2, 2, 3), up, rtol=1e-5)
    np.testing.assert_array_equal(found["conv"]["kernel"][2, 1, 0], given["conv.weight"][:, 0, 2, 1])


@pytest.mark.parametrize("name", sorted(state()))
def test_every_missing_and_misshapen_array_is_named(name):
    refused(lambda: read(describe, {key: x for key, x in state().items() if key != name}, 3), f"the state lacks {name}")
    with pytest.raises(ValueError, match=f"^{re.escape(name)} has shape "):
        read(describe, state() | {name: np.zeros((7, *state()[name].shape[1:]))}, 3)


def test_arrays_without_a_place_are_named():
    refused(lambda: read(describe, state() | {"other": np.zeros(1)}, 3), "the state holds other without a place")


def test_write_is_its_inverse_byte_for_byte():
    given = state()
    found = write(describe, read(describe, given, 3), 3)
    assert found.keys() == given.keys()
    assert all(found[name].tobytes() == given[name].tobytes() for name in given)
    assert all(found[name].flags.c_contiguous for name in given)  # as files want them


def test_tied_arrays_that_differ_are_named():
    refused(lambda: read(describe, state() | {"head": np.ones((5, 3))}, 3), "head is not the same as embed")


def test_parameters_without_a_place_are_named_and_so_are_places_without_parameters():
    params = read(describe, state(), 3)["params"]
    lacking = {name: x for name, x in params.items() if name != "rows"}
    refused(lambda: write(describe, {"params": lacking}, 3), "the parameters lack params/rows")
    more = params | {"dense": params["dense"] | {"scale": np.ones(3)}}
    message = "the parameters hold params/dense/scale without a place"
    refused(lambda: write(describe, {"params": more}, 3), message)
    refused(lambda: write(describe, {"params": params}, 4), "params/dense/kernel has shape [2, 3], not [2, 4]")


def test_a_description_that_copies_or_takes_twice_is_refused():
    with pytest.raises(TypeError, match="the description of params/x makes a copy"):
        write(lambda keys: {"x": keys.take("x", 2, 3).T.reshape(6)}, {"params": {"x": np.ones(6)}})
    refused(lambda: write(lambda keys: [keys.take("x", 2) for _ in range(2)], {"params": []}), "x is taken twice")


def test_parameters_on_a_device_are_written():
    params = jax.tree.map(jax.numpy.asarray, read(describe, state(), 3))
    np.testing.assert_array_equal(write(describe, params, 3)["q"], state()["q"])


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.ones(2, np.int32), "a holds int32, not floating-point"),
        (np.float32([1, np.nan]), "a holds numbers that are not"),
    ],
)
def test_what_are_no_weights_is_refused(array, message):
    with pytest.raises(ValueError, match=message):
        Keys({"a": array}).take("a", 2)
