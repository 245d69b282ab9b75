"""Continuous tokenizers: parity of the convolutional form, sizes, and the embedded form's reach."""

import fixtures
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskrl_jax.convert.kl_vae import params_of, state_of
from maskrl_jax.models.conv_autoencoder import ConvSizes
from maskrl_jax.models.kl_vae import KLVAE, KLVAEConfig

PATCH = KLVAEConfig(image_size=8, patch=4, channels=3, hidden=16, decoder_width=8)


def to_tokens(grid):
    """[B,C,h,w] -> [B,h*w,C]."""
    return np.asarray(grid).transpose(0, 2, 3, 1).reshape(len(grid), -1, grid.shape[1])


@fixtures.every_configuration("mar_vae")
def test_the_convolutional_form_is_the_reference_s(folder):
    config, state, inputs, outputs = fixtures.load(folder)
    made = config["ctor"]
    coarse = lambda sides: [int(np.log2(made["resolution"] // side)) for side in sides]  # noqa: E731
    sizes = ConvSizes(
        made["ch"],
        made["ch_mult"],
        made["num_res_blocks"],
        coarse(made["encoder_attn_resolutions"]),
        coarse(made["decoder_attn_resolutions"]),
    )
    model = KLVAE(KLVAEConfig("conv", made["resolution"], sizes.patch, made["embed_dim"], conv=sizes))
    params = fixtures.round_trip(params_of, state_of, state, model.config)
    images = (inputs["image"].transpose(0, 2, 3, 1) + 1) / 2
    with jax.default_matmul_precision("highest"):
        moments = jax.jit(lambda x: model.apply(params, x, method="encode"))(images)
        decode = jax.jit(lambda x: model.apply(params, x, method="decode") * 2 - 1)
        decoded, scaled = (decode(to_tokens(inputs["latent"]) / by) for by in (1, 0.2325))
        rebuilt, _ = jax.jit(lambda x, e: model.apply(params, x, e))(images, to_tokens(inputs["eps"]))
    close = lambda found, wanted: np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-5)  # noqa: E731
    close(moments.mean, to_tokens(outputs["mean"]))
    close(moments.log_variance, to_tokens(outputs["logvar"]))
    close(moments.sample(to_tokens(inputs["eps"])), to_tokens(outputs["sample"]))
    np.testing.assert_allclose(moments.divergence(), outputs["kl"], rtol=1e-5)
    pictures = {"decoded_latent": decoded, "decoded_latent_div_0_2325": scaled, "recon_from_sample": rebuilt * 2 - 1}
    for name, found in pictures.items():
        wanted = outputs[name].transpose(0, 2, 3, 1)
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4 * max(np.abs(wanted).max(), 1))


def test_published_size():
    model = KLVAE(KLVAEConfig("conv", 256, 16, 16, conv=ConvSizes()))
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 256, 256, 3)), jnp.zeros((1, 256, 16)))
    counts = {name: sum(x.size for x in jax.tree.leaves(part)) for name, part in shapes["params"].items()}
    assert counts == {"encoder": 28_265_760, "decoder": 38_188_931, "quant": 1_056, "post_quant": 272}


def test_the_embedded_form_s_encoder_sees_its_own_patch():
    model = KLVAE(PATCH)
    images = jax.random.uniform(jax.random.key(0), (1, 8, 8, 3))
    params = jax.jit(model.init)(jax.random.key(1), images, jnp.zeros((1, 4, 3)))
    encode = lambda x: model.apply(params, x, method="encode").mean  # noqa: E731
    changed = encode(images.at[:, :4, :4].set(0.0)) - encode(images)
    assert np.abs(changed[0, 0]).max() > 1e-3
    np.testing.assert_array_equal(changed[0, 1:], 0)
    assert model.apply(params, jnp.zeros((1, 4, 3)), method="decode").shape == (1, 8, 8, 3)


def test_the_posterior_is_sampled():
    model = KLVAE(PATCH)
    images = jax.random.uniform(jax.random.key(0), (1, 8, 8, 3))
    params = jax.jit(model.init)(jax.random.key(1), images, jnp.zeros((1, 4, 3)))
    moments = model.apply(params, images, method="encode")
    noise = jax.random.normal(jax.random.key(2), (4000, 4, 3))
    draws = moments.sample(noise)
    np.testing.assert_allclose(draws.mean(0), moments.mean[0], atol=0.1)
    np.testing.assert_allclose(draws.std(0), jnp.exp(0.5 * moments.log_variance[0]), rtol=0.06)
    unit = type(moments)(jnp.zeros((1, 4, 3)), jnp.zeros((1, 4, 3)))
    np.testing.assert_array_equal(unit.divergence(), 0)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"form": "vq"}, "form"),
        ({"form": "conv"}, "conv"),
        ({"image_size": 9}, "image_size 9"),
        ({"channels": 0}, "channels 0"),
        ({"form": "conv", "conv": ConvSizes(), "patch": 8}, "patch 8"),
    ],
)
def test_bad_sizes_are_refused(settings, named):
    with pytest.raises(ValueError, match=named):
        KLVAEConfig(**settings)


@pytest.mark.parametrize("sizes", [{"width": 16}, {"blocks": 0}, {"encoder_attention": (5,)}])
def test_bad_levels_are_refused(sizes):
    with pytest.raises(ValueError):
        ConvSizes(**sizes)
