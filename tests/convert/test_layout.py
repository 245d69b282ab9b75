"""Places of parameters in a state dict, by hand; the converters above them are tested on reference states."""

import re

import numpy as np
import pytest

from maskrl_jax.convert import layout as at

LAYOUT = {
    "qkv": at.joined(("q", "k"), 3, 2),
    "down": at.patch_conv("down", 2, 3, 2),
    "up": at.transposed_patch_conv("up", 2, 3, 2),
    "conv": at.conv("conv", 2, 3),
    "blocks": at.stacked([{"norm": at.norm(f"blocks.{i}", 2)} for i in range(2)]),
}
SHAPES = {
    "q.weight": (2, 3),
    "k.weight": (2, 3),
    "q.bias": (2,),
    "k.bias": (2,),
    "down.weight": (3, 2, 2, 2),
    "up.weight": (2, 3, 2, 2),
    "conv.weight": (3, 2, 3, 3),
    "conv.bias": (3,),
    **{f"blocks.{i}.{part}": (2,) for i in (0, 1) for part in ("weight", "bias")},
}


def state():
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(shape, np.float32) for name, shape in SHAPES.items()}


def test_layers_are_what_the_reference_s_do():
    told, params = state(), at.params_of(state(), LAYOUT)["params"]
    x = np.arange(3, dtype=np.float32)
    np.testing.assert_allclose(
        x @ params["qkv"]["kernel"], np.concatenate([told["q.weight"] @ x, told["k.weight"] @ x])
    )
    patch = np.random.default_rng(1).standard_normal((2, 2, 2))  # rows, columns, channels
    wanted = np.einsum("ocab,abc->o", told["down.weight"], patch)
    np.testing.assert_allclose(patch.reshape(-1) @ params["down"]["kernel"], wanted, rtol=1e-5)
    made = np.einsum("coab,c->abo", told["up.weight"], patch[0, 0])
    np.testing.assert_allclose((patch[0, 0] @ params["up"]["kernel"]).reshape(2, 2, 3), made, rtol=1e-5)
    np.testing.assert_array_equal(params["conv"]["kernel"][2, 1, 0], told["conv.weight"][:, 0, 2, 1])
    np.testing.assert_array_equal(params["blocks"]["norm"]["bias"][1], told["blocks.1.bias"])


def test_there_and_back_is_the_same_bytes():
    back = at.state_of(at.params_of(state(), LAYOUT), LAYOUT)
    assert {name: (x.dtype, x.shape, x.tobytes()) for name, x in back.items()} == {
        name: (x.dtype, x.shape, x.tobytes()) for name, x in state().items()
    }


@pytest.mark.parametrize("name", SHAPES)
def test_a_missing_and_a_misshapen_tensor_are_named(name):
    with pytest.raises(ValueError, match=f"^the state lacks {re.escape(name)}$"):
        at.params_of({key: x for key, x in state().items() if key != name}, LAYOUT)
    with pytest.raises(ValueError, match=f"^{re.escape(name)} has shape "):
        at.params_of(state() | {name: np.zeros((7, *SHAPES[name][1:]))}, LAYOUT)


def test_a_tensor_without_a_place_is_named():
    with pytest.raises(ValueError, match="^the state holds other without a place$"):
        at.params_of(state() | {"other": np.zeros(1)}, LAYOUT)


def test_parameters_of_another_model_are_named():
    params = at.params_of(state(), LAYOUT)["params"]
    with pytest.raises(ValueError, match="^the parameters lack conv/bias$"):
        at.state_of({"params": params | {"conv": {"kernel": params["conv"]["kernel"]}}}, LAYOUT)
    with pytest.raises(ValueError, match="^the parameters hold other$"):
        at.state_of({"params": params | {"other": np.zeros(1)}}, LAYOUT)
    short = {"norm": {name: x[:1] for name, x in params["blocks"]["norm"].items()}}
    with pytest.raises(ValueError, match=r"^parameter blocks/norm/bias has shape \[1, 2\], not \[2, 2\]$"):
        at.state_of({"params": params | {"blocks": short}}, LAYOUT)
