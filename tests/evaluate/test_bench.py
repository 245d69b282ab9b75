"""The bench: how the base's sampler is chosen."""

import dataclasses
import json
import types

import jax
import numpy as np
import pytest

from maskrl_jax.errors import UserError
from maskrl_jax.evaluate.bench import Bench, Evaluation, read_sampler, tuning_notes
from maskrl_jax.evaluate.measure import System
from maskrl_jax.evaluate.report import Findings
from maskrl_jax.sampling.maskgit import SamplerConfig

GRIDS = {"tune_gumbel": (1.0, 2.0, 4.0), "tune_guidance": (1.0, 1.5), "tune_temperature": (1.0, 0.5)}


@pytest.fixture
def bench(protocol, scorer, tmp_path):
    dataset = types.SimpleNamespace(
        prompts=lambda n, seed, held_out: list(protocol.prompts[:n]),
        encode=lambda texts: np.arange(len(texts)),
        verify=scorer.verify,
        distinct=lambda held_out: 12,
    )
    settings = Evaluation(batch_size=8, steps=(4, 16), tune_prompts=4, **GRIDS)
    real = {True: protocol.real_features, False: protocol.real_features + 0.1}
    return Bench(dataset, scorer, real.get, settings, str(tmp_path), str(tmp_path / "measured"))


def best_at(systems, seen, **best):
    """Return system_of: pictures are the noisier the farther a sampler is from the best one."""

    def system_of(sampler):
        seen.append(sampler)
        distance = sum(abs(np.log(getattr(sampler, name) / value)) for name, value in best.items())
        base = systems[0]
        return System("base", "base", lambda setting, *rest: base.generate(setting / (1 + distance), *rest))

    return system_of


def test_the_best_sampler_is_found_and_kept(bench, systems, tmp_path):
    seen = []
    system_of = best_at(systems, seen, gumbel=2.0, guidance=1.5, temperature=0.5)
    chosen = bench.tune(system_of, SamplerConfig(num_steps=4, schedule="linear"))
    assert (chosen.gumbel, chosen.guidance, chosen.temperature) == (2.0, 1.5, 0.5)
    assert (chosen.num_steps, chosen.schedule) == (16, "linear")
    assert len(seen) == 1 + 3 + 1 + 1  # the start, then one setting after another, none of them twice
    assert len(json.loads((tmp_path / "sampler.json").read_text())["tried"]) == 5
    assert bench.tune(system_of, SamplerConfig()) == chosen and len(seen) == 7  # stored, not measured again
    assert read_sampler(str(tmp_path), SamplerConfig()) == chosen
    # Another grid is another search, but not for a later measurement.
    other = dataclasses.replace(bench, settings=dataclasses.replace(bench.settings, tune_gumbel=(1.0, 4.0)))
    assert dataclasses.replace(other, out=str(tmp_path / "out")).tune(system_of, SamplerConfig()) == chosen
    assert other.tune(system_of, SamplerConfig()).gumbel != 2.0 and len(seen) > 9


def test_among_equals_the_least_distance_decides(bench, systems, monkeypatch):
    """Graded within half a margin of the best: the Frechet distance chooses; beyond, the grade alone."""
    graded = {1.0: 0.95, 2.0: 0.945, 4.0: 0.93}
    distance = {1.0: 90.0, 2.0: 50.0, 4.0: 10.0}

    def measure(system, _, protocol, *rest):
        # Distances of training captions are to pictures of training captions.
        np.testing.assert_array_equal(protocol.real_features, bench.real_features(False))
        gumbel = system.generate
        return {"eval/graded@16": graded[gumbel], "eval/fd_judge@16": distance[gumbel]}

    monkeypatch.setattr("maskrl_jax.evaluate.bench.measure.measure", measure)
    monkeypatch.setattr("maskrl_jax.evaluate.bench.scalars", lambda point: point)
    chosen = bench.tune(lambda sampler: System("base", "base", sampler.gumbel), SamplerConfig(temperature=1.0))
    assert chosen.gumbel == 2.0


def test_a_worse_temperature_is_tried_and_left(bench, systems):
    chosen = bench.tune(best_at(systems, [], gumbel=1.0, guidance=1.0, temperature=1.0), SamplerConfig())
    assert (chosen.gumbel, chosen.guidance, chosen.temperature) == (1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("best", "sentence"),
    [
        ({"gumbel": 4.0}, "gumbel (4) is at the edge of what was tried (1 to 4)"),
        ({"gumbel": 2.0}, None),
        ({"gumbel": 1.0}, "gumbel (1) is at the edge"),
        ({"gumbel": 2.0, "temperature": 0.5}, "temperature (0.5) is at the edge"),
    ],
)
def test_choices_at_an_edge_are_named(bench, systems, best, sentence):
    best = {"gumbel": 2.0, "guidance": 1.0, "temperature": 1.0} | best
    bench.tune(best_at(systems, [], **best), SamplerConfig())
    found = tuning_notes(bench.workdir, 16)
    assert len(found) == (sentence is not None) and (sentence is None or sentence in found[0])


def test_a_reference_that_the_base_was_not_tuned_for_is_named(bench, systems, tmp_path):
    bench.tune(best_at(systems, [], gumbel=2.0, guidance=1.0, temperature=1.0), SamplerConfig())
    assert tuning_notes(bench.workdir, 12) == (
        "The base's sampler was tuned at 16 calls and is the reference at 12 here.",
    )
    assert "was not tuned" in tuning_notes(str(tmp_path / "elsewhere"), 12)[0]


def test_no_caption_is_measured_twice_however_many_are_asked_for(bench):
    assert len(bench.protocol(500).prompts) == 12


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dials": ()}, "evaluation.dials is empty"),
        ({"tune_gumbel": ()}, "evaluation.tune_gumbel is empty"),
        ({"timing_repeats": -1}, "timing_repeats -1 is below 0"),
        ({"tune_temperature": (1.0, 0.0)}, "temperature 0.0 must be positive"),
    ],
)
def test_settings_that_would_fail_after_training_are_refused(settings, message):
    with pytest.raises((UserError, ValueError), match=message):
        Evaluation(**settings)


def test_a_system_with_an_identity_is_measured_once_for_all_runs(bench, systems, protocol):
    seen = []

    def generate(setting, *rest):
        seen.append(setting)
        return systems[0].generate(setting, *rest)

    settings = dataclasses.replace(bench.settings, prompts=4, group=2, keep=2)
    bench = dataclasses.replace(bench, settings=settings)
    known = System("base", "base", generate, identity="a")
    first, calls = bench.measure(known, (4, 16)), len(seen)
    again = dataclasses.replace(bench, workdir="elsewhere").measure(known, (4, 16))
    assert calls > 0 and len(seen) == calls
    for one, other in zip(first, again, strict=True):
        assert one.to_json() == other.to_json()
        jax.tree.map(np.testing.assert_array_equal, (one.per_sample, one.kept), (other.per_sample, other.kept))
    # A run may call it something else.
    other = bench.measure(dataclasses.replace(known, name="teacher", label="its teacher"), (16,))[0]
    assert len(seen) == calls and (other.system, other.label) == ("teacher", "its teacher")
    np.testing.assert_array_equal(other.per_prompt("judge"), first[1].per_prompt("judge"))
    changes = (
        (bench, dataclasses.replace(known, identity="b")),  # other parameters
        (bench, dataclasses.replace(known, identity="")),  # none to be known by
        (dataclasses.replace(bench, settings=dataclasses.replace(settings, seed=3)), known),
        (
            dataclasses.replace(bench, real_features=lambda held_out: bench.real_features(held_out) + 1),
            known,
        ),  # a judge
    )
    for changed, system in changes:
        before = len(seen)
        changed.measure(system, (4,))
        assert len(seen) > before


def test_a_set_without_pictures_is_measured_and_reported_without_distances(bench, systems, tmp_path):
    settings = dataclasses.replace(bench.settings, prompts=6, group=2, keep=2)
    bench = dataclasses.replace(bench, real_features=lambda held_out: None, settings=settings)
    chosen = bench.tune(best_at(systems, [], gumbel=2.0, guidance=1.5, temperature=0.5), SamplerConfig())
    assert (chosen.gumbel, chosen.guidance, chosen.temperature) == (2.0, 1.5, 0.5)
    points = [*bench.measure(systems[0], (4, 16)), *bench.measure(systems[1], (4,))]
    assert bench.criteria().frechet_ratio == 0 and "nothing speaks for variety" in bench.choice
    values, _ = bench.glance(systems[0], 4)
    assert "glance/judge@4" in values and "glance/fd_judge@4" not in values
    findings = Findings(
        title="No pictures",
        config="x",
        points=points,
        reference=points[1:2],
        criteria=bench.criteria(),
        tuned="adaptive",
    )
    bench.write(findings, 1, {"how it was chosen": bench.choice})
    text = (tmp_path / "report.md").read_text()
    assert "The set has no pictures: there is no Fréchet distance" in text and "nan" not in text.lower().split()
    head = next(line for line in text.splitlines() if line.startswith("| system | setting"))
    assert "diversity" in head and not any(name in head for name in ("Fréchet", "precision", "recall"))
    assert "Fréchet ratio as measured" not in text
    found = json.loads((tmp_path / "results.json").read_text())
    assert {point["frechet"] for point in found["points"]} == {None}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"steps": (8, 4)}, "must rise"),
        ({"prompts": 1, "group": 2}, "prompts 1 x group 2 is too little"),
        ({"tune_prompts": 1}, "tune_prompts 1 must be at least 2"),
        ({"goal": 0.0}, "goal 0.0 must be above 0"),
        ({"keep": -1}, "keep -1 must be at least 0"),
    ],
)
def test_impossible_settings_are_refused(wrong, message):
    with pytest.raises(UserError, match=message):
        Evaluation(**wrong)
