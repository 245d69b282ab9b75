"""Counts and tables of the integer clock (speed_rl spec 9, oracles 1 and 2)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskrl_jax.sampling.clock import Clock, next_masked


@functools.partial(jax.jit, static_argnums=0)
def walk(clock, tick_T):
    """Count the newly unmasked tokens of every call of a clock that reads these ticks after the calls."""

    def call(masked, tick):
        after = next_masked(clock, tick, masked)
        return after, masked - after

    return jax.lax.scan(call, jnp.int32(clock.num_tokens), tick_T)[1]


def counts_of(clock, num_steps):
    return np.asarray(walk(clock, clock.stride(num_steps) * np.arange(1, num_steps + 1, dtype=np.int32)))


@pytest.mark.parametrize(
    ("num_steps", "first", "last"),
    [
        (4, [312, 888, 1329, 1567], []),
        (6, [140, 409, 651, 848, 988, 1060], []),
        (8, [79, 233, 379, 509, 621, 708, 768, 799], []),
        (16, [20, 59, 98, 135, 172], [390, 398, 401]),
        (48, [3, 6, 11, 16, 19], []),
        (64, [2, 3, 7, 8, 11], []),
    ],
)
def test_counts_of_4096_tokens(num_steps, first, last):
    counts = counts_of(Clock(4096), num_steps)
    assert counts[: len(first)].tolist() == first
    assert counts[len(counts) - len(last) :].tolist() == last
    assert counts.sum() == 4096


def test_every_step_of_a_small_grid_commits_something():
    for num_steps in (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64):
        counts = counts_of(Clock(64), num_steps)
        assert counts.min() >= 1
        assert counts.sum() == 64


def test_timestep_does_not_depend_on_the_number_of_steps():
    clock = Clock(4096)
    assert clock.timestep[np.arange(0, 960, 120)].tolist() == [63, 55, 47, 39, 31, 23, 15, 7]
    assert clock.timestep[np.arange(0, 960, 15)].tolist() == list(range(63, -1, -1))


def test_other_conventions_of_the_timestep():
    ticks = np.arange(0, 960, 120)
    np.testing.assert_allclose(Clock(64, timesteps="mask_ratio").timestep[ticks[[0, 4]]], [1000, 707.1068], rtol=1e-6)
    assert (Clock(64, timesteps="const").timestep == 0).all()
    assert Clock(64, timesteps="countdown", calls=8).timestep[ticks].tolist() == [7, 6, 5, 4, 3, 2, 1, 0]
    with pytest.raises(ValueError, match="use clock, mask_ratio or const$"):
        Clock(64, timesteps="countdown")


def test_noise_falls_linearly_to_zero():
    np.testing.assert_allclose(Clock(16, noise_scale=3.0).noise[[0, 480, 960]], [3.0, 1.5, 0.0])


@pytest.mark.parametrize(
    ("tick", "previous", "expected", "why"),
    [
        (1, 16, 15, "the cosine has not moved yet, one token is committed all the same"),
        (958, 9, 1, "rounding to 0 before the end keeps one"),
        (959, 1, 0, "the last token may go before the end"),
        (40, 0, 0, "nothing left stays nothing"),
        (960, 9, 0, "the end commits the rest"),
        (1500, 9, 0, "so does anything beyond"),
    ],
)
def test_next_masked_at_the_edges(tick, previous, expected, why):
    assert int(next_masked(Clock(16), jnp.int32(tick), jnp.int32(previous))) == expected, why


@pytest.mark.parametrize(("num_steps", "message"), [(7, "does not divide"), (32, "exceeds"), (0, "does not divide")])
def test_impossible_step_counts_are_refused(num_steps, message):
    with pytest.raises(ValueError, match=message):
        Clock(16).stride(num_steps)


def test_empty_grid_is_refused():
    with pytest.raises(ValueError, match="positive"):
        Clock(0)


def test_compounded_noise_of_mask_grpo():
    """0.98, 0.73, 0.31, 0.068 and 0.007 after 1, 5, 10, 15 and 20 of 50 calls; none at the last."""
    clock = Clock(1024, ticks=50, noise_scale=1.0, compounded=50)
    np.testing.assert_allclose(clock.noise[[0, 4, 9, 14, 19]], [0.98, 0.73, 0.31, 0.068, 0.007], atol=5e-3)
    assert clock.noise[49] == clock.noise[50] == 0.0
