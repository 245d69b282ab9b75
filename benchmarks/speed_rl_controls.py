"""The control table of Speed-RL (specs: required comparisons), in one resumable command.

python benchmarks/speed_rl_controls.py                                      # the table: default size, three seeds
python benchmarks/speed_rl_controls.py --only=adaptive --only=fixed         # trains these, writes what is finished
python benchmarks/speed_rl_controls.py --size=full --only=adaptive --nobaselines --timing --out=benchmarks/speed_rl_full

Trains every tuned variant with every seed, on one shared base; measures the base at the same numbers of calls
with guidance, Gumbel scale and temperature tuned at each, and the training-free threshold samplers. What is
finished is not done again. Writes <out>.json and <out>.md. Bounds: 95 % paired bootstrap over prompts and seeds.
All variants have the settings of `adaptive` but for those named here: nothing was tuned for the controls.
"""

import dataclasses
import json
import math
import pathlib
import subprocess
import sys

from absl import app, flags, logging

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from configs import speed_rl as speed_rl_config  # noqa: E402
from maskrl_jax import runner, stored  # noqa: E402
from maskrl_jax.evaluate import curve, measure, provenance  # noqa: E402
from maskrl_jax.evaluate.bench import Evaluation  # noqa: E402
from maskrl_jax.tasks import generators  # noqa: E402
from maskrl_jax.tasks import maskgit as maskgit_task  # noqa: E402

SIZE = flags.DEFINE_enum("size", "default", ["full", "default", "smoke"], "size of configs/speed_rl.py")
SEEDS = flags.DEFINE_multi_integer("seeds", [0, 1, 2], "seed of a policy, once for each; the base is shared")
RUNS = flags.DEFINE_string("runs", "runs/controls", "where the runs go")
STORE = flags.DEFINE_string("store", "runs/stages", "where trained parents are")
OUT = flags.DEFINE_string("out", "benchmarks/speed_rl_controls", "result files without their ending")
BASELINES = flags.DEFINE_bool("baselines", True, "measure the base at fewer calls and the threshold samplers, too")
TIMING = flags.DEFINE_bool("timing", False, "let every run measure the wall clock, too")

VARIANTS = {
    "adaptive": [],  # `order=uncertain` with thresholds; `stride` below is the other action
    "fixed": ["--config.policy.kind=fixed", "--config.policy.noise=0.5"],
    "budget": [
        "--config.policy.kind=budget",
        "--config.policy.noise=0.5",
        "--config.credit.gate=hard",
        "--config.loss.tokens.distribution=cond",
    ],
    "head only": ["--config.optimizer.rates=(('^model', 0.0), ('^head', HEAD_RATE))"],
    "frozen head": ["--config.optimizer.rates=(('^head', 0.0),)"],
    "kept (negative control)": ["--config.loss.tokens.likelihood=kept"],
    "stride": ["--config.policy.action=stride", "--config.policy.noise=0.5"],
}
# Training-free samplers that stop early; of `uncertain`, kappa about the logit that the policy starts with.
THRESHOLDS = {"threshold": (0.5, 0.7, 0.9, 0.97), "entropy": (1.5, 0.8, 0.3, 0.1)}
UNCERTAIN = (-2.0, -1.0, 0.0, 1.0)
ONLY = flags.DEFINE_multi_enum("only", None, list(VARIANTS), "train this variant; the table holds what is finished")


def main(_: list[str]) -> None:
    """Train what is missing, measure, write."""
    logging.set_verbosity(logging.WARNING)
    seeds = SEEDS.value
    for seed in seeds:
        for name, overrides in VARIANTS.items():
            if ONLY.value is None or name in ONLY.value:
                _train(name, seed, overrides)
    done = {name: [s for s in seeds if (_workdir(name, s) / stored.DONE).exists()] for name in VARIANTS}
    first = next((_workdir(name, found[0]) for name, found in done.items() if found), None)
    if first is None:
        sys.exit("error: no variant is finished; run without --only")
    rows, fewest, reference = _tuned_rows(done)
    if BASELINES.value:
        rows += _base_rows(str(first), reference)
    runs = [_workdir(name, seed) for name, found in done.items() for seed in found]
    _write(
        rows,
        fewest,
        reference,
        seeds,
        {json.loads((run / "results.json").read_text())["facts"]["commit"] for run in runs},
    )


def _workdir(name: str, seed: int) -> pathlib.Path:
    return ROOT / RUNS.value / SIZE.value / f"{name.split(' (')[0].replace(' ', '_')}-seed{seed}"


def _argument() -> str:
    return "" if SIZE.value == "default" else SIZE.value


def _train(name: str, seed: int, overrides: list[str]) -> None:
    config = "configs/speed_rl.py" + (f":{_argument()}" if _argument() else "")
    command = [sys.executable, "-m", "maskrl_jax.main", f"--config={config}", f"--config.seed={seed}"]
    rate = dict(speed_rl_config.get_config(_argument()).optimizer.rates)["^head"]
    overrides = [override.replace("HEAD_RATE", str(rate)) for override in overrides]
    command += [f"--workdir={_workdir(name, seed)}", f"--store={STORE.value}", *overrides]
    command += [] if TIMING.value else ["--config.evaluation.timing_repeats=0"]
    print(" ".join(command), flush=True)
    subprocess.run(command, cwd=ROOT, check=True)


def _points(workdir: pathlib.Path, seed: int) -> list[measure.Point]:
    """The measured points of a run, numbered by its training seed: that is what varies here."""
    results = json.loads((workdir / "results.json").read_text())
    return [dataclasses.replace(measure.load_point(workdir / "points", p), seed=seed) for p in results["points"]]


def _tuned_rows(done: dict) -> tuple[list[dict], dict[str, dict], list[measure.Point]]:
    """(A row for every setting of every variant, seeds pooled, against the base at T_ref; T* of each; the base)."""
    rows, fewest, reference = [], {}, []
    for name, seeds in done.items():
        points = [point for seed in seeds for point in _points(_workdir(name, seed), seed)]
        base = [point for point in points if point.system == "base"]
        last = max((point.setting for point in base), default=0)
        own_reference = [point for point in base if point.setting == last]
        if not reference and own_reference:
            reference = own_reference[:1]
            rows.append(_row("base, tuned at T_ref", last, reference, reference))
        # The same in every seed, so one is enough: the prior of the head on the base.
        untrained = [point for point in points if point.system == "untrained" and point.seed == seeds[0]]
        tuned = [point for point in points if point.system == "tuned"]
        for setting, group in curve.by_setting(tuned).items():
            rows.append(_row(name, setting, group, own_reference))
        alone = {
            f"seed {seed}": _fewest(
                [point for point in tuned if point.seed == seed], [one for one in own_reference if one.seed == seed]
            )
            for seed in seeds
        }
        if tuned:
            fewest[name] = {"pooled": _fewest(tuned, own_reference), **alone}
        if name == "adaptive" and untrained:
            fewest["adaptive, untrained"] = {"pooled": _fewest(untrained, reference)}
            for setting, group in curve.by_setting(untrained).items():
                rows.append(_row("adaptive, untrained", setting, group, reference))
    return rows, fewest, reference


def _criteria(point: measure.Point) -> curve.Criteria:
    return curve.Criteria(margins={"graded" if "graded" in point.metrics else "judge": 0.02})


def _fewest(points: list[measure.Point], references: list[measure.Point]) -> float | None:
    """T*: the fewest mean calls at equal quality, None where no setting has it."""
    best = curve.first_equal(points, references, _criteria(points[0])).best
    return None if best is None else best.calls_mean


def _base_rows(workdir: str, reference: list[measure.Point]) -> list[dict]:
    """The base at fewer steps with its sampler tuned at each, and the training-free samplers that stop early."""
    context, _ = runner.open_workdir(workdir)
    base, folder = context.parents["maskgit"], pathlib.Path(workdir).parent
    folder /= pathlib.Path(base.workdir).name  # another base is tuned anew
    bench = generators.bench_of(dataclasses.replace(context, workdir=base.workdir))
    as_base = dataclasses.replace(context, config=context.config.parents.maskgit, workdir=base.workdir)
    studio = maskgit_task.studio(as_base, base.params)
    rows = []
    for steps in bench.settings.steps[:-1]:
        (folder / f"{steps}").mkdir(parents=True, exist_ok=True)
        # The same search as at T_ref, on the same prompts, starting from what was best there.
        settings = dataclasses.replace(Evaluation(**base.config.evaluation), steps=(steps,))
        tuner = dataclasses.replace(bench, workdir=str(folder / f"{steps}"), settings=settings)
        best = tuner.tune(lambda sampler: _kept(studio, context, sampler), studio.sampler)
        rows += _measured(bench, _kept(studio, context, best), "base, tuned at this T", steps, reference)
    # `uncertain` shares the order of the policy, so its noise and temperature, too.
    policy = context.config.policy
    shared = {"gumbel": policy.noise, "temperature": policy.temperature, "guidance": policy.guidance}
    odds = policy.kappa / (1 - policy.kappa)
    kappas = tuple(1 / (1 + math.exp(-shift) / odds) for shift in UNCERTAIN)
    for mode, levels in {**THRESHOLDS, "uncertain": kappas}.items():
        for level in levels:
            changes = {"mode": mode, "threshold": level} | (shared if mode == "uncertain" else {})
            sampler, steps = dataclasses.replace(studio.sampler, **changes), studio.sampler.num_steps
            rows += _measured(bench, _kept(studio, context, sampler), f"{mode} sampler", steps, reference, level)
    return rows


def _kept(studio, context, sampler) -> measure.System:
    """The base under a fixed sampler, whose measurements are kept."""
    return generators.kept(studio.fixed(sampler), context.parents, str(sampler))


def _measured(bench, system, name, steps, reference, level=None) -> list[dict]:
    """The row of one setting of the fixed sampler, measured once."""
    points = bench.measure(dataclasses.replace(system, name="fixed", label=name), (steps,))
    return [_row(name, steps if level is None else level, points, reference)]


def _row(name: str, setting: float, points: list[measure.Point], reference: list[measure.Point]) -> dict:
    single = len({point.seed for point in points}) == 1 and len(reference) == 1
    against = [dataclasses.replace(reference[0], seed=points[0].seed)] if single else reference
    compared = curve.compare(points, against, _criteria(points[0]))
    return {
        "system": name,
        "setting": setting,
        "seeds": len(points),
        "calls": compared.calls_mean,
        "means": {m: curve.interval_over_seeds(points, m).mean for m in ("graded", "strict", "judge", "frechet")},
        "difference": {name: dataclasses.asdict(value) for name, value in compared.differences.items()},
        "frechet_ratio": compared.frechet_ratio,
        "diversity_ratio": None if compared.diversity_ratio is None else compared.diversity_ratio.mean,
        "equal": compared.equal,
        "failed": list(compared.failed),
    }


def _write(
    rows: list[dict], fewest: dict[str, dict], reference: list[measure.Point], seeds: list[int], commits: set[str]
) -> None:
    facts = {"size": SIZE.value, "seeds": seeds, "commits": ", ".join(sorted(commits)), "machine": provenance.machine()}
    facts |= {"samples": f"{reference[0].num_prompts} prompts x {reference[0].group}, every setting"}
    out = ROOT / OUT.value
    out.with_suffix(".json").write_text(
        json.dumps({"facts": facts, "rows": rows, "fewest_calls": fewest}, indent=1) + "\n"
    )
    lines = [
        f"# Speed-RL controls, size {SIZE.value}",
        f"Reference: base at {reference[0].calls_mean:.0f} calls. " + "; ".join(f"{k}: {v}" for k, v in facts.items()),
        "",
        "| system | setting | seeds | calls | graded | strict | judge | FD "
        "| Δ graded [95 %] | FD ratio | diversity | equal |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---|---:|---:|---|",
    ]
    for row in rows:
        mean, diff = row["means"], row["difference"].get("graded") or row["difference"]["judge"]
        diversity = "" if row["diversity_ratio"] is None else f"{row['diversity_ratio']:.2f}"
        lines.append(
            f"| {row['system']} | {row['setting']:g} | {row['seeds']} | {row['calls']:.2f} | {mean['graded']:.3f} | "
            f"{mean['strict']:.3f} | {mean['judge']:.3f} | {mean['frechet']:.1f} | {diff['mean']:+.3f} "
            f"[{diff['low']:+.3f}, {diff['high']:+.3f}] | {row['frechet_ratio']:.2f} | {diversity} | "
            f"{'yes' if row['equal'] else 'no'} |"
        )
    lines += ["", "## Fewest mean calls at equal quality", ""]
    columns = ["pooled", *(f"seed {seed}" for seed in seeds)]
    lines += [f"| system | {' | '.join(columns)} |", "|---|" + "---:|" * len(columns)]
    for name, found in fewest.items():
        cells = ("" if c not in found else "none" if found[c] is None else f"{found[c]:.2f}" for c in columns)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    out.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print(f"wrote {out}.json and {out}.md", flush=True)


if __name__ == "__main__":
    app.run(main)
