"""The DiMOO backbone: the reference's numbers, the published size, and what padding and a cache may change."""

import dataclasses
import functools
import math
import operator

import fixtures
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskrl_jax.convert.dimoo import config_of, params_of
from maskrl_jax.models.dimoo import SIZES, Dimoo, DimooConfig

CONFIG = DimooConfig(vocab_size=23, codebook_size=6, width=16, depth=3, heads=4, kv_heads=2, mlp_width=12)
IDS = jnp.asarray([[1, 20, 5, 17, 22, 9, 18], [3, 3, 16, 8, 19, 21, 0]])


@functools.cache
def reference(folder):
    """Return (config, params, inputs, expected outputs, tolerances); all rows of the head count as image codes."""
    described, state, inputs, outputs = fixtures.load(folder)
    config = config_of(described["model"], codebook_size=outputs["logits"].shape[-1])
    errors = {name: x["max_abs_err_fp32_vs_fp64"] for name, x in described["fp32_vs_fp64"].items()}
    tolerances = {name: min(8 * error, 1e-4) for name, error in errors.items()}
    return config, params_of(state, config), {name: np.int32(x) for name, x in inputs.items()}, outputs, tolerances


def run(config, params, *args, method="__call__"):
    with jax.default_matmul_precision("highest"):
        return jax.jit(functools.partial(Dimoo(config).apply, method=method))(params, *args)


@fixtures.every_configuration("dimoo_llada")
def test_features_and_logits_are_the_reference_s(folder):
    config, params, inputs, outputs, tolerances = reference(folder)
    features = run(config, params, inputs["input_ids"], method="features")
    np.testing.assert_allclose(features, outputs["last_feat"], rtol=0, atol=tolerances["last_feat"])
    logits = run(config, params, inputs["input_ids"])
    np.testing.assert_allclose(logits, outputs["logits"], rtol=0, atol=tolerances["logits"])


@fixtures.every_configuration("dimoo_llada")
def test_every_layer_is_the_reference_s(folder):
    """The model cut after some layers gives the norm of what the reference's next layer reads."""
    config, params, inputs, outputs, tolerances = reference(folder)
    states, gain = outputs["hidden_states"], params["params"]["norm_out"]["scale"]
    found = run(config, params, inputs["input_ids"], method="embedded")
    np.testing.assert_array_equal(found, states[0])
    for depth in range(1, config.depth):
        first = jax.tree.map(operator.itemgetter(slice(depth)), params["params"]["blocks"])
        short = params["params"] | {"blocks": first}
        sizes = dataclasses.replace(config, depth=depth)
        found = run(sizes, {"params": short}, inputs["input_ids"], method="features")
        x = np.float64(states[depth])
        expected = x / np.sqrt((x**2).mean(-1, keepdims=True) + config.rms_eps) * gain
        np.testing.assert_allclose(found, expected, rtol=0, atol=tolerances["last_feat"])


@fixtures.every_configuration("dimoo_llada")
def test_the_cached_pass_is_the_reference_s(folder):
    config, params, inputs, outputs, tolerances = reference(folder)
    cache = run(config, params, inputs["cache_ids_full"], method="cached")
    close = functools.partial(np.testing.assert_allclose, rtol=0, atol=tolerances["logits"])
    close(cache.logits, outputs["cache_logits_full"])
    places = np.stack([np.flatnonzero(row) for row in inputs["cache_to_compute_mask"]])
    places = np.pad(places, ((0, 0), (0, 2)), constant_values=inputs["cache_to_compute_mask"].shape[1])  # two of none
    found = run(config, params, inputs["cache_ids_partial"], cache, places, method="recomputed")
    close(found.logits, outputs["cache_logits_partial"])


def test_full_size_has_the_published_number_of_parameters():
    ids = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    params = jax.eval_shape(Dimoo(DimooConfig()).init, jax.random.key(0), ids)["params"]
    count = lambda tree: sum(math.prod(x.shape) for x in jax.tree.leaves(tree))  # noqa: E731
    assert count(params["blocks"]) == 32 * 218_112_000
    assert (count(params["tokens"]), count(params["head"])) == (551_108_608, 551_108_608)
    assert count(params) == 8_081_805_312


@functools.cache
def made(**changes):
    """Return (model, params) of the small size."""
    model = Dimoo(dataclasses.replace(CONFIG, **changes))
    params = jax.jit(model.init)(jax.random.key(0), IDS)
    return model, jax.tree.map(
        lambda x: x if x.ndim > 2 else x + 0.3 * jnp.sin(7 * jnp.arange(x.size)).reshape(x.shape), params
    )


@functools.cache
def program(method, **changes):
    model, params = made(**changes)
    return jax.jit(functools.partial(model.apply, params, method=method))


def features(ids=IDS, *rest, **changes):
    return program("features", **changes)(ids, *rest)


def padded(before, ids=IDS):
    """IDS with `before` tokens of padding on the left: (ids, positions, real)."""
    wide = jnp.pad(ids, ((0, 0), (before, 0)), constant_values=11)
    real = jnp.broadcast_to(jnp.arange(wide.shape[1])[None] >= before, wide.shape)
    return wide, jnp.maximum(jnp.cumsum(real, axis=1) - 1, 0), real


def test_padding_on_the_left_changes_nothing():
    found = features(*padded(3))
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found[:, 3:], features(), atol=1e-5)


def test_samples_do_not_see_each_other():
    np.testing.assert_allclose(features(IDS[::-1])[::-1], features(), atol=1e-6)


def test_every_token_sees_every_other():
    moved = np.abs(features(IDS.at[0, 6].set(2))[0] - features()[0]).max(-1)
    assert (moved > 1e-4).all()


def test_only_relative_positions_count():
    there = jnp.broadcast_to(jnp.arange(7)[None], IDS.shape)
    np.testing.assert_allclose(features(IDS, there + 1000, None), features(), atol=1e-3)
    assert np.abs(features(IDS, 2 * there, None) - features()).max() > 1e-2


def test_the_head_of_codes_is_the_last_columns_of_the_vocabulary():
    whole, codes = program("__call__")(IDS), program("logits")(features())
    assert (whole.shape, codes.shape) == ((2, 7, 23), (2, 7, 6))
    np.testing.assert_allclose(codes, whole[..., 17:], atol=1e-6)
    assert CONFIG.code_offset == 17 and DimooConfig().code_offset == 126_356


def test_the_head_of_codes_spends_nothing_on_text():
    """2 x 7 x 6 products of 16: the 17 other rows would cost four times as much."""
    cost = program("logits").lower(jnp.zeros((2, 7, 16))).cost_analysis()
    assert cost["flops"] == 2 * (2 * 7 * 6 * 16)


@pytest.mark.parametrize("places", [range(7), []])
def test_a_pass_of_all_positions_equals_a_full_one_and_of_none_the_cache(places):
    cache, other = program("cached")(IDS), IDS[:, ::-1]
    chosen = np.full((2, 7), 7, np.int32)
    chosen[:, : len(places)] = places
    found = program("recomputed")(other, cache, jnp.asarray(chosen))
    expected = program("cached")(other) if len(places) else cache
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), found, expected)


def test_a_cached_pass_knows_of_padding():
    ids, positions, real = padded(3)
    cache = program("cached")(ids, positions, real)
    np.testing.assert_allclose(cache.logits[:, 3:], program("cached")(IDS).logits, atol=1e-5)
    other, places = ids.at[:, 5].set(13), jnp.asarray([[5, 8, 10], [5, 7, 10]])
    found = program("recomputed")(other, cache, places, positions, real)
    expected = program("recomputed")(other[:, 3:], program("cached")(IDS), places - 3)
    np.testing.assert_allclose(found.logits[:, 3:], expected.logits, atol=1e-5)


@pytest.mark.parametrize("wrong", [-1, 23])
def test_ids_out_of_range_give_nan_and_no_other_row(wrong):
    found = features(IDS.at[0, 0].set(wrong))
    assert np.isnan(found[0]).all() and np.isfinite(found[1]).all()


def test_bfloat16_keeps_logits_and_parameters_in_float32():
    model, params = made(dtype="bfloat16")
    found = program("__call__", dtype="bfloat16")(IDS)
    assert (found.dtype, features(dtype="bfloat16").dtype) == (jnp.float32, jnp.bfloat16)
    assert {x.dtype for x in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    np.testing.assert_allclose(found, program("__call__")(IDS), atol=0.1)
    published = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    logits = jax.jit(model.apply)(published, IDS)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, found, atol=0.1)


def test_remat_and_unrolling_change_nothing():
    params = made()[1]

    def gradient(**changes):
        model = Dimoo(dataclasses.replace(CONFIG, **changes))
        return jax.jit(jax.grad(lambda p: jnp.sin(model.apply(p, IDS)).sum()))(params)

    plain = gradient()
    assert all(np.abs(x).max() > 1e-4 for x in jax.tree.leaves(plain))
    for changes in ({"remat": True}, {"unroll": 3}):
        jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-4), plain, gradient(**changes))


def test_start_of_the_tables_and_of_what_blocks_add():
    """Std 1/sqrt(fan_in), of the two output matrices divided by sqrt(2 (layer + 1)); the cut takes 1.3 % of it."""
    model = Dimoo(dataclasses.replace(CONFIG, vocab_size=500, width=64, mlp_width=256))
    params = jax.jit(model.init)(jax.random.key(0), IDS)["params"]
    blocks = params["blocks"]
    for layer in range(3):
        shrink = (2 * (layer + 1)) ** -0.5
        for name, fan_in, factor in (
            ("query", 64, 1),
            ("mlp_up", 64, 1),
            ("out", 64, shrink),
            ("mlp_out", 256, shrink),
        ):
            kernel = blocks[name]["kernel"][layer]
            np.testing.assert_allclose(kernel.std(), 0.987 * factor * fan_in**-0.5, rtol=0.06)
            assert np.abs(kernel).max() <= 3.001 * factor * fan_in**-0.5
    assert [blocks[name]["kernel"].shape for name in ("query", "key", "mlp_out")] == [
        (3, 64, 64),
        (3, 64, 32),
        (3, 256, 64),
    ]
    for name in ("tokens", "head"):
        np.testing.assert_allclose(params[name].std(), 0.987 / 8, rtol=0.02)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"heads": 3}, "^width 16 is not divisible by heads 3$"),
        ({"heads": 16}, "^head width 1 is odd: no pairs to rotate$"),
        ({"kv_heads": 3}, "^heads 4 is not divisible by kv_heads 3$"),
        ({"codebook_size": 24}, "^codebook_size 24 exceeds the vocab_size 23$"),
        *(({name: 0}, f"^{name} 0 must be at least 1$") for name in SIZES),
    ],
)
def test_impossible_sizes_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **wrong)
