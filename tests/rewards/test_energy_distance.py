"""The energy distance of pictures, and its witness as a reward."""

import numpy as np
import pytest

from maskrl_jax.rewards.energy_distance import blocks, energy_distance, witness, witness_of_groups


def plain(*tones):
    return blocks(np.stack([np.full((8, 8, 3), tone, np.float32) for tone in tones]))


def test_mean_distance_to_the_others_less_that_to_real_ones():
    found = witness(plain(0.0, 0.5, 1.0), plain(0.0, 0.4))
    np.testing.assert_allclose(found, [0.75 - 0.2, 0.5 - 0.3, 0.75 - 0.8], atol=1e-6)


def test_given_others_stand_for_what_is_generated():
    found = witness(plain(0.0, 1.0), plain(0.5), plain(0.0, 0.0, 1.0))
    np.testing.assert_allclose(found, [1 / 3 - 0.5, 2 / 3 - 0.5], atol=1e-6)


def test_rounding_of_pictures_that_are_equal_does_not_count():
    """A root of cancelled float32 squares would be 3e-4 for equal pictures: more than what rewards are divided by."""
    picture = np.random.default_rng(0).random((1, 8, 8, 3), np.float32)
    equal = blocks(np.repeat(picture, 4, axis=0))
    assert np.abs(witness(equal, equal)).max() < 1e-7


def test_a_spoilt_picture_counts_for_no_other():
    pictures, real = plain(0.0, 0.5, 1.0), plain(0.0, 0.4)
    spoilt = np.concatenate([pictures, np.full_like(pictures[:1], np.nan)])
    for others in (None, spoilt):
        found = witness(spoilt, real, others)
        assert np.isnan(found[3])
        np.testing.assert_array_equal(found[:3], witness(pictures, real, None if others is None else pictures))
    assert energy_distance(spoilt, real) == energy_distance(pictures, real)


def test_what_is_too_rare_scores_higher_and_a_match_is_neutral():
    real = plain(*[0.2] * 50, *[0.8] * 50)
    rare = witness(plain(*[0.2] * 30, *[0.8] * 70), real)
    assert rare[0] > 0 > rare[-1]
    np.testing.assert_allclose(rare[0] - rare[-1], 0.6 * 0.4, rtol=0.1)
    same = witness(plain(*[0.2] * 50, *[0.8] * 50), real)
    np.testing.assert_allclose(same[0], same[-1], atol=1e-5)


def test_following_the_witness_brings_the_shares_of_real_pictures_back():
    tones, real = np.array([0.2, 0.5, 0.9]), plain(*np.repeat([0.2, 0.5, 0.9], [20, 50, 30]))
    logits = np.zeros(3)
    for _ in range(400):
        share = np.exp(logits) / np.exp(logits).sum()
        others = plain(*np.repeat(tones, np.round(1000 * share).astype(int)))
        value = witness(plain(*tones), real, others)
        logits += 5 * share * (value - share @ value)
    np.testing.assert_allclose(share, [0.2, 0.5, 0.3], atol=0.02)


def test_energy_distance_of_two_tones():
    # 2 x 0.6 between, nothing within.
    np.testing.assert_allclose(energy_distance(plain(0.2, 0.2), plain(0.8, 0.8)), 1.2, atol=1e-2)
    rng = np.random.default_rng(0)
    one, other = (blocks(rng.random((400, 8, 8, 3), np.float32)) for _ in range(2))
    assert abs(energy_distance(one, other)) < 1e-3


def test_texture_within_a_block_does_not_count():
    pair = np.full((2, 8, 8, 3), 0.5, np.float32)
    pair[1, ::2] += 0.2
    pair[1, 1::2] -= 0.2
    np.testing.assert_allclose(*blocks(pair), atol=1e-6)


def test_other_sizes_are_refused():
    with pytest.raises(ValueError, match="do not divide into 4 x 4 blocks"):
        blocks(np.zeros((2, 6, 8, 3), np.float32))


def test_within_prompts_each_group_is_compared_with_its_own_real_pictures():
    ours, reals = plain(0.0, 0.4, 0.6, 1.0), [plain(0.0, 0.4), plain(0.9)]
    found = witness_of_groups(ours, reals)
    np.testing.assert_allclose(found, [0.4 - 0.2, 0.4 - 0.2, 0.4 - 0.3, 0.4 - 0.1], atol=1e-6)
    np.testing.assert_array_equal(found[:2], witness(ours[:2], reals[0]))
