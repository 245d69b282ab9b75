import numpy as np
import pytest

from maskrl_jax.evaluate import curve, gain, report

GOAL = gain.Goal(closed=0.4, closed_low=0.2, diversity=0.85)


def points(make_point, tuned, base=(0.6, 0.8, 0.7, 0.5), spread=1.0):
    own = [make_point("tuned", 8, 8, scores, seed=i, spread=spread) for i, scores in enumerate(tuned)]
    return own, [make_point("base", 8, 8, np.asarray(base))]


def test_share_of_the_gap_by_hand(make_point):
    """The base leaves 0.35 on average; the tuned one 0.175: half is closed, in every draw of prompts."""
    base = np.array([0.6, 0.8, 0.7, 0.5])
    found = gain.gain(*points(make_point, [1 - (1 - base) / 2], base), GOAL)
    np.testing.assert_allclose([found.closed.low, found.closed.mean, found.closed.high], 0.5, atol=1e-9)
    assert found.failed == () and gain.verdict(found).startswith("Reached: 40% of the base's graded gap closed at 8")
    assert "50 % [50, 50] of the gap to 1 is closed" in gain.verdict(found)


def test_seeds_widen_the_bounds(make_point):
    base = np.array([0.6, 0.8, 0.7, 0.5])
    found = gain.gain(*points(make_point, [1 - (1 - base) * left for left in (0.9, 0.5, 0.1)], base), GOAL)
    assert found.closed.mean == pytest.approx(0.5)
    assert found.closed.low < 0.3 and found.closed.high > 0.7


@pytest.mark.parametrize(
    ("tuned", "spread", "words"),
    [((0.65, 0.8, 0.7, 0.5), 1.0, "less than 40%"), ((0.9, 0.95, 0.9, 0.9), 0.8, "diversity below ×0.85")],
)
def test_what_was_missed_is_named(make_point, tuned, spread, words):
    found = gain.gain(*points(make_point, [np.array(tuned)], spread=spread), GOAL)
    assert words in found.failed[0] and gain.verdict(found).startswith("Not reached") and words in gain.verdict(found)


def test_a_perfect_base_leaves_nothing(make_point):
    found = gain.gain(*points(make_point, [np.ones(4)], np.ones(4)), GOAL)
    assert found.closed is None and "no gap to close" in gain.verdict(found) and found.failed


def test_a_report_of_a_better_model_says_how_much_of_the_gap_it_closes(make_point, tmp_path):
    own, base = points(make_point, [np.array([0.8, 0.9, 0.85, 0.75])])
    findings = report.Findings(
        title="MaskFocus", config="configs/maskfocus.py", points=[*base, *own], reference=base,
        criteria=curve.Criteria({"graded": 0.02}), tuned="tuned", aim=GOAL,
    )  # fmt: skip
    text = report.write(tmp_path, findings).read_text()
    assert "50 % [50, 50] of the gap to 1 is closed" in text and "still equals the base" in text
    assert "fewer calls.**" not in text.split("\n")[2]
