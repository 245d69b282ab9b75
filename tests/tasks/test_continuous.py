"""What all stages of the continuous-token family share."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskrl_jax.distill import diffusion
from maskrl_jax.errors import UserError
from maskrl_jax.evaluate.measure import System
from maskrl_jax.tasks.continuous import MarSampler, Network, Studio

CHANNELS, PROCESS = 3, diffusion.make_process(1000)
PARAMS = {"params": {"denoiser": {}}}  # of a stand-in, which has none


def network(prediction):
    """A head that says .5 for every channel of noise and .25 for its variance, whatever it is asked."""
    out = jnp.concatenate([jnp.full((2, 4, CHANNELS), 0.5), jnp.full((2, 4, CHANNELS), 0.25)], axis=-1)
    config = types.SimpleNamespace(prediction=prediction)
    return Network(types.SimpleNamespace(apply=lambda *_, method: out, config=config))


@pytest.mark.parametrize("step", [0, 500, 755, 999])
def test_a_velocity_makes_its_start_without_a_division(step):
    state = jnp.linspace(-2, 2, 2 * 4 * CHANNELS).reshape(2, 4, CHANNELS)
    noise, share = diffusion.split(network("velocity").head(PARAMS, state, jnp.int32(step), None))
    np.testing.assert_array_equal(share, 0.25)
    alpha, sigma = PROCESS.alpha[step], PROCESS.sigma[step]
    np.testing.assert_allclose(noise, sigma * state + alpha * 0.5, rtol=1e-6)
    # x_0 = alpha x_t - sigma v; what is left of the division at 999 is float32's rounding of 1 - sigma^2.
    start = diffusion.predicted_start(PROCESS, state, jnp.full((2, 4), step), noise)
    np.testing.assert_allclose(start, alpha * state - sigma * 0.5, atol=5e-3 if step == 999 else 1e-5)


@pytest.mark.parametrize("step", [20, 500, 998])
def test_the_error_of_a_velocity_is_that_of_the_noise_over_alpha(step):
    start, noise, guess = (jax.random.normal(jax.random.key(i), (2, 4, CHANNELS)) for i in range(3))
    places = jnp.full((2, 4), step)
    state = diffusion.noised(PROCESS, start, places, noise)
    velocity = PROCESS.alpha[step] * noise - PROCESS.sigma[step] * start
    made = diffusion.noise_of_velocity(PROCESS, state, places, guess)
    found = diffusion.velocity_error(PROCESS, places, jnp.square(noise - made).mean(-1))
    np.testing.assert_allclose(found, jnp.square(velocity - guess).mean(-1), rtol=1e-2 if step == 998 else 1e-4)


def test_a_head_that_predicts_noise_is_the_network():
    out = network("noise").head(PARAMS, jnp.ones((2, 4, CHANNELS)), jnp.int32(7), None)
    np.testing.assert_array_equal(out[..., :CHANNELS], 0.5)


@pytest.mark.parametrize(
    "bad", [{"method": "euler"}, {"temperature": 0.0}, {"full_noise": -1}, {"inner_steps": 0}, {"num_steps": 0}]
)
def test_bad_samplers_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad)) if "inner_steps" not in bad else "steps"):
        MarSampler(**bad)


def studio(**settings):
    """Of a grid of 16 tokens; the system knows its sampler alone."""
    engine = types.SimpleNamespace(codec=types.SimpleNamespace(config=types.SimpleNamespace(num_tokens=16)))
    return Studio(engine, None, MarSampler(8, 20), lambda sampler: System("fixed", str(sampler), None), **settings)


def test_a_user_changes_what_the_sampler_has():
    system, setting, words = studio().asked({"num_steps": 4, "inner_steps": 10, "guidance": 1.5}, None)
    assert setting == 4 and "10 steps of the chain, guidance 1.5" in words
    assert system.label == str(MarSampler(4, 10, guidance=1.5))
    assert studio().asked({}, None)[1] == 8


@pytest.mark.parametrize(
    ("settings", "asked", "message"),
    [
        ({}, {"gumbel": 1.0}, "--gumbel changes nothing"),
        ({"takes": ("num_steps", "temperature")}, {"guidance": 2.0}, "it takes --num_steps, --temperature"),
        ({}, {"num_steps": 17}, "--num_steps=17 must lie in 1..16"),
        ({}, {"num_steps": 0}, "num_steps 0"),
        ({}, {"guidance_schedule": "cosine"}, "cosine"),
    ],
)
def test_what_means_nothing_is_refused(settings, asked, message):
    with pytest.raises((UserError, ValueError), match=message):
        studio(**settings).asked(asked, None)


def test_a_picture_cannot_be_made_anew_in_part():
    with pytest.raises(UserError, match="--image"):
        studio().inpainting(np.zeros((32, 32, 3)), [0, 0, 8, 8])
