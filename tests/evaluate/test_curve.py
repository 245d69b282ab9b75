import json

import numpy as np
import pytest

from maskrl_jax.evaluate import curve

CRITERIA = curve.Criteria({"graded": 0.02})
BASE = np.linspace(0.5, 0.9, 30)


def tuned_curve(make_point, gains, **options):
    """Return points at 2, 4, 8, ... calls whose scores exceed the base's by these gains."""
    return [make_point("tuned", 2 ** (i + 1), 2 ** (i + 1), BASE + gain, **options) for i, gain in enumerate(gains)]


def test_first_equal_is_the_fewest_calls_within_the_margin(make_point):
    reference = [make_point("base", 16, 16, BASE)]
    found = curve.first_equal(tuned_curve(make_point, [-0.3, -0.019, 0.01]), reference, CRITERIA)
    assert (found.best.calls_mean, found.speedup) == (4.0, 4.0)
    assert [row.equal for row in found.table] == [False, True, True]
    assert found.table[0].differences["graded"].low == pytest.approx(-0.3)
    text = curve.verdict(found, 3.0)
    assert text.startswith("Reached: ") and "With 4.0 mean calls [4.0, 4.0] tuned equals base at 16.0 calls" in text
    # By less than the margin, but surely.
    assert text.endswith("Measurably lower nevertheless: graded.")
    assert "graded -0.019 [-0.019, -0.019]" in text


def test_goal_that_is_missed_is_said_to_be_missed(make_point):
    found = curve.first_equal(tuned_curve(make_point, [-0.3, -0.3, 0.0]), [make_point("base", 16, 16, BASE)], CRITERIA)
    assert found.speedup == 2.0
    assert curve.verdict(found, 3.0).startswith("Not reached: ")
    assert curve.verdict(found, 2.0).startswith("Reached: equal quality in 2× fewer calls")


def test_too_few_samples_are_said_to_be_too_few(make_point):
    reference, noise = [make_point("base", 16, 16, BASE)], np.tile([0.2, -0.2], 15)  # bounds of 0.07
    found = curve.first_equal([make_point("tuned", 4, 4, BASE + noise)], reference, CRITERIA)
    assert curve.verdict(found, 3.0).endswith("Too few samples to tell: the mean of graded is within the margin.")
    for worse in (BASE - 0.3, BASE - 0.3 + noise):  # surely, also where the bounds are wide
        found = curve.first_equal([make_point("tuned", 4, 4, worse)], reference, CRITERIA)
        assert "Too few" not in curve.verdict(found, 3.0)


def test_bounds_of_the_fewest_calls(make_point):
    # At 4 calls the lower bound lies about on the margin, so half of the draws fail there and need 8 calls.
    noise = np.tile([0.2, -0.2], 15)
    close = 0.0716 - 0.02
    points = [make_point("tuned", 4, 4, BASE + noise + close), make_point("tuned", 8, 8, BASE)]
    found = curve.first_equal(points, [make_point("base", 16, 16, BASE)], CRITERIA)
    assert found.bounds == pytest.approx((4.0, 8.0))
    # Without the second setting half of the draws have none at all; a distance too large fails in every draw.
    alone = curve.first_equal(points[:1], [make_point("base", 16, 16, BASE)], CRITERIA)
    assert alone.bounds == pytest.approx((4.0, np.inf))
    far = [make_point("tuned", 4, 4, BASE, frechet=20.0), points[1]]
    assert curve.first_equal(far, [make_point("base", 16, 16, BASE)], CRITERIA).bounds == pytest.approx((8.0, 8.0))


def test_none_qualifies(make_point):
    found = curve.first_equal(tuned_curve(make_point, [-0.3, -0.1]), [make_point("base", 16, 16, BASE)], CRITERIA)
    assert found.best is None and found.speedup is None
    text = curve.verdict(found, 3.0)
    assert text.startswith("Not reached: ") and "No measured setting of tuned" in text and "at 4.0 mean calls" in text


def test_the_bound_decides_not_the_mean(make_point):
    # A mean difference of 0 with a spread of 0.2 over 30 prompts: the lower bound is about -0.07.
    noisy = BASE + np.tile([0.2, -0.2], 15)
    comparison = curve.compare([make_point("tuned", 4, 4, noisy)], [make_point("base", 16, 16, BASE)], CRITERIA)
    assert comparison.differences["graded"].mean == pytest.approx(0.0)
    assert comparison.differences["graded"].low == pytest.approx(-0.0716, abs=0.01)
    assert not comparison.equal


@pytest.mark.parametrize(("options", "word"), [({"frechet": 11.5}, "Fréchet"), ({"spread": 0.85}, "diversity")])
def test_distance_and_diversity_are_conditions_too(make_point, options, word):
    reference = [make_point("base", 16, 16, BASE)]
    comparison = curve.compare([make_point("tuned", 4, 4, BASE, **options)], reference, CRITERIA)
    assert len(comparison.failed) == 1 and word in comparison.failed[0]
    loose = curve.Criteria({"graded": 0.02}, frechet_ratio=0.0, diversity_ratio=0.0)
    assert curve.compare([make_point("tuned", 4, 4, BASE, **options)], reference, loose).equal


def test_seeds_are_paired_with_the_reference_of_their_seed(make_point):
    tuned = [make_point("tuned", 4, 4 + seed, BASE + 0.1 * seed, seed=seed) for seed in (0, 1, 2)]
    reference = [make_point("base", 16, 16, BASE + 0.1 * seed, seed=seed) for seed in (2, 1, 0)]
    row = curve.compare(tuned, reference, CRITERIA)
    assert row.calls_mean == 5.0 and row.seeds == (0, 1, 2)
    assert row.seed_differences["graded"] == pytest.approx((0, 0, 0), abs=1e-12)


def test_one_reference_serves_all_seeds_and_disagreement_widens_the_bounds(make_point):
    tuned = [make_point("tuned", 4, 4, BASE + gain, seed=seed) for seed, gain in enumerate((-0.1, 0.0, 0.1))]
    row = curve.compare(tuned, [make_point("base", 16, 16, BASE)], CRITERIA)
    assert row.differences["graded"].mean == pytest.approx(0.0)
    assert row.differences["graded"].low == pytest.approx(-0.1, abs=0.035)


def test_a_seed_without_reference_is_named(make_point):
    reference = [make_point("base", 16, 16, BASE, seed=seed) for seed in (0, 1)]
    with pytest.raises(ValueError, match=r"seed \[2\]"):
        curve.compare([make_point("tuned", 4, 4, BASE, seed=2)], reference, CRITERIA)


def test_a_margin_for_what_was_not_measured_is_an_error(make_point):
    point = make_point("base", 16, 16, BASE)
    with pytest.raises(ValueError, match="clip"):
        curve.compare([point], [point], curve.Criteria({"clip": 0.1}))


def test_table_is_plain_json(make_point):
    found = curve.first_equal(tuned_curve(make_point, [0.0]), [make_point("base", 16, 16, BASE)], CRITERIA)
    plain = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert plain["speedup"] == 8.0 and plain["table"][0]["failed"] == []


def test_interval_of_a_set_distance_is_its_range_over_seeds(make_point):
    points = [make_point("base", 16, 16, BASE, seed=seed, frechet=value) for seed, value in enumerate((9.0, 12.0))]
    interval = curve.interval_over_seeds(points, "frechet")
    assert (interval.mean, interval.low, interval.high) == (10.5, 9.0, 12.0)
    assert curve.interval_over_seeds(points, "strict") is None
