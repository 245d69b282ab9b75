"""Which steps run the full model."""

import itertools

import numpy as np
import pytest

from maskrl_jax.sampling import refresh

# specs/shortcut.md section 8: N, B, F, longest open-loop run.
SETS = [
    (15, 5, "0 3 6 9 12", 2),
    (15, 7, "0 2 4 6 9 11 13", 2),
    (15, 8, "0 2 4 6 8 9 11 13", 1),
    (15, 10, "0 2 3 4 6 8 9 10 12 14", 1),
    (32, 8, "0 4 8 12 16 20 24 28", 3),
    (32, 9, "0 4 7 11 14 18 21 25 28", 3),
    (32, 12, "0 3 5 8 11 13 16 19 21 24 27 29", 2),
    (64, 9, "0 7 14 21 28 36 43 50 57", 7),
    (64, 11, "0 6 12 17 23 29 35 41 47 52 58", 5),
    (64, 14, "0 5 9 14 18 23 27 32 37 41 46 50 55 59", 4),
]


@pytest.mark.parametrize(("num_steps", "budget", "steps", "longest"), SETS)
def test_the_official_sets(num_steps, budget, steps, longest):
    found = refresh.even_steps(num_steps, budget)
    assert found == tuple(map(int, steps.split()))
    assert max(np.diff([*found, num_steps])) - 1 == longest


def test_one_full_step_and_all_of_them():
    assert refresh.even_steps(6, 1) == (0,)
    assert refresh.even_steps(6, 6) == tuple(range(6))


@pytest.mark.parametrize("budget", [0, 7])
def test_a_budget_beyond_the_steps_is_refused(budget):
    with pytest.raises(ValueError, match=r"must lie in 1\.\.6"):
        refresh.even_steps(6, budget)


def _total(error_AK, counts, steps):
    """The cost of a set, as section 6 writes it."""
    edges = [*steps, len(counts)]
    return sum(
        counts[a + k] * error_AK[a, k] for a, b in zip(edges[:-1], edges[1:], strict=True) for k in range(1, b - a)
    )


@pytest.mark.parametrize("budget", [1, 2, 3, 5, 7])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_calibrated_set_is_the_best_of_all(budget, seed):
    rng = np.random.default_rng(seed)
    error_AK, counts = rng.random((7, 7)), rng.integers(1, 9, 7)
    found = refresh.calibrated_steps(error_AK, counts, budget)
    assert len(found) == budget
    assert found[0] == 0
    assert list(found) == sorted(set(found))
    others = [(0, *rest) for rest in itertools.combinations(range(1, 7), budget - 1)]
    assert _total(error_AK, counts, found) == pytest.approx(min(_total(error_AK, counts, s) for s in others))


def test_errors_beyond_the_last_step_are_not_read():
    error_AK = np.where(np.add.outer(np.arange(5), np.arange(5)) < 5, 1.0, np.nan)
    assert len(refresh.calibrated_steps(error_AK, np.ones(5, int), 2)) == 2


def test_steps_whose_errors_grow_late_are_run_in_full_late():
    error_AK = np.zeros((6, 6))
    for start in range(6):
        error_AK[start] = [max(start + k - 3, 0) * (k > 0) for k in range(6)]  # no error before step 4
    assert refresh.calibrated_steps(error_AK, np.ones(6, int), 3) == (0, 4, 5)


@pytest.mark.parametrize("bad", [(-1.0, 2, 2), (0.1, 0, 2), (0.1, 2, 0)])
def test_an_adaptive_refresh_that_could_never_run_is_refused(bad):
    with pytest.raises(ValueError, match="adaptive refresh"):
        refresh.adaptive(*bad, 8)
