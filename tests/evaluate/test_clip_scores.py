"""Reports by scores of a CLIP, which have units of their own and no best value."""

import dataclasses
import types

import numpy as np
import pytest

from maskrl_jax.evaluate import curve, figures, gain, report, tables
from maskrl_jax.evaluate.bench import Bench, Evaluation
from maskrl_jax.evaluate.measure import Scorer
from maskrl_jax.rewards import clip

JUDGED = ("pick_score", "clip_score")


def bench_of(verify=None):
    dataset = types.SimpleNamespace(verify=verify)
    return Bench(dataset, Scorer(None), lambda _: np.zeros((2, 3)), Evaluation(), "", "", judged=JUDGED)


def scored(make_point, system, values, calls=8):
    """A point that a judge alone has measured."""
    point = make_point(system, 8, calls, values)
    graded, own = point.metrics["graded"], dict(point.per_sample)
    both = {name: graded for name in JUDGED}
    scores = {name: own["graded"] for name in JUDGED}
    del own["graded"]
    return dataclasses.replace(point, metrics=both, per_sample=own | scores)


def test_every_score_of_a_clip_is_a_headline_with_a_name_of_its_own():
    assert set(curve.CLIP) == set(clip.KINDS) and set(curve.CLIP) <= set(curve.HEADLINE)
    assert set(curve.CLIP) <= set(figures.TITLES) & set(tables.HEADS)


def test_the_first_score_decides_where_there_is_no_verifier():
    assert bench_of().metric == "pick_score" and tuple(bench_of().criteria().margins) == ("pick_score",)
    assert bench_of(verify=print).metric == "graded"
    assert bench_of().untrained({"pick_score": 1.0}) == ("clip_score",)
    assert bench_of(verify=print).untrained({"pick_score": 1.0, "clip_score": 0.0})[0] == "the exact verifier"
    trained = dataclasses.replace(bench_of(), judged=("judge", "judge_whole"))
    assert trained.untrained({"judge_whole": 1.0}) == ()  # of the network that was trained on


@pytest.mark.parametrize(("change", "outcome"), [(0.5, "Reached: a gain in pick_score"), (0.0, "Not reached")])
def test_a_gain_without_a_best_value_is_a_difference(make_point, change, outcome):
    base = np.array([20.0, 21.0, 22.5, 19.0])
    goal = gain.Goal("pick_score", closed=0.4, closed_low=0.2, diversity=0.85)
    found = gain.gain([scored(make_point, "tuned", base + change)], [scored(make_point, "base", base)], goal)
    text = gain.verdict(found)
    assert found.closed is None and text.startswith(outcome) and "gap" not in text
    assert ("no gain in pick_score beyond its bounds" in text) == (change == 0)


def test_a_report_states_all_scores_of_the_judge(make_point, tmp_path):
    base = [scored(make_point, "base", np.full(20, 21.0), calls=16)]
    tuned = [scored(make_point, "tuned", np.full(20, 21.5))]
    findings = report.Findings(
        "t", "c", [*base, *tuned], base, curve.Criteria({"pick_score": 0.02}), tuned="tuned",
        trained_on=("pick_score x 1",), held_out=bench_of().untrained({"pick_score": 1.0}),
    )  # fmt: skip
    text = report.write(tmp_path, findings).read_text()
    assert "| CLIPScore | PickScore |" in text and "Δ PickScore" in text
    assert "pick_score +0.500 [+0.500, +0.500]" in text and "Held out: clip_score." in text
    assert "verifier" not in text and "Single attributes" not in text
