import dataclasses
import json
import re

import numpy as np
import pytest

from maskrl_jax.evaluate import curve, report, timing
from maskrl_jax.evaluate.illustrate import Illustration, illustrate
from maskrl_jax.evaluate.measure import Scorer, measure
from maskrl_jax.writers import read_metrics

CRITERIA = curve.Criteria({"graded": 0.02})


def timing_row(batch_size):
    spread = timing.Spread.of([1.0, 2.0, 3.0])
    return timing.Timing(batch_size, 3, spread, spread, spread, 16.0, 5.0)


def write_run(root, systems, protocol, scorer, *, settings=((4, 8, 16), (3, 5)), criteria=CRITERIA, tuned=True):
    base = [measure(systems[0], setting, protocol, scorer) for setting in settings[0]]
    own = [measure(systems[1], setting, protocol, scorer) for setting in settings[1]] if tuned else []
    name = "adaptive" if tuned else ""
    equality = curve.first_equal(own, base[-1:], criteria) if tuned else None
    drawn = illustrate(
        root, base + own, base[-1:], protocol.prompts, tuned=name, equality=equality, logged=read_metrics(str(root))
    )
    findings = report.Findings(
        title="Speed-RL-like", config="configs/speed_rl.py:smoke", points=base + own, reference=base[-1:],
        criteria=criteria, tuned=name, trained_on=["judge"], held_out=["exact verifier"], notes=["a caveat"],
        timings=[timing_row(1), timing_row(8)] if tuned else [], illustrations=drawn,
    )  # fmt: skip
    return report.write(root, findings, {"data": "shapes"})


def test_report_of_a_tuned_model(systems, protocol, scorer, tmp_path):
    rows = [{"step": step, "reward/quality": step / 9, "rl/kl": 0.0} for step in range(9)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = write_run(tmp_path, systems, protocol, scorer)
    text = path.read_text()
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert len(links) == 5 and all((tmp_path / link).is_file() for link in links)
    for part in (
        "eached: equal quality in 3×",
        "One seed",
        "12 prompts × 3 samples",
        "- command: `python",
        "exact verifier",
        "a caveat",
    ):
        assert part in text, part
    plain = json.loads((tmp_path / "results.json").read_text())
    assert plain["headline"] in text and len(plain["points"]) == 5
    best = plain["equality"]["adaptive"]["best"]
    assert plain["equality"]["adaptive"]["speedup"] == pytest.approx(16 / best["calls_mean"])
    assert {"command", "commit", "machine", "data"} <= set(plain["facts"])


def test_few_samples_are_called_few(make_point, tmp_path):
    base = [make_point("base", 16, 16, np.full(20, 0.9))]  # 40 samples
    text = report.write(tmp_path, report.Findings("t", "c", base, base, CRITERIA)).read_text()
    assert text.split("\n\n")[1].startswith(
        "**40 samples a setting show that everything runs, and nothing else.** **base"
    )


def test_a_run_that_fails_says_so_first(make_point, tmp_path):
    base = [make_point("base", 16, 16, np.full(50, 0.9))]
    tuned = [make_point("adaptive", 5, 5, np.full(50, 0.8))]
    findings = report.Findings("t", "c", base + tuned, base, CRITERIA, tuned="adaptive")
    text = report.write(tmp_path, findings).read_text()
    assert text.split("\n\n")[1].startswith("**Not reached: equal quality in 3× fewer calls. No measured")
    assert "no: graded bound -0.100 < -0.020" in text


@pytest.mark.parametrize(
    ("graded", "sentence"),
    [
        (0.9, "The untrained passes it at 7.0 mean calls [7.0, 7.0]."),
        (0.8, "The untrained passes it at no measured setting."),
    ],
)
def test_the_headline_says_what_needs_no_training(make_point, tmp_path, graded, sentence):
    base = [make_point("base", 16, 16, np.full(20, 0.9))]
    other = [make_point("untrained", 0, 7, np.full(20, graded))]
    points = [*base, make_point("adaptive", 5, 5, np.full(20, 0.9)), *other]
    text = report.write(tmp_path, report.Findings("t", "c", points, base, CRITERIA, tuned="adaptive")).read_text()
    assert sentence in text.split("\n\n")[1]


def test_the_headline_says_what_training_changed(make_point, tmp_path):
    base = [make_point("base", 16, 16, np.full(20, 0.9))]
    points = [*base, make_point("adaptive", 0, 5, np.full(20, 0.9), frechet=6.0)]
    points += [make_point("untrained", 0, 7, np.full(20, 0.85), frechet=12.0), make_point("other", 1, 7, np.ones(20))]
    text = report.write(tmp_path, report.Findings("t", "c", points, base, CRITERIA, tuned="adaptive")).read_text()
    sentence = "At the same setting (5.0 for 7.0 calls) adaptive differs from it by graded +0.050 [+0.050, +0.050]"
    assert sentence + ", Fréchet distance ×0.50" in text.split("\n\n")[1]
    assert text.split("\n\n")[1].count("At the same setting") == 1


def test_report_of_a_plain_base_model_claims_no_speed_up(systems, protocol, scorer, tmp_path):
    path = write_run(tmp_path, systems, protocol, scorer, tuned=False)
    text = path.read_text()
    assert "No tuned model is part of this run" in text
    assert "eached" not in text and "fewer" not in text


def test_class_conditional_set_without_verifier(systems, protocol, scorer, tmp_path):
    digits = dataclasses.replace(protocol, prompts=tuple(str(i % 10) for i in range(12)))
    judge_only = Scorer(scorer.judge)
    criteria = curve.Criteria({"judge": 0.01})
    path = write_run(tmp_path, systems, digits, judge_only, criteria=criteria)
    text = path.read_text()
    assert "judge" in text and "verifier" not in text.replace("exact verifier", "")


def test_several_seeds_are_listed(make_point, tmp_path):
    base = [make_point("base", 16, 16, np.full(20, 0.9), seed=seed) for seed in (0, 1, 2)]
    tuned = [make_point("adaptive", 5, 5, np.full(20, 0.9), seed=seed) for seed in (0, 1, 2)]
    text = report.write(tmp_path, report.Findings("t", "c", base + tuned, base, CRITERIA, "adaptive")).read_text()
    assert "3 seeds." in text and "Each seed alone" in text and "over prompts and seeds" in text


def test_base_at_same_calls_is_rounded_up_in_the_bases_favour(make_point):
    base = [make_point("base", steps, steps, np.full(9, 0.1 * steps)) for steps in (4, 6, 8)]
    tuned = [make_point("adaptive", dial, calls, np.full(9, 0.7)) for dial, calls in ((1, 5), (2, 6), (3, 9))]
    findings = report.Findings("t", "c", base + tuned, base[2:], CRITERIA, "adaptive")
    rows = report.same_calls(findings)
    assert [(row.calls_mean, calls) for row, calls in rows] == [(5.0, 6.0), (6.0, 6.0)]
    assert rows[0][0].differences["graded"].mean == pytest.approx(0.1)


def test_a_missing_figure_is_an_error(make_point, tmp_path):
    base = [make_point("base", 16, 16, np.full(20, 0.9))]
    lost = Illustration("figures/lost.png", "lost", np.zeros((1, 1, 3), np.uint8))
    with pytest.raises(ValueError, match="lost.png"):
        report.write(tmp_path, report.Findings("t", "c", base, base, CRITERIA, illustrations=[lost]))


def test_numbers_that_json_cannot_hold_become_null():
    assert report._plain({"a": (float("nan"), 1.5, float("inf"))}) == {"a": [None, 1.5, None]}
