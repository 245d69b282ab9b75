"""Moments of a stream equal those of all rows at once, however it is cut."""

import numpy as np
import pytest

from maskrl_jax.evaluate import moments
from maskrl_jax.evaluate.moments import Moments, Stream, merged

ROWS = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)


def close(found, rows, atol=1e-12):
    assert found.count == len(rows)
    np.testing.assert_allclose(found.mean, rows.mean(axis=0, dtype=float), atol=atol)
    np.testing.assert_allclose(found.covariance, np.cov(rows.astype(float), rowvar=False), atol=atol)


@pytest.mark.parametrize("cuts", [(), (1,), (49,), (7, 8, 30)])
def test_batches_of_any_size_give_the_moments_of_all_rows(cuts):
    close(merged(Moments.of(part) for part in np.split(ROWS, cuts)), ROWS)


def test_merging_keeps_its_digits_far_from_the_origin():
    """Sums of squares would be 1e18 here, and their difference of order 1 lost."""
    rows = ROWS.astype(float).round(3) + 1e9
    close(merged(Moments.of(part) for part in np.split(rows, 5)), rows, atol=1e-6)


def test_variance_between_batches_counts():
    # -1 and 1: no variance within either batch, 2 between them.
    assert merged([Moments.of(np.array([[-1.0]])), Moments.of(np.array([[1.0]]))]).covariance.item() == 2


@pytest.mark.parametrize("at_once", [1, 8, 4096])
def test_groups_of_a_stream_take_rows_in_turn(monkeypatch, at_once):
    monkeypatch.setattr(moments, "ROWS_AT_ONCE", at_once)
    stream = Stream(3)
    for part in np.split(ROWS, (20, 21)):
        stream.add(part)
    for index, group in enumerate(stream.groups()):
        close(group, ROWS[index::3])
    close(merged(stream.groups()), ROWS)


def test_groups_without_a_row_are_left_out():
    stream = Stream(5)
    stream.add(ROWS[:2])
    assert [group.count for group in stream.groups()] == [1, 1]


@pytest.mark.parametrize(
    ("rows", "message"),
    [(np.zeros((0, 2)), "M >= 1"), (np.zeros(3), r"\[M, D\]"), (np.array([[np.inf]]), "not finite")],
)
def test_rows_that_have_no_moments_are_refused(rows, message):
    with pytest.raises(ValueError, match=message):
        Moments.of(rows)


def test_one_row_has_no_covariance_and_unlike_features_do_not_merge():
    with pytest.raises(ValueError, match="two samples or more, got 1"):
        _ = Moments.of(ROWS[:1]).covariance
    with pytest.raises(ValueError, match="of 3 and 2 dimensions do not merge"):
        _ = Moments.of(ROWS) + Moments.of(ROWS[:, :2])
