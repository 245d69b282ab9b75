"""The mapping from the reference's names is strict; tests/models/test_shortcut.py checks its numbers."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskrl_jax.convert.shortcut import dimoo_params_of, dimoo_state_of, params_of
from maskrl_jax.convert.shortcut import state_of as maskgit_state_of
from maskrl_jax.models.dimoo_shortcut import DimooShortcut, DimooShortcutConfig
from maskrl_jax.models.shortcut import Shortcut, ShortcutConfig

AROUND = {
    "proj_in.weight": (4, 8),
    "proj_in.bias": (4,),
    "new_token_proj_in.weight": (4, 8),
    "new_token_proj_in.bias": (4,),
    "proj_out.weight": (8, 4),
    "proj_out.bias": (8,),
    "time_embedder.mlp.0.weight": (32, 256),
    "time_embedder.mlp.0.bias": (32,),
    "time_embedder.mlp.2.weight": (4, 32),
    "time_embedder.mlp.2.bias": (4,),
    "adaLN_modulation.weight": (8, 4),
    "adaLN_modulation.bias": (8,),
}
MODELS = {"maskgit": Shortcut, "dimoo": DimooShortcut}
MAPPED = {"maskgit": params_of, "dimoo": dimoo_params_of}
BACK = {"maskgit": maskgit_state_of, "dimoo": dimoo_state_of}
VARIANTS = [
    (form, options)
    for form in MODELS
    for options in ({}, {"n_block": 2}, {"ratio": 1}, {"embed_t": False}, {"controls": False})
]


def config_of(form, **options):
    """Width 8, inner width 4 and time width 32 = sqrt(256 * 4), unless the options change it."""
    if form == "maskgit":
        return ShortcutConfig(8, heads=2, **options)
    return DimooShortcutConfig(8, heads=2, mlp_width=6, **options)


def shapes_of(form, ratio=2, n_block=1, embed_t=True, controls=True):
    """The reference's names and shapes, written out."""
    h = round(8 / ratio)
    around = AROUND
    if ratio == 1:
        hidden = {(32, 256): (45, 256), (32,): (45,), (4, 32): (8, 45), (4,): (8,), (8, 4): (16, 8), (8,): (16,)}
        around = {name: hidden[shape] for name, shape in AROUND.items() if "proj" not in name}
    if not embed_t:
        around = {name: shape for name, shape in around.items() if "proj" in name}
    if not controls:
        around = {name: shape for name, shape in around.items() if "new_token" not in name}
    shapes = dict(around)
    for index in range(n_block):
        for name in ("cross", "self"):
            stem = f"blocks.{index}.{name}_attn"
            if form == "dimoo":
                shapes |= {f"{stem}.{key}.weight": (h, h) for key in ("q_proj", "k_proj", "v_proj", "attn_out")}
                shapes |= {f"{stem}.{key}.weight": (h,) for key in ("attn_norm", "ff_norm")}
                shapes |= {f"{stem}.ff_proj.weight": (6, h), f"{stem}.up_proj.weight": (6, h)}
                shapes |= {f"{stem}.ff_out.weight": (h, 6)}
            elif controls or name == "self":
                shapes |= {f"{stem}.fn.mha.in_proj_weight": (3 * h, h), f"{stem}.fn.mha.in_proj_bias": (3 * h,)}
                shapes |= {f"{stem}.fn.mha.out_proj.weight": (h, h), f"{stem}.fn.mha.out_proj.bias": (h,)}
                shapes |= {f"{stem}_ff.fn.net.0.weight": (4 * h, h), f"{stem}_ff.fn.net.0.bias": (4 * h,)}
                shapes |= {f"{stem}_ff.fn.net.3.weight": (h, 4 * h), f"{stem}_ff.fn.net.3.bias": (h,)}
                shapes |= {f"{stem}{part}.norm.{kind}": (h,) for part in ("", "_ff") for kind in ("weight", "bias")}
    if form == "dimoo":
        return shapes | {"ln_f.weight": (h,)}
    return shapes | {
        "last_layer.1.weight": (h, h),
        **{f"last_layer.{i}.{kind}": (h,) for i in (0, 3) for kind in ("weight", "bias")},
        "last_layer.1.bias": (h,),
    }


def state_of(form, **options):
    """A state dict with a number of its own in every entry."""
    return {name: np.full(shape, i, np.float32) for i, (name, shape) in enumerate(shapes_of(form, **options).items())}


def refused(form, state, message, **options):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        MAPPED[form](state, config_of(form, **options))


def test_local_mixing_has_no_published_weights():
    message = "published shortcut weights have no local_mixing; set it to False"
    refused("maskgit", state_of("maskgit"), message, local_mixing=True, num_tokens=4)


@pytest.mark.parametrize(("form", "options"), VARIANTS)
def test_parameters_fit_the_model_and_every_key_has_one_place(form, options):
    rows, positions, valid = jnp.zeros((1, 3, 8)), jnp.zeros((1, 3), jnp.int32), jnp.ones((1, 3), bool)
    model = MODELS[form](config_of(form, **options))
    expected = jax.eval_shape(model.init, jax.random.key(0), rows, rows, positions, valid, jnp.ones(1))
    state = state_of(form, **options)
    found = MAPPED[form](state, config_of(form, **options))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), found) == jax.tree.map(lambda x: (x.shape, x.dtype), expected)
    assert {x.flat[0] for x in jax.tree.leaves(found)} == set(range(len(state)))


@pytest.mark.parametrize(("form", "options"), VARIANTS)
def test_parameters_lead_back_to_the_state(form, options):
    config = config_of(form, **options)
    state = state_of(form, **options)
    if not options.get("controls", True) and form == "maskgit":
        state = {name: x for name, x in state.items() if "cross" not in name}
    back = BACK[form](MAPPED[form](state, config), config)
    assert back.keys() == state.keys()
    jax.tree.map(np.testing.assert_array_equal, back, state)


def test_rows_of_in_proj_are_query_key_value():
    weight = np.arange(48, dtype=np.float32).reshape(12, 4)
    state = state_of("maskgit") | {"blocks.0.cross_attn.fn.mha.in_proj_weight": weight}
    block = params_of(state, config_of("maskgit"))["params"]["block_0"]
    np.testing.assert_array_equal(block["cross_query"]["kernel"], weight[:4].T)
    np.testing.assert_array_equal(block["cross_key_value"]["kernel"], weight[4:].T)


@pytest.mark.parametrize(("form", "name"), [(form, name) for form in MODELS for name in shapes_of(form)])
def test_missing_key_is_named(form, name):
    refused(form, {key: x for key, x in state_of(form).items() if key != name}, f"the state lacks {name}")


@pytest.mark.parametrize(("form", "name"), [(form, name) for form in MODELS for name in shapes_of(form)])
def test_wrong_shape_is_named(form, name):
    shape = list(shapes_of(form)[name])
    wrong = state_of(form) | {name: np.zeros([*shape, 1])}
    refused(form, wrong, f"{name} has shape {[*shape, 1]}, not {shape}")


@pytest.mark.parametrize("form", MODELS)
def test_keys_left_over_are_named(form):
    refused(form, state_of(form) | {"tok_emb": np.zeros(3)}, "the state holds tok_emb without a place")
    refused(
        form, state_of(form), "the state holds adaLN_modulation.bias and 5 other keys without a place", embed_t=False
    )


@pytest.mark.parametrize("form", MODELS)
def test_blocks_of_another_number_are_refused(form):
    with pytest.raises(ValueError, match=r"^the state lacks blocks\.1\.cross_attn"):
        MAPPED[form](state_of(form), config_of(form, n_block=2))
    with pytest.raises(ValueError, match=r"^the state holds blocks\.1\.cross_attn.* other keys without a place$"):
        MAPPED[form](state_of(form, n_block=2), config_of(form))


def test_weights_with_controls_do_not_fit_the_ablation_without():
    with pytest.raises(ValueError, match=r"^the state holds blocks\.0\.cross_attn.* other keys without a place$"):
        params_of(state_of("maskgit"), config_of("maskgit", controls=False))
    refused(
        "dimoo",
        state_of("dimoo"),
        "the state holds new_token_proj_in.bias and 1 other keys without a place",
        controls=False,
    )
