"""Write report.md and results.json of a run: what was measured, how, and what that does and does not show."""

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Mapping, Sequence

from etils import epath

from maskrl_jax import paths
from maskrl_jax.evaluate import bootstrap, curve, gain, provenance, tables
from maskrl_jax.evaluate.illustrate import Illustration
from maskrl_jax.evaluate.latency import Latency
from maskrl_jax.evaluate.measure import Point
from maskrl_jax.evaluate.timing import Timing

FEW_SAMPLES = 100  # fewer make no claim: bounds of a tenth, a distance between 64 features that is all noise


@dataclasses.dataclass(frozen=True)
class Findings:
    """All that a report says. `tuned` is "" for a plain base model; then no claim of acceleration is made."""

    title: str
    config: str  # config file with its argument
    points: Sequence[Point]
    reference: Sequence[Point]  # the base at T_ref: one point, or one of each seed
    criteria: curve.Criteria
    tuned: str = ""
    goal: float = 3.0  # times fewer calls that the run was to reach
    aim: gain.Goal | None = None  # better at the same calls, where that was the aim instead
    trained_on: Sequence[str] = ()  # rewards that training saw
    held_out: Sequence[str] = ()  # measures and prompts that it did not
    notes: Sequence[str] = ()  # deviations and caveats, a sentence each
    timings: Sequence[Timing] = ()
    clock_note: str = ""  # what else than calls the clock counts, a sentence
    latencies: Sequence[Latency] = ()  # of sampling loops, where systems are compared by time
    unlike: Sequence[str] = ()  # systems whose setting means something else than the tuned one's
    illustrations: Sequence[Illustration] = ()


def equalities(findings: Findings) -> dict[str, curve.Equality]:
    """Compare every measured system with the reference, the base itself among them."""
    systems = dict.fromkeys(point.system for point in findings.points)
    return {
        system: curve.first_equal(
            [point for point in findings.points if point.system == system],
            findings.reference,
            findings.criteria,
        )
        for system in systems
    }


def same_calls(findings: Findings) -> list[tuple[curve.Comparison, float]]:
    """Compare each tuned setting with the base setting of the next larger (or same) number of calls.

    Rounding up favours the base, so a gain shown here is not one of calls. Settings beyond the base's are
    left out.
    """
    base_name = findings.reference[0].system
    base = curve.by_setting([point for point in findings.points if point.system == base_name]).values()
    tuned = curve.by_setting([point for point in findings.points if point.system == findings.tuned]).values()
    rows = []
    for group in sorted(tuned, key=curve.mean_calls):
        above = [other for other in base if curve.mean_calls(other) >= curve.mean_calls(group)]
        if above:
            nearest = min(above, key=curve.mean_calls)
            rows.append((curve.compare(group, nearest, findings.criteria), curve.mean_calls(nearest)))
    return rows


def gained(findings: Findings) -> gain.Gain:
    """Compare the tuned system with the base at T_ref."""
    setting = findings.reference[0].setting
    own = [point for point in findings.points if (point.system, point.setting) == (findings.tuned, setting)]
    return gain.gain(own, findings.reference, findings.aim)


def headline(findings: Findings, found: Mapping[str, curve.Equality]) -> str:
    """Return the first paragraph: measured numbers, and for a tuned system the verdict with its limits."""
    base = found[findings.reference[0].system]
    if not findings.tuned:
        return _base_headline(findings)
    own = found[findings.tuned]
    seeds = len(own.table[0].seeds)
    runs = "One seed: nothing is known about how it varies over training runs." if seeds == 1 else f"{seeds} seeds."
    untuned = "The untuned base passes the same test with no fewer calls."
    if base.best is not None and base.best.calls_mean < base.reference_calls:
        untuned = f"The untuned base passes the same test at {curve.fewest_calls(base)}."
    others = [
        f"The {equality.table[0].label} passes it "
        + ("at no measured setting." if equality.best is None else f"at {curve.fewest_calls(equality)}.")
        + _beside(findings, own, system)
        for system, equality in found.items()
        if system not in (findings.reference[0].system, findings.tuned)
    ]
    clock = [f"{timing.speedup.median:.2f}× at batch {timing.batch_size}" for timing in findings.timings]
    measured = _loop_time(findings, own) or "The clock was not measured."
    if clock:
        measured = f"Measured on the clock, the same setting: {', '.join(clock)}."
        measured = _sentences(measured, findings.clock_note)
    if findings.aim is not None:
        fewer = (
            "" if own.best is None else f"With {curve.fewest_calls(own)} it still equals the base within the margins."
        )
        return _sentences(_warning(findings), f"**{gain.verdict(gained(findings))}**", fewer, *others, runs)
    verdict = f"**{curve.verdict(own, findings.goal)}**"
    return _sentences(_warning(findings), verdict, untuned, *others, measured, runs)


def _loop_time(findings: Findings, own: curve.Equality) -> str:
    """Say what the sampling loop takes at the setting of the verdict, or "" where its time was not measured."""
    times = {(one.system, one.setting): one.seconds.median for one in findings.latencies}
    reference = findings.reference[0]
    tuned, base = (findings.tuned, curve.of_the_verdict(own).setting), (reference.system, reference.setting)
    if tuned not in times or base not in times:
        return ""
    return f"Its sampling loop takes {100 * times[tuned] / times[base]:.0f} % of the time of {reference.label}'s there."


def _sentences(*parts: str) -> str:
    return " ".join(filter(None, parts))


def _beside(findings: Findings, own: curve.Equality, system: str) -> str:
    """Say how the tuned system differs from another one at the setting of the verdict, or "" where that has none."""
    setting = curve.of_the_verdict(own).setting
    same = [point for point in findings.points if point.setting == setting]
    tuned, other = ([point for point in same if point.system == name] for name in (findings.tuned, system))
    if not tuned or not other or system in findings.unlike:
        return ""
    row = curve.compare(tuned, other, own.criteria)
    calls = f"{curve.mean_calls(tuned):.1f} for {curve.mean_calls(other):.1f} calls"
    return (
        f" At the same setting ({calls}) {tuned[0].label} differs from it by "
        f"{curve.evidence(row, own.criteria.margins)}."
    )


def _warning(findings: Findings) -> str:
    """Say so where a report is too small to be read, else ""."""
    samples = findings.reference[0].num_prompts * findings.reference[0].group
    return f"**{samples} samples a setting show that everything runs, and nothing else.**" * (samples < FEW_SAMPLES)


def _base_headline(findings: Findings) -> str:
    """Return the headline scores at the reference and at the fewest calls measured."""
    label = findings.reference[0].label
    base = [point for point in findings.points if point.system == findings.reference[0].system]
    fewest = min([*curve.by_setting(base).values(), findings.reference], key=curve.mean_calls)
    groups = [findings.reference]
    if curve.mean_calls(fewest) < curve.mean_calls(findings.reference):
        groups.append(fewest)
    names = [name for name in curve.HEADLINE if name in findings.reference[0].metrics]
    parts = []
    for group in groups:
        scores = ", ".join(f"{name} {curve.interval_over_seeds(group, name)}" for name in names)
        parts.append(f"{scores} at {curve.mean_calls(group):.1f} calls")
    return _sentences(_warning(findings), f"**{label}: {'; '.join(parts)}.** No tuned model is part of this run.")


def _protocol(findings: Findings, facts: Mapping[str, str]) -> str:
    point = findings.reference[0]
    seeds = sorted({point.seed for point in findings.points})
    over = "prompts and seeds" if len(seeds) > 1 else "prompts"
    lines = {
        "config": f"`{findings.config}`",
        "seeds of sampling": ", ".join(map(str, seeds)),
        "samples": f"{point.num_prompts} prompts × {point.group} samples at every setting, the same prompts "
        "and sampling keys for all systems",
        "bounds": f"{100 * bootstrap.LEVEL:.0f} % percentile bootstrap over {over}, {bootstrap.RESAMPLES} "
        "resamples, paired for differences",
        "network calls": "one forward for one sample; the second branch of guidance is not counted",
        **facts,
    }
    return "\n".join(f"- {name}: {value}" for name, value in lines.items())


def _criteria(criteria: curve.Criteria) -> str:
    margins = ", ".join(f"{name} ≥ −{margin:g}" for name, margin in criteria.margins.items())
    parts = [f"the lower 95 % bound of (system − reference) is {margins}"] if margins else []
    if criteria.frechet_ratio:
        parts.append(f"the Fréchet distance is at most {criteria.frechet_ratio:g} × the reference's (point value)")
    if criteria.diversity_ratio:
        parts.append(f"within-prompt diversity is at least {criteria.diversity_ratio:g} × (point value)")
    ratio = " with the Fréchet ratio as measured" if criteria.frechet_ratio else ""
    rule = f"Equal quality means, for all of: {'; '.join(parts)}."
    return (
        f"{rule} The setting is chosen on the prompts that judge it. In brackets behind the fewest calls: their range "
        f"over 95 % of the draws of prompts, each of which takes the same test{ratio}; "
        "`none`: a draw in which no measured setting passes."
    )


def _tuned_sections(findings: Findings, found: Mapping[str, curve.Equality]) -> list[str]:
    """Return the sections on acceleration."""
    own, reference = found[findings.tuned], findings.reference[0]
    calls = curve.mean_calls(findings.reference)
    parts = [f"## Against {reference.label} at {calls:.1f} calls", _criteria(findings.criteria)]
    parts += [f"**{own.table[0].label}**", tables.equality_table(own)]
    if tables.seeds_table(own):
        parts += ["Each seed alone; the bounds above know the spread between so few seeds only roughly:"]
        parts += [tables.seeds_table(own)]
    for system, equality in found.items():
        if system != findings.tuned:
            parts += [f"**{equality.table[0].label}**, by the same test", tables.equality_table(equality)]
    matched = same_calls(findings)
    if matched:
        parts += ["## Against the base at no fewer calls", tables.same_calls_table(matched)]
    if findings.timings:
        text = "Compilation excluded, decoding included, runs interleaved; median [quartiles]. A batch takes as "
        parts += [
            "## Time",
            text + "many calls as its slowest sample.",
            tables.timing_table(findings.timings),
        ]
    if findings.latencies:
        parts += ["## Time of the sampling loop", "Without decoding; all systems in turn; median [quartiles]."]
        parts += [tables.latency_table(findings.latencies)]
    return parts


def _markdown(findings: Findings, found: Mapping[str, curve.Equality], facts: Mapping[str, str]) -> str:
    parts = [f"# {findings.title}", headline(findings, found), _protocol(findings, facts)]
    named = {pathlib.PurePosixPath(shown.path).stem.replace("_", " "): shown for shown in findings.illustrations}
    for name, shown in named.items():
        parts += [f"![{name}]({shown.path})", f"*{shown.caption}*"]
    parts += ["## Every measured point", tables.points_table(findings.points)]
    if findings.tuned:
        parts += _tuned_sections(findings, found)
    if tables.attributes_table(findings.points):
        parts += ["## Single attributes (means)", tables.attributes_table(findings.points)]
    trained = ", ".join(findings.trained_on) or "no reward"
    held_out = ", ".join(findings.held_out) or "nothing stated"
    parts += ["## What training saw", f"Trained on: {trained}. Held out: {held_out}."]
    if findings.notes:
        parts += ["## To be kept in mind", "\n".join(f"- {note}" for note in findings.notes)]
    return "\n\n".join(parts) + "\n"


def _plain(value):
    """Return the value with every number that JSON cannot hold as None."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def results(findings: Findings, found: Mapping[str, curve.Equality], facts: Mapping[str, str]) -> dict:
    """Return every number of the report as plain JSON values."""
    matched = same_calls(findings) if findings.tuned else []
    return _plain(
        {
            "title": findings.title,
            "config": findings.config,
            "tuned": findings.tuned,
            "goal": findings.goal,
            "facts": facts,
            "headline": headline(findings, found),
            "reference": [point.to_json() for point in findings.reference],
            "points": [point.to_json() for point in findings.points],
            "equality": {name: equality.to_json() for name, equality in found.items()},
            "same_calls": [{"base_calls": calls, **dataclasses.asdict(row)} for row, calls in matched],
            "gain": None if findings.aim is None else gained(findings).to_json(),
            "timings": [timing.to_json() for timing in findings.timings],
            "latencies": [latency.to_json() for latency in findings.latencies],
            "trained_on": list(findings.trained_on),
            "held_out": list(findings.held_out),
            "notes": list(findings.notes),
        }
    )


def write(workdir: str | os.PathLike, findings: Findings, facts: Mapping[str, str] | None = None) -> epath.Path:
    """Write `report.md` and `results.json` into the workdir; returns the report's path.

    `facts` are further lines of the protocol; commit and machine are added here.

    Raises:
      ValueError: if a figure named in the findings does not exist below the workdir.
    """
    root = epath.Path(workdir)
    missing = [shown.path for shown in findings.illustrations if not (root / shown.path).is_file()]
    if missing:
        raise ValueError(f"figures {missing} are not below {root}")
    facts = {
        **(facts or {}),
        "command": f"`{provenance.command()}`",
        "commit": provenance.commit_hash(pathlib.Path(__file__).parent),
        "machine": provenance.machine(),
    }
    found = equalities(findings)
    plain = json.dumps(results(findings, found, facts), indent=1, allow_nan=False)
    paths.write(root / "results.json", plain + "\n")
    path = root / "report.md"
    paths.write(path, _markdown(findings, found, facts))
    return path
