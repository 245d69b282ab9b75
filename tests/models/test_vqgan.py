"""Patches, nearest codes and the straight-through tokenizer."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskrl_jax.models.vqgan import Tokenizer, TokenizerConfig, from_patches, nearest_code, to_patches

CONFIG = TokenizerConfig(image_size=8, patch=4, codebook_size=5, code_width=3, hidden=6, decoder_width=4)
IMAGES = jax.random.uniform(jax.random.key(0), (2, 8, 8, 3))
CODEBOOK = jax.random.normal(jax.random.key(1), (5, 3))


def tokenizer():
    model = Tokenizer(CONFIG)
    return model, jax.jit(model.init)(jax.random.key(2), IMAGES, CODEBOOK)


def test_patches_are_cut_row_by_row():
    image = jnp.arange(2 * 4).reshape(1, 2, 4, 1)
    assert to_patches(image, 2).tolist() == [[[[0, 1, 4, 5], [2, 3, 6, 7]]]]


def test_patches_and_back():
    images = jax.random.normal(jax.random.key(0), (2, 6, 9, 3))
    assert to_patches(images, 3).shape == (2, 2, 3, 27)
    np.testing.assert_array_equal(from_patches(to_patches(images, 3), 3), images)


@pytest.mark.parametrize("shape", [(3,), (7, 3), (2, 4, 4, 3)])
def test_nearest_code_is_the_nearest_of_all(shape):
    codes = jax.random.normal(jax.random.key(3), shape)
    distance = ((np.asarray(codes)[..., None, :] - np.asarray(CODEBOOK)) ** 2).sum(-1)
    found = nearest_code(codes, CODEBOOK)
    np.testing.assert_array_equal(found, distance.argmin(-1))
    assert found.dtype == jnp.int32


def test_shapes_and_ids():
    model, params = tokenizer()
    image, codes, ids = model.apply(params, IMAGES, CODEBOOK)
    assert (image.shape, codes.shape, ids.shape) == ((2, 8, 8, 3), (2, 2, 2, 3), (2, 2, 2))
    assert (CONFIG.side, CONFIG.num_tokens) == (2, 4)
    np.testing.assert_array_equal(ids, nearest_code(codes, CODEBOOK))
    decoded = model.apply(params, CODEBOOK[ids], method="decode")
    np.testing.assert_allclose(image, decoded, atol=1e-5)


def test_the_encoder_sees_its_own_patch_only_and_the_decoder_its_neighbours():
    model, params = tokenizer()
    codes = model.apply(params, IMAGES, method="encode")
    changed = model.apply(params, IMAGES.at[:, :4, :4].add(0.5), method="encode")
    moved = np.abs(changed - codes).max((0, 3)) > 1e-6
    assert moved.tolist() == [[True, False], [False, False]]
    pictures = [np.asarray(model.apply(params, x, method="decode")) for x in (codes, codes.at[:, 0, 0].add(1.0))]
    assert (np.abs(pictures[1] - pictures[0])[:, 4:, 4:].max((1, 2, 3)) > 1e-6).all()


def test_quantiser_passes_the_gradient_straight_through():
    """The encoder gets the decoder's gradient at the quantised code; the codebook, kept by EMA, gets none."""
    model, params = tokenizer()

    def whole(params, codebook):
        return jnp.sin(model.apply(params, IMAGES, codebook)[0]).sum()

    to_params, to_codebook = jax.jit(jax.grad(whole, argnums=(0, 1)))(params, CODEBOOK)
    np.testing.assert_array_equal(to_codebook, np.zeros((5, 3)))
    codes = model.apply(params, IMAGES, method="encode")
    ids = nearest_code(codes, CODEBOOK)
    at_code = jax.grad(lambda x: jnp.sin(model.apply(params, x, method="decode")).sum())(CODEBOOK[ids])
    np.testing.assert_allclose(to_params["params"]["encoder_out"]["bias"], at_code.sum((0, 1, 2)), atol=1e-5)


def test_patch_must_divide_the_image():
    with pytest.raises(ValueError, match="image_size 8 is not divisible by patch 3"):
        TokenizerConfig(image_size=8, patch=3)


@pytest.mark.parametrize("size", [field.name for field in dataclasses.fields(TokenizerConfig)])
@pytest.mark.parametrize("value", [0, -1])
def test_sizes_below_one_are_refused(size, value):
    with pytest.raises(ValueError, match=f"^{size} {value} must be at least 1$"):
        dataclasses.replace(CONFIG, **{size: value})
