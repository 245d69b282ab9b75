"""The transformer of Halton-MaskGIT: parity with the reference, and what it may depend on."""

import dataclasses
import functools

import fixtures
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskrl_jax.convert.halton import params_of, state_of
from maskrl_jax.models.halton import SIZES, HaltonConfig, HaltonMaskGIT

CONFIG = HaltonConfig(num_tokens=4, codebook_size=5, num_classes=3, width=8, depth=2, heads=2, mlp_width=16)
IDS = jnp.array([[5, 0, 1, 2], [5] * 4])
COND = jnp.array([1, 3])  # 3: the null class


@fixtures.every_configuration("halton_transformer")
def test_entries_are_the_reference_s(folder):
    config, state, inputs, outputs = fixtures.load(folder)
    made = config["ctor"]
    model = HaltonMaskGIT(fixtures.halton_sizes(made))
    assert model.config.hidden == config["ff_hidden"]
    params = fixtures.round_trip(params_of, state_of, state, model.config)
    ids = np.int32(inputs["code"]).reshape(len(inputs["code"]), -1)
    cond = np.int32(np.where(inputs["drop_label"], made["nclass"], inputs["y"]))
    with jax.default_matmul_precision("highest"):
        features = jax.jit(functools.partial(model.apply, method="features"))(params, ids, cond)
        entries = jax.jit(functools.partial(model.apply, method="entries"))(params, features)
        logits = jax.jit(model.apply)(params, ids, cond)
    fixtures.close(entries, outputs["logits"], config, "logits")
    np.testing.assert_allclose(logits, entries[..., :-1], atol=1e-4)


@functools.cache
def made(**changes):
    """Return (model, params)."""
    model = HaltonMaskGIT(dataclasses.replace(CONFIG, **changes))
    return model, fixtures.random_params(model, IDS, COND)


@functools.cache
def program(method, **changes):
    model, params = made(**changes)
    return jax.jit(functools.partial(model.apply, params, method=method))


def logits(ids=IDS, cond=COND, **changes):
    return program("__call__", **changes)(ids, cond)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logits_are_float32_and_hold_no_mask(dtype):
    found = logits(dtype=dtype)
    assert (found.shape, found.dtype) == ((2, 4, 5), jnp.float32)
    assert program("features", dtype=dtype)(IDS, COND).dtype == jnp.float32
    np.testing.assert_allclose(found, logits(), atol={"float32": 0, "bfloat16": 0.5}[dtype])


def test_without_registers_there_are_no_parameters_of_any():
    assert "registers" not in made(registers=0)[1]["params"]
    assert logits(registers=0).shape == (2, 4, 5)
    model, params = made(registers=0)
    back = params_of(state_of(params, model.config), model.config)
    jax.tree.map(np.testing.assert_array_equal, back, params)


def test_blocks_start_as_identities():
    model = HaltonMaskGIT(CONFIG)
    params = jax.jit(model.init)(jax.random.key(0), IDS, COND)
    features = jax.jit(functools.partial(model.apply, method="features"))(params, IDS, COND)
    x = params["params"]["tokens"][IDS] + params["params"]["position"][None]
    np.testing.assert_allclose(features, x / np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-5), atol=1e-5)


def test_every_token_sees_every_other_and_the_class():
    base = logits()
    assert (np.abs(logits(IDS.at[0, 2].set(0))[0] - base[0]).max(-1) > 1e-5).all()
    assert (np.abs(logits(cond=COND.at[0].set(0))[0] - base[0]).max(-1) > 1e-5).all()
    np.testing.assert_array_equal(logits(cond=COND[:, None]), base)


def test_controls_are_the_table_and_the_place():
    params = made()[1]["params"]
    found = program("controls")(jnp.array([[2, 5]]), jnp.array([[0, 3]]))
    np.testing.assert_array_equal(found[0], params["tokens"][[2, 5]] + params["position"][[0, 3]])


@pytest.mark.parametrize(("wrong_id", "wrong_class"), [(-1, 0), (6, 0), (0, -1), (0, 4)])
def test_ids_and_classes_out_of_range_give_nan_and_no_other_row(wrong_id, wrong_class):
    found = logits(IDS.at[0, 0].set(wrong_id), COND.at[0].set(wrong_class))
    assert np.isnan(found[0]).all() and np.isfinite(found[1]).all()


def test_remat_changes_nothing_and_every_parameter_has_a_gradient():
    params = made()[1]

    def gradient(**changes):
        model = HaltonMaskGIT(dataclasses.replace(CONFIG, **changes))
        return jax.jit(jax.grad(lambda p: jnp.sin(model.apply(p, IDS, COND)).sum()))(params)

    plain = gradient()
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-4), plain, gradient(remat=True))
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(plain))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_tokens": 8}, "^num_tokens 8 is not a square grid$"),
        ({"heads": 3}, "^width 8 is not divisible by heads 3$"),
        ({"registers": -1}, "^registers -1 must be at least 0$"),
        *(({name: 0}, f"^{name} 0 must be at least 1$") for name in SIZES),
    ],
)
def test_impossible_sizes_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **wrong)
