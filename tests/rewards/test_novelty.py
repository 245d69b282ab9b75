"""Novelty within a group."""

import numpy as np
import pytest

from maskrl_jax.rewards.novelty import novelty


def plain(*tones):
    return np.stack([np.full((8, 8, 3), tone, np.float32) for tone in tones])[None]


def test_distances_to_the_others_are_averaged():
    np.testing.assert_allclose(novelty(plain(0.0, 0.5, 1.0)), [[0.75, 0.5, 0.75]], rtol=1e-6)


def test_the_rarer_kind_scores_higher():
    found = novelty(plain(0.9, 0.9, 0.9, 0.5))[0]
    np.testing.assert_allclose(found, [0.4 / 3] * 3 + [0.4], rtol=1e-5)


def test_texture_within_a_block_does_not_count():
    pair = plain(0.5, 0.5)
    pair[0, 1, ::2] += 0.2
    pair[0, 1, 1::2] -= 0.2
    np.testing.assert_allclose(novelty(pair), [[0.0, 0.0]], atol=1e-6)


def test_groups_do_not_mix():
    both = np.concatenate([plain(0.0, 0.0), plain(1.0, 0.0)])
    np.testing.assert_allclose(novelty(both), [[0, 0], [1, 1]], atol=1e-6)


def test_other_sizes_are_refused():
    with pytest.raises(ValueError, match="do not divide into 4 x 4 blocks"):
        novelty(np.zeros((1, 2, 6, 8, 3), np.float32))
