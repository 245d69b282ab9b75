"""Statistics of pictures drawn by hand."""

import numpy as np
import pytest

from maskrl_jax.rewards import statistics


def grey(level, count=1):
    return np.full((count, 4, 4, 3), level, np.float32)


def test_edges_are_steps_of_brightness():
    half = grey(0.0)
    half[:, :, 2:] = 1.0  # 4 of the 12 pairs beside each other, none of the 12 above each other
    np.testing.assert_allclose(statistics.edge_density(half), [4 / 24])
    np.testing.assert_allclose(statistics.edge_density(grey(0.5)), [0])


def test_colour_entropy_of_two_halves_is_one_bit():
    half = grey(0.1)
    half[:, :2, :, 0] = 0.9
    np.testing.assert_allclose(statistics.colour_entropy(half), [np.log(2)])
    np.testing.assert_allclose(statistics.colour_entropy(grey(1.0)), [0], atol=1e-12)


def test_saturation_of_red_and_grey():
    red = grey(0.0)
    red[..., 0] = 0.8
    np.testing.assert_allclose(statistics.saturation(np.concatenate([red, grey(0.3)])), [1, 0], atol=1e-6)


def test_tokens_and_groups():
    assert statistics.token_entropy(np.array([[0, 1], [2, 3]])) == pytest.approx(np.log(4))
    blocks = np.array([[0.0, 0.0], [1.0, 1.0], [0.5, 0.5], [0.5, 0.5]])
    assert statistics.group_diversity(blocks, 2) == pytest.approx(0.5)  # distances 1 and 0


def test_a_batch_without_pictures_has_no_statistics():
    found = statistics.describe(grey(0.0)[:0], np.zeros((0, 4), int), np.zeros((0, 2)), 2)
    assert tuple(found) == statistics.NAMES and all(np.isnan(value) for value in found.values())
    found = statistics.describe(grey(0.2, 2), np.zeros((2, 4), int), np.zeros((2, 2)), 2)
    assert all(np.isfinite(value) for value in found.values())
