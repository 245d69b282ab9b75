import numpy as np
import pytest

from maskrl_jax.evaluate import bootstrap


def test_constant_values_have_bounds_of_width_zero():
    interval = bootstrap.mean_interval(np.full(20, 0.25))
    assert (interval.mean, interval.low, interval.high) == pytest.approx((0.25, 0.25, 0.25))


def test_bounds_agree_with_the_standard_error():
    # 100 prompts, half 0, half 1: standard error 0.05, so 0.5 +- 1.96 * 0.05.
    interval = bootstrap.mean_interval(np.tile([0.0, 1.0], 50))
    assert interval.mean == 0.5
    assert (interval.low, interval.high) == pytest.approx((0.402, 0.598), abs=0.012)


def test_pairing_removes_what_prompts_share():
    prompts = np.random.default_rng(0).normal(size=200) * 10
    interval = bootstrap.paired_difference(prompts + 0.5, prompts)
    assert (interval.mean, interval.low, interval.high) == pytest.approx((0.5, 0.5, 0.5))


def test_same_seed_gives_the_same_bounds_and_another_does_not():
    values = np.random.default_rng(0).normal(size=50)
    assert bootstrap.mean_interval(values) == bootstrap.mean_interval(values)
    assert bootstrap.mean_interval(values) != bootstrap.mean_interval(values, seed=1)


def test_seeds_that_disagree_widen_the_bounds():
    # Prompts add nothing. Means of 2 seeds drawn from {0, 1}: 0, 0.5, 1 with 1/4, 1/2, 1/4.
    interval = bootstrap.mean_interval(np.array([[0.0] * 30, [1.0] * 30]))
    assert (interval.mean, interval.low, interval.high) == pytest.approx((0.5, 0.0, 1.0), abs=1e-12)


def test_ratio_of_means():
    interval = bootstrap.paired_ratio(np.array([1.0, 3.0, 2.0]) * 0.9, np.array([1.0, 3.0, 2.0]))
    assert (interval.mean, interval.low, interval.high) == pytest.approx((0.9, 0.9, 0.9))


def test_no_ratio_to_nothing():
    assert bootstrap.paired_ratio(np.ones(4), np.zeros(4)) is None


@pytest.mark.parametrize("values", [np.zeros(0), np.array([0.0, np.nan]), np.zeros((2, 2, 2))])
def test_values_that_cannot_be_averaged(values):
    with pytest.raises(ValueError):
        bootstrap.mean_interval(values)


def test_unpaired_arrays_are_refused():
    with pytest.raises(ValueError, match="differ in shape"):
        bootstrap.paired_difference(np.zeros(3), np.zeros(4))
