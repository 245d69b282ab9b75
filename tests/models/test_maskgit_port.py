"""Form A of MaskGIT: parity with the reference, parameter counts, and what it may depend on."""

import dataclasses
import functools
import math

import fixtures
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskrl_jax.convert.maskgit_port import params_of, state_of
from maskrl_jax.models.maskgit_port import SIZES, MaskGITPort, PortConfig

CONFIG = PortConfig(num_tokens=9, codebook_size=6, num_classes=3, width=8, depth=2, heads=2, mlp_width=16)
IDS = jnp.array([[6, 0, 1, 2, 3, 4, 5, 6, 6], [6] * 9])
COND = jnp.array([1, 3])  # 3: the null class


@functools.cache
def reference(folder):
    """Return (model, params, inputs with the null class filled in, expected outputs, tolerances)."""
    config, state, inputs, outputs = fixtures.load(folder)
    made = config["ctor"]
    model = MaskGITPort(fixtures.port_sizes(made))
    ids = np.int32(inputs["code"]).reshape(len(inputs["code"]), -1)
    cond = np.int32(np.where(inputs["drop_label"], made["nclass"], inputs["y"]))
    errors = {name: value["max_abs_err_fp32_vs_fp64"] for name, value in config["fp32_vs_fp64"].items()}
    tolerances = {name: min(5 * error, 1e-4) for name, error in errors.items()}
    params = fixtures.round_trip(params_of, state_of, state, model.config)
    return model, params, (ids, cond), outputs, tolerances


@fixtures.every_configuration("maskgit_pt_transformer")
def test_features_and_logits_are_the_reference_s(folder):
    model, params, inputs, outputs, tolerances = reference(folder)
    with jax.default_matmul_precision("highest"):
        features = jax.jit(functools.partial(model.apply, method="features"))(params, *inputs)
        logits = jax.jit(model.apply)(params, *inputs)
    np.testing.assert_allclose(features, outputs["last_feat"], rtol=0, atol=tolerances["last_feat"])
    np.testing.assert_allclose(logits, outputs["logits"], rtol=0, atol=tolerances["logits"])


@fixtures.every_configuration("maskgit_pt_transformer")
def test_controls_are_the_reference_s_input_at_the_image_tokens(folder):
    model, params, (ids, _), outputs, _ = reference(folder)
    count = model.config.num_tokens
    positions = np.broadcast_to(np.arange(count), ids.shape)
    found = model.apply(params, ids, positions, method="controls")
    np.testing.assert_allclose(found, outputs["emb_sum"][:, :count], rtol=0, atol=1e-6)
    some = model.apply(params, ids[:, [3, 1]], positions[:, [3, 1]], method="controls")
    np.testing.assert_array_equal(some, found[:, [3, 1]])


@fixtures.every_configuration("maskgit_pt_transformer")
def test_vocabulary_rows_are_the_reference_s(folder):
    config, model = fixtures.load(folder)[0], reference(folder)[0].config
    assert (model.mask_id, model.null_class) == (config["mask_id"], config["null_class_id"])
    assert model.num_tokens + model.cond_length == config["seq_len"]


@pytest.mark.parametrize(("num_tokens", "count"), [(1024, 176_306_666), (256, 174_160_874)])
def test_full_size_has_the_published_number_of_parameters(num_tokens, count):
    model = MaskGITPort(PortConfig(num_tokens=num_tokens))
    ids, cond = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((1, num_tokens), (1,)))
    params = jax.eval_shape(model.init, jax.random.key(0), ids, cond)
    assert sum(math.prod(x.shape) for x in jax.tree.leaves(params)) == count


@functools.cache
def made(**changes):
    """Return (model, params), the parameters all different from their start."""
    model = MaskGITPort(dataclasses.replace(CONFIG, **changes))
    params = jax.jit(model.init)(jax.random.key(0), IDS, COND)
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    moved = [x + 0.3 * jax.random.normal(key, x.shape) for key, x in zip(keys, leaves, strict=True)]
    return model, jax.tree.unflatten(tree, moved)


@functools.cache
def program(method, **changes):
    model, params = made(**changes)
    return jax.jit(functools.partial(model.apply, params, method=method))


def logits(ids=IDS, cond=COND, **changes):
    return program("__call__", **changes)(ids, cond)


def test_start_of_the_tied_table_positions_and_bias():
    model = MaskGITPort(dataclasses.replace(CONFIG, width=256, depth=1))
    params = jax.jit(model.init)(jax.random.key(0), IDS, COND)["params"]
    assert [params[name].shape for name in ("tokens", "position", "bias")] == [(11, 256), (10, 256), (10, 11)]
    np.testing.assert_allclose(params["tokens"].std(), 1, atol=0.05)
    np.testing.assert_allclose(params["position"].std(), 0.02, atol=0.003)
    np.testing.assert_array_equal(params["bias"], np.zeros((10, 11)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logits_are_float32_and_hold_no_mask(dtype):
    """K = 6 columns: MASK = 6 can be an input, never an output."""
    found = logits(dtype=dtype)
    assert (found.shape, found.dtype) == ((2, 9, 6), jnp.float32)
    assert CONFIG.mask_id == 6
    np.testing.assert_allclose(found, logits(), atol={"float32": 0, "bfloat16": 0.3}[dtype])


def test_bfloat16_keeps_features_and_parameters_in_float32():
    assert program("features", dtype="bfloat16")(IDS, COND).dtype == jnp.float32
    assert {x.dtype for x in jax.tree.leaves(made(dtype="bfloat16")[1])} == {np.dtype(np.float32)}


def test_logits_of_features_agree_with_and_without_the_class_slot():
    features = program("features")(IDS, COND)
    assert (features.shape, features.dtype) == ((2, 10, 8), jnp.float32)
    for slots in (10, 9):
        np.testing.assert_allclose(program("logits")(features[:, :slots]), logits(), atol=1e-5)
        np.testing.assert_allclose(program("logits")(features[1, :slots]), logits()[1], atol=1e-5)


def test_head_is_tied_to_the_codes_and_has_a_bias_by_position():
    params = made()[1]["params"]
    features = program("features")(IDS, COND)
    expected = (
        np.asarray(features)[:, :9] @ np.asarray(params["tokens"])[:6].T + np.asarray(params["bias"])[None, :9, :6]
    )
    np.testing.assert_allclose(program("logits")(features), expected, atol=1e-5)


def test_head_spends_nothing_on_the_class_slot_and_the_other_rows():
    """2 x 9 x 6 entries of 8 products and a bias; all 10 positions and 11 rows would cost twice as much."""
    cost = program("logits").lower(jnp.zeros((2, 10, 8))).cost_analysis()
    assert cost["flops"] == 2 * 9 * 6 * (2 * 8 + 1)


@pytest.mark.parametrize("slots", [1, 8, 11])
def test_features_of_another_length_are_refused(slots):
    model, params = made()
    with pytest.raises(ValueError, match=f"^features of {slots} positions; the model has 9 and the class"):
        model.apply(params, jnp.zeros((2, slots, 8)), method="logits")


def test_every_token_sees_every_other_and_the_class():
    base = logits()
    assert (np.abs(logits(IDS.at[0, 4].set(0))[0] - base[0]).max(-1) > 1e-5).all()
    assert (np.abs(logits(cond=COND.at[0].set(0))[0] - base[0]).max(-1) > 1e-5).all()


def test_samples_do_not_see_each_other():
    np.testing.assert_allclose(logits(IDS[::-1], COND[::-1])[::-1], logits(), atol=1e-5)


def test_classes_come_with_or_without_an_axis():
    np.testing.assert_array_equal(logits(cond=COND[:, None]), logits())


@pytest.mark.parametrize(("wrong_id", "wrong_class"), [(-1, 0), (7, 0), (0, -1), (0, 4)])
def test_ids_and_classes_out_of_range_give_nan_and_no_other_row(wrong_id, wrong_class):
    found = logits(IDS.at[0, 0].set(wrong_id), COND.at[0].set(wrong_class))
    assert np.isnan(found[0]).all() and np.isfinite(found[1]).all()


def test_remat_changes_nothing():
    params = made()[1]

    def gradient(**changes):
        model = MaskGITPort(dataclasses.replace(CONFIG, **changes))
        return jax.jit(jax.grad(lambda p: jnp.sin(model.apply(p, IDS, COND)).sum()))(params)

    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-4), gradient(), gradient(remat=True))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_tokens": 8}, "^num_tokens 8 is not a square grid$"),
        ({"heads": 3}, "^width 8 is not divisible by heads 3$"),
        *(({name: 0}, f"^{name} 0 must be at least 1$") for name in SIZES),
        ({"heads": -2}, "^heads -2 must be at least 1$"),
    ],
)
def test_impossible_sizes_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **wrong)
