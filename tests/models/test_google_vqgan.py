"""Google's VQGAN: parity with the original, parameter counts, and its blocks that end the stream."""

import dataclasses
import functools

import fixtures
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskrl_jax.convert.google_vqgan import params_of, state_of
from maskrl_jax.models.google_vqgan import Block, GoogleVQGAN, GoogleVQGANConfig, quantiser_losses

SMALL = GoogleVQGANConfig(32, (1, 2), 1, codebook_size=12, code_width=4)
IMAGES = jax.random.uniform(jax.random.key(0), (2, 8, 12, 3))


def sizes_of(made):
    assert (made["quantizer"], made["activation_fn"], made["norm_type"]) == ("vq", "swish", "GN")
    return GoogleVQGANConfig(
        made["filters"],
        made["channel_multipliers"],
        made["num_res_blocks"],
        made["conv_downsample"],
        made["codebook_size"],
        made["embedding_dim"],
    )


@fixtures.every_configuration("gmaskgit_vqgan")
def test_codes_pictures_and_losses_are_the_original_s(folder):
    config, state, inputs, outputs = fixtures.load(folder)
    made = config["vqvae"]
    model = GoogleVQGAN(sizes_of(made))
    params = fixtures.round_trip(params_of, state_of, state, model.config)
    with jax.default_matmul_precision("highest"):
        rebuilt, latents, ids = jax.jit(model.apply)(params, inputs["image"])
        decoded = jax.jit(functools.partial(model.apply, method="decode"))(params, inputs["codes"])
        losses = quantiser_losses(
            latents,
            jnp.asarray(params["params"]["codebook"]),
            commitment=made["commitment_cost"],
            entropy=made["entropy_loss_ratio"],
            temperature=made["entropy_temperature"],
            target=made["entropy_loss_type"],
        )
    np.testing.assert_array_equal(ids, outputs["indices"])
    found = {
        "encoder_out": latents,
        "quantized": params["params"]["codebook"][ids],
        "recon": rebuilt,
        "decoded_from_codes": decoded,
        "train_quantizer_loss": losses.total,
        "train_e_latent_loss": losses.to_latents,
        "train_q_latent_loss": losses.to_codes,
        "train_entropy_loss": losses.entropy,
    }
    for name, array in found.items():
        fixtures.close(array, outputs[name], config, name)


def test_full_size_has_the_published_number_of_parameters():
    shapes = jax.eval_shape(GoogleVQGAN(GoogleVQGANConfig()).init, jax.random.key(0), jnp.zeros((1, 256, 256, 3)))
    count = {name: sum(x.size for x in jax.tree.leaves(part)) for name, part in shapes["params"].items()}
    assert count == {"encoder": 23_775_104, "codebook": 262_144, "decoder": 30_478_339}
    assert sum(count.values()) == 54_515_587


@functools.cache
def small(**changes):
    model = GoogleVQGAN(dataclasses.replace(SMALL, **changes))
    return model, fixtures.random_params(model, IMAGES, scale=0.05)


@pytest.mark.parametrize("conv_downsample", [False, True])
def test_a_grid_need_not_be_square_and_the_tree_comes_back(conv_downsample):
    model, params = small(conv_downsample=conv_downsample)
    picture, latents, ids = jax.jit(model.apply)(params, IMAGES)
    assert (picture.shape, latents.shape, ids.shape) == (IMAGES.shape, (2, 4, 6, 4), (2, 4, 6))
    back = params_of(state_of(params, model.config), model.config)
    jax.tree.map(np.testing.assert_array_equal, back, params)


def test_where_channels_change_the_input_counts_through_the_convolutions_alone():
    """With the first convolution at 0 nothing of the input is left; a block of equal channels passes it on."""
    x = jax.random.normal(jax.random.key(2), (1, 4, 4, 32))
    for features, left in ((64, False), (32, True)):
        block = Block(features)
        params = fixtures.random_params(block, x)
        params["params"]["conv1"]["kernel"] *= 0
        apply = jax.jit(block.apply)
        assert (np.abs(apply(params, x) - apply(params, jnp.zeros_like(x))).max() > 0) == left


def test_a_code_that_is_none_gives_nan_in_its_sample_alone():
    model, params = small()
    decode = jax.jit(functools.partial(model.apply, method="decode"))
    for code in (-1, 12):
        picture = decode(params, np.zeros((2, 4, 6), np.int32) + code * (np.arange(48) == 7).reshape(2, 4, 6))
        assert np.isnan(picture[0]).any() and np.isfinite(picture[1]).all()


def test_bfloat16_keeps_parameters_and_results_in_float32():
    model, params = small(dtype="bfloat16")
    assert {x.dtype for x in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    rebuilt, latents, _ = jax.jit(model.apply)(params, IMAGES)
    assert (rebuilt.dtype, latents.dtype) == (jnp.float32, jnp.float32)
    wanted = jax.jit(functools.partial(small()[0].apply, method="latents"))(params, IMAGES)
    np.testing.assert_allclose(latents, wanted, atol=0.05 * np.abs(wanted).max())


def test_losses_of_two_latents_on_their_codes():
    """Two latents on two codes far apart: no distance, each sure of its own, both used alike: - ln 2."""
    codes = jnp.array([[0.0], [1.0]])
    losses = jax.jit(quantiser_losses)(codes, codes, entropy=0.5)
    np.testing.assert_allclose(losses, [-0.5 * np.log(2), 0, 0, -0.5 * np.log(2)], atol=1e-4)
    for target in ("softmax", "argmax"):  # one code for all: both entropies are 0
        found = jax.jit(quantiser_losses, static_argnames="target")(jnp.zeros((2, 1)), codes, target=target)
        assert abs(found.entropy) < 1e-5


def test_argmax_has_the_gradient_of_the_softmax_distribution():
    latents, codes = jnp.array([[0.45], [0.7]]), jnp.array([[0.0], [1.0]])
    grads = [
        jax.jit(jax.grad(lambda z, t=t: quantiser_losses(z, codes, temperature=1.0, target=t).entropy))(latents)
        for t in ("softmax", "argmax")
    ]
    assert all(np.abs(grad).max() > 1e-4 for grad in grads)
    assert np.abs(grads[0] - grads[1]).max() > 1e-4


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"blocks": 0}, "^sizes and multipliers must be at least 1"),
        ({"width": 16}, "^width 16 times a multiplier must be divisible by the 32 groups"),
    ],
)
def test_bad_sizes_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **wrong)


def test_unknown_entropy_losses_and_pictures_of_half_cells_are_refused():
    with pytest.raises(ValueError, match="^entropy loss 'hard' is not one of softmax, argmax$"):
        quantiser_losses(jnp.zeros((1, 1)), jnp.zeros((2, 1)), target="hard")
    model, params = small()
    with pytest.raises(ValueError, match="^images of 7 x 12 pixels do not fall into patches of 2"):
        model.apply(params, IMAGES[:, :7], method="encode")
