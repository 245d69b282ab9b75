"""The VQGAN of taming-transformers: parity with the reference, parameter counts, and what it may depend on."""

import dataclasses
import functools

import fixtures
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskrl_jax.convert.taming_vqgan import config_of, params_of, state_of
from maskrl_jax.models.conv_autoencoder import ConvSizes
from maskrl_jax.models.taming_vqgan import TamingVQGAN, TamingVQGANConfig, vq_loss

SMALL = TamingVQGANConfig(ConvSizes(32, (1, 2), 1, (1,), (1,)), channels=8, codebook_size=12, code_width=4)
IMAGES = jax.random.uniform(jax.random.key(0), (2, 8, 12, 3))


def last(images):
    """[B,C,h,w] -> [B,h,w,C]."""
    return np.asarray(images).transpose(0, 2, 3, 1)


@fixtures.every_configuration("taming_vqgan")
def test_codes_pictures_and_loss_are_the_reference_s(folder):
    config, state, inputs, outputs = fixtures.load(folder)
    model = TamingVQGAN(config_of(config))
    params = fixtures.round_trip(params_of, state_of, state, model.config)
    with jax.default_matmul_precision("highest"):
        rebuilt, latents, ids = jax.jit(model.apply)(params, (last(inputs["image"]) + 1) / 2)
        decoded = jax.jit(functools.partial(model.apply, method="decode"))(params, np.int32(inputs["codes"]))
    quantised = params["params"]["codebook"][ids]
    np.testing.assert_array_equal(ids, outputs["indices"])
    wanted = {name: last(outputs[name]) for name in ("pre_quant", "quantized", "recon", "decoded_from_codes")}
    fixtures.close(latents, wanted["pre_quant"], config, "pre_quant")
    fixtures.close(quantised, wanted["quantized"], config, "quantized")
    fixtures.close(rebuilt * 2 - 1, wanted["recon"], config, "recon")
    fixtures.close(decoded * 2 - 1, wanted["decoded_from_codes"], config, "decoded_from_codes")
    fixtures.close(vq_loss(latents, jnp.asarray(quantised)), outputs["vq_loss"], config, "vq_loss")


def test_full_size_has_the_published_number_of_parameters():
    shapes = jax.eval_shape(TamingVQGAN(TamingVQGANConfig()).init, jax.random.key(0), jnp.zeros((1, 256, 256, 3)))
    count = {name: sum(x.size for x in jax.tree.leaves(part)) for name, part in shapes["params"].items()}
    assert (count["encoder"], count["decoder"]) == (29_298_176, 42_449_795)
    assert sum(count.values()) == 72_141_699


@functools.cache
def small(**changes):
    """Return (model, params) at the same parameters whatever the options."""
    model = TamingVQGAN(dataclasses.replace(SMALL, conv=dataclasses.replace(SMALL.conv, **changes)))
    return model, fixtures.random_params(model, IMAGES, scale=0.05)


def test_a_grid_need_not_be_square():
    model, params = small()
    ids = jax.jit(functools.partial(model.apply, method="encode"))(params, IMAGES)
    assert (ids.shape, ids.dtype) == ((2, 4, 6), jnp.int32)
    picture = jax.jit(functools.partial(model.apply, method="decode"))(params, ids)
    assert (picture.shape, picture.dtype) == (IMAGES.shape, jnp.float32)
    np.testing.assert_allclose(picture, jax.jit(model.apply)(params, IMAGES)[0], atol=1e-5)


def test_a_code_that_is_none_gives_nan_in_its_sample_alone():
    model, params = small()
    decode = jax.jit(functools.partial(model.apply, method="decode"))
    for code in (-1, 12):
        picture = decode(params, np.zeros((2, 4, 6), np.int32) + code * (np.arange(48) == 7).reshape(2, 4, 6))
        assert np.isnan(picture[0]).any() and np.isfinite(picture[1]).all()


def test_bfloat16_keeps_parameters_and_results_in_float32():
    (model, params), (exact, _) = small(dtype="bfloat16"), small()
    assert {x.dtype for x in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    rebuilt, latents, _ = jax.jit(model.apply)(params, IMAGES)
    assert (rebuilt.dtype, latents.dtype) == (jnp.float32, jnp.float32)
    wanted = jax.jit(functools.partial(exact.apply, method="latents"))(params, IMAGES)
    np.testing.assert_allclose(latents, wanted, atol=0.05 * np.abs(wanted).max())
    assert np.abs(latents - wanted).max() > 1e-4


def test_the_loss_moves_codes_by_a_quarter():
    """Latents 1 and codes 3: distances 4 and 4; the gradient of a mean of two squares is the difference."""
    latents, codes = jnp.ones((2,)), jnp.full((2,), 3.0)
    assert vq_loss(latents, codes) == 4 + 0.25 * 4
    to_latents, to_codes = jax.grad(vq_loss, (0, 1))(latents, codes)
    assert (to_latents.tolist(), to_codes.tolist()) == ([-2, -2], [0.5, 0.5])


def test_the_decoder_s_gradient_reaches_the_encoder_through_the_quantiser():
    model, params = small()
    grad = jax.jit(jax.grad(lambda p: jnp.sin(model.apply(p, IMAGES)[0]).sum()))(params)["params"]
    assert np.abs(grad["encoder"]["conv_in"]["kernel"]).max() > 0
    assert not np.abs(grad["codebook"]).any()


@pytest.mark.parametrize("name", ["channels", "codebook_size", "code_width"])
def test_sizes_below_one_are_refused(name):
    with pytest.raises(ValueError, match=f"^{name} 0 must be at least 1$"):
        dataclasses.replace(SMALL, **{name: 0})


def test_pictures_that_do_not_fall_into_cells_are_refused():
    model, params = small()
    with pytest.raises(ValueError, match="^images of 8 x 7 pixels do not fall into patches of 2"):
        model.apply(params, IMAGES[:, :, :7], method="encode")
