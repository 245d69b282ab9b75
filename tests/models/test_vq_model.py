"""Meissonic's tokenizer: parity with the reference, codes exactly, and the published size."""

import functools
import math

import fixtures
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskrl_jax.convert.vq_model import config_of, params_of
from maskrl_jax.models.conv_autoencoder import ConvSizes
from maskrl_jax.models.vq_model import VQModel, VQModelConfig

SMALL = VQModelConfig(ConvSizes(4, (1, 2), 1, (), (), middle_attention=False, groups=2), 3, 2, 7)


def channels_last(x):
    return x.transpose(0, 2, 3, 1)


@fixtures.every_configuration("meissonic_vqmodel")
def test_codes_and_images_are_the_reference_s(folder):
    config, state, inputs, outputs = fixtures.load(folder)
    model = VQModel(config_of(config["ctor"]))
    params = params_of(state, model.config)

    @jax.jit
    def run(images, codes):
        apply = lambda x, method: model.apply(params, x, method=method)  # noqa: E731
        ids = apply(images, "encode")
        return apply(images, "latents"), ids, apply(codes, "decode"), apply(ids, "decode")

    with jax.default_matmul_precision("highest"):
        latents, ids, decoded, rebuilt = run(channels_last(inputs["image"]), np.int32(inputs["codes"]))
    np.testing.assert_array_equal(ids, outputs["indices"])
    found = {"latents": latents, "decoded_from_codes": decoded, "recon": rebuilt}
    found |= {"decoded_clipped": np.clip(decoded, 0, 1), "quantized": params["params"]["codebook"][np.asarray(ids)]}
    for name, x in found.items():
        wanted = channels_last(outputs[name])
        np.testing.assert_allclose(x, wanted, rtol=0, atol=2e-5 * np.abs(wanted).max())


def test_published_size():
    """specs/meissonic.md section 1."""
    model = VQModel(VQModelConfig())
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1024, 1024, 3)))["params"]
    counts = {name: sum(math.prod(x.shape) for x in jax.tree.leaves(part)) for name, part in shapes.items()}
    convs = counts.pop("quant") + counts.pop("post_quant")
    assert counts == {"encoder": 58_693_568, "decoder": 87_018_499, "codebook": 524_288} and convs == 8_320
    assert sum(counts.values()) + convs == 146_244_675
    ids = jax.eval_shape(
        lambda p, x: model.apply({"params": p}, x, method="encode"), shapes, jnp.zeros((2, 1024, 1024, 3))
    )
    assert (ids.shape, ids.dtype) == ((2, 64, 64), jnp.int32)
    images = jax.eval_shape(lambda p, x: model.apply({"params": p}, x, method="decode"), shapes, ids)
    assert (images.shape, images.dtype) == ((2, 1024, 1024, 3), jnp.float32)


@functools.cache
def small():
    model = VQModel(SMALL)
    return model, jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))


def test_a_code_that_is_none_gives_nan_and_no_other_image():
    model, params = small()
    ids = np.zeros((3, 4, 6), np.int32)
    ids[0, 0, 0], ids[1, 0, 0] = -1, 7
    images = jax.jit(lambda p, x: model.apply(p, x, method="decode"))(params, ids)
    assert images.shape == (3, 8, 12, 3)
    assert np.isnan(images[:2]).any((1, 2, 3)).all() and np.isfinite(images[2]).all()


def test_an_image_that_is_no_grid_of_cells_is_refused():
    with pytest.raises(ValueError, match="^image of 8 x 9 pixels is not divisible into cells of 2"):
        jax.eval_shape(VQModel(SMALL).init, jax.random.key(0), jnp.zeros((1, 8, 9, 3)))


def test_constant_codes_decode_to_a_constant_away_from_the_borders():
    model, params = small()
    image = jax.jit(lambda p, x: model.apply(p, x, method="decode"))(params, jnp.full((1, 32, 32), 3))
    inside = np.asarray(image)[0, 28:36, 28:36]  # a border reaches 24 pixels far
    np.testing.assert_allclose(inside, np.broadcast_to(inside[0, 0], inside.shape), atol=1e-5)


@pytest.mark.parametrize("name", ["channels", "code_width", "codebook_size"])
def test_impossible_sizes_are_refused(name):
    with pytest.raises(ValueError, match=f"^{name} 0 must be at least 1$"):
        VQModelConfig(**{name: 0})
