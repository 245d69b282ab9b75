"""The transformer: shapes, precision, and what it may depend on."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskrl_jax.models.maskgit import SIZES, MaskGIT, MaskGITConfig

CONFIG = MaskGITConfig(
    num_tokens=9, codebook_size=6, cond_vocab=5, cond_length=2, width=8, depth=2, heads=2, mlp_width=8
)
IDS = jnp.array([[6, 0, 1, 2, 3, 4, 5, 6, 6], [6] * 9])
COND = jnp.array([[1, 2], [3, 0]])


@functools.cache
def made(**changes):
    """Return (apply, params) of a model whose parameters are all different from their start."""
    model = MaskGIT(dataclasses.replace(CONFIG, **changes))
    cond = COND if model.config.cond_length == 2 else COND[:, 0]
    params = jax.jit(model.init)(jax.random.key(0), IDS, cond)
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    moved = [x + 0.3 * jax.random.normal(key, x.shape) for key, x in zip(keys, leaves, strict=True)]
    return jax.jit(model.apply), jax.tree.unflatten(tree, moved)


def logits(ids=IDS, cond=COND, **changes):
    apply, params = made(**changes)
    return apply(params, ids, cond)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logits_are_float32_and_hold_no_mask(dtype):
    """K = 6 columns: MASK = 6 can be an input, never an output."""
    found = logits(dtype=dtype)
    assert (found.shape, found.dtype) == ((2, 9, 6), jnp.float32)
    assert CONFIG.mask_id == 6
    np.testing.assert_allclose(found, logits(), atol={"float32": 0, "bfloat16": 0.2}[dtype])


def test_bfloat16_keeps_parameters_in_float32():
    _, params = made(dtype="bfloat16")
    assert {x.dtype for x in jax.tree.leaves(params)} == {np.dtype(np.float32)}


def test_logits_are_the_head_on_the_features():
    model, (_, params) = MaskGIT(CONFIG), made()
    features = jax.jit(lambda: model.apply(params, IDS, COND, method="features"))()
    assert (features.shape, features.dtype) == ((2, 9, 8), jnp.float32)
    np.testing.assert_allclose(model.apply(params, features, method="logits"), logits(), atol=1e-5)
    np.testing.assert_allclose(model.apply(params, features[0, 3], method="logits"), logits()[0, 3], atol=1e-5)


def test_every_token_sees_every_other_and_the_condition():
    base = logits()
    assert (np.abs(logits(IDS.at[0, 4].set(0))[0] - base[0]).max(-1) > 1e-5).all()
    assert (np.abs(logits(cond=COND.at[0, 1].set(4))[0] - base[0]).max(-1) > 1e-5).all()


def test_samples_do_not_see_each_other():
    np.testing.assert_allclose(logits(IDS[::-1], COND[::-1])[::-1], logits(), atol=1e-5)


def test_remat_changes_nothing():
    apply, params = made()
    same = MaskGIT(dataclasses.replace(CONFIG, remat=True)).apply

    def total(apply, params):
        return jnp.sin(apply(params, IDS, COND)).sum()

    close = functools.partial(np.testing.assert_allclose, atol=1e-4)
    jax.tree.map(close, *(jax.jit(jax.grad(functools.partial(total, f)))(params) for f in (apply, same)))


def test_without_spatial_parts_only_position_tells_cells_apart():
    """Exchange two cells with their positions: a model that sees no grid cannot tell."""
    plain = {"conv_stem": False, "relative_bias": False, "local_mixing": False, "pooled_width": 0}
    apply, params = made(**plain)
    order = np.array([0, 5, 2, 3, 4, 1, 6, 7, 8])
    moved = jax.tree.map(lambda x: x, params)
    moved["params"]["position"] = params["params"]["position"][np.concatenate([order, [9, 10]])]
    np.testing.assert_allclose(apply(moved, IDS[:, order], COND), apply(params, IDS, COND)[:, order], atol=1e-4)


def test_class_conditions_come_without_an_axis():
    assert logits(cond=jnp.array([1, 2]), cond_length=1).shape == (2, 9, 6)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_tokens": 8}, "num_tokens 8 is not a square"),
        ({"heads": 3}, "width 8 is not divisible by heads 3"),
        *(({name: 0}, f"^{name} 0 must be at least 1$") for name in SIZES),
        ({"heads": -2}, "^heads -2 must be at least 1$"),
        ({"pooled_width": -1}, "^pooled_width -1 must be at least 0$"),
        ({"pooled_maps": 0}, "^pooled_maps 0 must be at least 1$"),
    ],
)
def test_impossible_sizes_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **wrong)
