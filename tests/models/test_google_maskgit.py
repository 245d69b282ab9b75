"""Form B of MaskGIT: parity with the Flax original, parameter counts, and what it may depend on."""

import dataclasses
import functools
import math

import fixtures
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskrl_jax.convert.google_maskgit import params_of, state_of
from maskrl_jax.models.google_maskgit import SIZES, GoogleMaskGIT, GoogleMaskGITConfig

CONFIG = GoogleMaskGITConfig(num_tokens=6, codebook_size=5, num_classes=3, width=8, depth=2, heads=2, mlp_width=16)
IDS = jnp.array([[5, 0, 1, 2, 3, 4], [5] * 6])
COND = jnp.array([1, 2])


@fixtures.every_configuration("gmaskgit_transformer")
@pytest.mark.parametrize("mask", ["last", "neg1"])
def test_entries_are_the_original_s(folder, mask):
    """All slots and rows; both spellings of MASK are our K."""
    config, state, inputs, outputs = fixtures.load(folder)
    model = GoogleMaskGIT(fixtures.google_sizes(config))
    params = fixtures.round_trip(params_of, state_of, state, model.config)
    ids, cond = fixtures.google_inputs(inputs[f"input_ids_mask_{mask}"], model.config)
    with jax.default_matmul_precision("highest"):
        features = jax.jit(functools.partial(model.apply, method="features"))(params, ids, cond)
        entries = jax.jit(functools.partial(model.apply, method="entries"))(params, features)
        logits = jax.jit(model.apply)(params, ids, cond)
    fixtures.close(entries, outputs[f"logits_mask_{mask}"], config, "logits_mask_last")
    np.testing.assert_allclose(logits, entries[:, 1:, : model.config.codebook_size], atol=1e-4)


@pytest.mark.parametrize(("num_tokens", "count"), [(256, 172_457_193), (1024, 173_047_017)])
def test_full_size_has_the_published_number_of_parameters(num_tokens, count):
    model = GoogleMaskGIT(GoogleMaskGITConfig(num_tokens=num_tokens))
    ids, cond = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((1, num_tokens), (1,)))
    params = jax.eval_shape(model.init, jax.random.key(0), ids, cond)
    assert sum(math.prod(x.shape) for x in jax.tree.leaves(params)) == count


@functools.cache
def made(**changes):
    """Return (model, params)."""
    model = GoogleMaskGIT(dataclasses.replace(CONFIG, **changes))
    return model, fixtures.random_params(model, IDS, COND)


@functools.cache
def program(method, **changes):
    model, params = made(**changes)
    return jax.jit(functools.partial(model.apply, params, method=method))


def logits(ids=IDS, cond=COND, **changes):
    return program("__call__", **changes)(ids, cond)


def test_start_is_a_truncated_normal():
    model = GoogleMaskGIT(dataclasses.replace(CONFIG, width=128, depth=1))
    params = jax.jit(model.init)(jax.random.key(0), IDS, COND)["params"]
    assert [params[name].shape for name in ("tokens", "position", "bias")] == [(9, 128), (7, 128), (9,)]
    for table in (params["tokens"], params["blocks"]["attention"]["qkv"]["kernel"], params["dense"]["kernel"]):
        np.testing.assert_allclose(table.std(), 0.02, atol=0.003)
        assert np.abs(table).max() < 0.05
    assert not params["bias"].any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logits_are_float32_and_hold_no_mask(dtype):
    found = logits(dtype=dtype)
    assert (found.shape, found.dtype) == ((2, 6, 5), jnp.float32)
    assert program("features", dtype=dtype)(IDS, COND).dtype == jnp.float32
    assert {x.dtype for x in jax.tree.leaves(made(dtype=dtype)[1])} == {np.dtype(np.float32)}
    np.testing.assert_allclose(found, logits(), atol={"float32": 0, "bfloat16": 0.3}[dtype])


def test_logits_of_features_agree_with_and_without_the_class_slot():
    features = program("features")(IDS, COND)
    for slots in (6, 7):
        np.testing.assert_allclose(program("logits")(features[:, :slots]), logits(), atol=1e-5)


@pytest.mark.parametrize("slots", [1, 5, 8])
def test_features_of_another_length_are_refused(slots):
    with pytest.raises(ValueError, match=f"^features of {slots} positions; the model has the class and 6"):
        made()[0].apply(made()[1], jnp.zeros((2, slots, 8)), method="logits")


def test_controls_are_the_table_and_the_place():
    params = made()[1]["params"]
    found = program("controls")(jnp.array([[2, 5]]), jnp.array([[0, 4]]))
    wanted = params["tokens"][jnp.array([2, 8])] + params["position"][jnp.array([1, 5])]  # MASK: last row; class first
    np.testing.assert_array_equal(found[0], wanted)


def test_every_token_sees_every_other_and_the_class():
    base = logits()
    assert (np.abs(logits(IDS.at[0, 4].set(0))[0] - base[0]).max(-1) > 1e-5).all()
    assert (np.abs(logits(cond=COND.at[0].set(0))[0] - base[0]).max(-1) > 1e-5).all()
    np.testing.assert_array_equal(logits(cond=COND[:, None]), base)


@pytest.mark.parametrize(("wrong_id", "wrong_class"), [(-1, 0), (6, 0), (8, 0), (0, -1), (0, 3)])
def test_ids_and_classes_out_of_range_give_nan_and_no_other_row(wrong_id, wrong_class):
    found = logits(IDS.at[0, 0].set(wrong_id), COND.at[0].set(wrong_class))
    assert np.isnan(found[0]).all() and np.isfinite(found[1]).all()


def test_remat_changes_nothing_and_every_parameter_has_a_gradient():
    params = made()[1]

    def gradient(**changes):
        model = GoogleMaskGIT(dataclasses.replace(CONFIG, **changes))
        return jax.jit(jax.grad(lambda p: jnp.sin(model.apply(p, IDS, COND)).sum()))(params)

    plain = gradient()
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-4), plain, gradient(remat=True))
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(plain))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"heads": 3}, "^width 8 is not divisible by heads 3$"),
        *(({name: 0}, f"^{name} 0 must be at least 1$") for name in SIZES),
    ],
)
def test_impossible_sizes_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **wrong)
