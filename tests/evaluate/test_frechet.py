import numpy as np
import pytest

from maskrl_jax.evaluate import frechet


def test_diagonal_gaussians_have_the_closed_form():
    # |mean shift|^2 = 9 + 16 = 25; sum of (sd_a - sd_b)^2 = (1 - 2)^2 + (3 - 1)^2 = 5.
    distance = frechet.gaussian_distance([0, 0], np.diag([1.0, 9.0]), [3, 4], np.diag([4.0, 1.0]))
    assert distance == pytest.approx(30.0, abs=1e-12)


def test_full_covariances_that_do_not_commute():
    # A = [[2,1],[1,2]], B = diag(1,4): tr((AB)^1/2) = sqrt(tr(AB) + 2 sqrt(det AB)) = sqrt(10 + 2 sqrt(12)).
    distance = frechet.gaussian_distance([0, 0], [[2.0, 1.0], [1.0, 2.0]], [0, 0], np.diag([1.0, 4.0]))
    assert distance == pytest.approx(9 - 2 * np.sqrt(10 + 2 * np.sqrt(12)), abs=1e-12)


def test_identical_features_are_at_distance_zero_even_if_flat():
    features = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
    features[:, 3] = 1.0  # a singular covariance
    assert frechet.frechet_distance(features, features) == pytest.approx(0.0, abs=1e-9)


def test_moments_are_unbiased_and_float64():
    mean, cov = frechet.moments(np.array([[0.0, 0.0], [2.0, 4.0]], np.float32))
    np.testing.assert_array_equal(mean, [1, 2])
    np.testing.assert_array_equal(cov, [[2, 4], [4, 8]])
    assert cov.dtype == np.float64


def test_features_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="not finite"):
        frechet.moments(np.array([[0.0], [np.nan]]))


def test_precision_and_recall_of_a_collapsed_generator():
    real = np.array([[0.0], [1.0], [2.0], [3.0], [100.0], [101.0], [102.0], [103.0]])
    # All generated points sit among the first four real ones: precise, but half of the real set is missed.
    generated = np.array([[0.5], [1.5], [2.5], [1.0], [2.0]])
    assert frechet.precision_recall(real, generated) == (1.0, 0.5)


def test_precision_of_far_points_is_zero():
    real = np.arange(8.0)[:, None]
    assert frechet.precision_recall(real, real + 1000.0) == (0.0, 0.0)


def test_precision_does_not_depend_on_the_row_blocks(monkeypatch):
    rng = np.random.default_rng(1)
    real, generated = rng.normal(size=(30, 3)), rng.normal(size=(25, 3)) * 2
    whole = frechet.precision_recall(real, generated)
    monkeypatch.setattr(frechet, "ROWS_AT_ONCE", 7)
    assert frechet.precision_recall(real, generated) == whole


def test_too_few_points_for_k_neighbours():
    with pytest.raises(ValueError, match="more than k=3"):
        frechet.precision_recall(np.zeros((3, 2)), np.zeros((9, 2)))
