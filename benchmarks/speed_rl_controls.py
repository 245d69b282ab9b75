"""The control table of Speed-RL (specs: required comparisons), in one resumable command.

python benchmarks/speed_rl_controls.py                                      # the table: default size, three seeds
python benchmarks/speed_rl_controls.py --size=full --only=adaptive --nobaselines --out=benchmarks/speed_rl_full

Trains every tuned variant with every seed, on one shared base; measures the base at the same numbers of calls
with guidance, Gumbel scale and temperature tuned at each, and the training-free threshold samplers. What is
finished is not done again. Writes <out>.json and <out>.md. Bounds: 95 % paired bootstrap over prompts and seeds.
"""

import dataclasses
import itertools
import json
import pathlib
import subprocess
import sys

from absl import app, flags, logging

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from maskrl_jax import runner  # noqa: E402
from maskrl_jax.evaluate import curve, measure, report  # noqa: E402
from maskrl_jax.tasks import maskgit as maskgit_task  # noqa: E402

SIZE = flags.DEFINE_enum("size", "default", ["full", "default", "smoke"], "size of configs/speed_rl.py")
SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "seeds of the policies; the base is shared")
RUNS = flags.DEFINE_string("runs", "runs/controls", "where the runs go")
STORE = flags.DEFINE_string("store", "runs/stages", "where trained parents are")
OUT = flags.DEFINE_string("out", "benchmarks/speed_rl_controls", "result files without their ending")
BASELINES = flags.DEFINE_bool("baselines", True, "measure the base at fewer calls and the threshold samplers, too")
ONLY = flags.DEFINE_list("only", None, "train these variants only; the table holds what is finished")

VARIANTS = {
    "adaptive": [],
    "fixed": ["--config.policy.kind=fixed", "--config.policy.noise=1.0"],
    "budget": [
        "--config.policy.kind=budget",
        "--config.policy.noise=1.0",
        "--config.credit.gate=hard",
        "--config.loss.tokens.distribution=cond",
    ],
    "head only": ["--config.optimizer.rates=(('^model', 0.0), ('^head', 40.0))"],
    "frozen head": ["--config.optimizer.rates=(('^head', 0.0),)"],
    "kept (negative control)": ["--config.loss.tokens.likelihood=kept"],
}
TUNED_AT = ((1.0, 1.7), (1.0, 2.0, 4.0), (1.0, 0.7))  # guidance, Gumbel scale, temperature
# Training-free samplers that stop early; `uncertain` with the policies' noise and temperature, whose order it shares.
THRESHOLDS = {
    "threshold": ({}, (0.5, 0.7, 0.9, 0.97)),
    "entropy": ({}, (1.5, 0.8, 0.3, 0.1)),
    "uncertain": ({"gumbel": 0.5, "temperature": 0.7, "guidance": 1.0}, (0.9, 0.95, 0.97, 0.985)),
}


def main(_: list[str]) -> None:
    """Train what is missing, measure, write."""
    logging.set_verbosity(logging.WARNING)
    seeds = [int(seed) for seed in SEEDS.value]
    for seed in seeds:
        for name, overrides in VARIANTS.items():
            if ONLY.value is None or name in ONLY.value:
                _train(name, seed, overrides)
    done = {name: [s for s in seeds if (_workdir(name, s) / "results.json").exists()] for name in VARIANTS}
    first = next((_workdir(name, found[0]) for name, found in done.items() if found), None)
    if first is None:
        sys.exit("error: no variant is finished; run without --only")
    rows, reference = _tuned_rows(done)
    if BASELINES.value:
        rows += _base_rows(str(first), reference)
    _write(rows, reference, seeds)


def _workdir(name: str, seed: int) -> pathlib.Path:
    return ROOT / RUNS.value / SIZE.value / f"{name.split(' (')[0].replace(' ', '_')}-seed{seed}"


def _train(name: str, seed: int, overrides: list[str]) -> None:
    config = "configs/speed_rl.py" + ("" if SIZE.value == "default" else f":{SIZE.value}")
    command = [sys.executable, "-m", "maskrl_jax.main", f"--config={config}", f"--config.seed={seed}"]
    command += [f"--workdir={_workdir(name, seed)}", f"--store={STORE.value}", *overrides]
    print(" ".join(command), flush=True)
    subprocess.run(command, cwd=ROOT, check=True)


def _points(workdir: pathlib.Path, seed: int) -> list[measure.Point]:
    """The measured points of a run, numbered by its training seed: that is what varies here."""
    stored = json.loads((workdir / "results.json").read_text())
    return [dataclasses.replace(measure.load_point(workdir / "points", plain), seed=seed) for plain in stored["points"]]


def _tuned_rows(done: dict) -> tuple[list[dict], list[measure.Point]]:
    """A row for every setting of every variant, seeds pooled, against the base at T_ref."""
    rows, reference = [], []
    for name, seeds in done.items():
        points = [point for seed in seeds for point in _points(_workdir(name, seed), seed)]
        base = [point for point in points if point.system == "base"]
        last = max((point.setting for point in base), default=0)
        own_reference = [point for point in base if point.setting == last]
        reference = reference or own_reference[:1]
        # The same in every seed, so one is enough: the prior of the head on the base.
        untrained = [point for point in points if point.system == "untrained" and point.seed == seeds[0]]
        tuned = [point for point in points if point.system == "tuned"]
        for setting, group in curve.by_setting(tuned).items():
            rows.append(_row(name, setting, group, own_reference))
        for setting, group in curve.by_setting(untrained).items() if name == "adaptive" else ():
            rows.append(_row("adaptive, untrained", setting, group, reference))
    return rows, reference


def _base_rows(workdir: str, reference: list[measure.Point]) -> list[dict]:
    """The base at fewer steps, tuned at each, and the threshold samplers; kept on disk point by point."""
    context, _ = runner.open_workdir(workdir)
    base_workdir = context.parents["maskgit"].workdir
    folder = pathlib.Path(workdir).parent / "base"
    bench = maskgit_task.bench_of(dataclasses.replace(context, workdir=base_workdir))
    as_base = dataclasses.replace(context, config=context.config.parents.maskgit, workdir=base_workdir)
    studio = maskgit_task.studio(as_base, context.parents["maskgit"].params)
    rows = []
    for steps in bench.settings.steps[:-1]:
        tried = []
        for guidance, gumbel, temperature in itertools.product(*TUNED_AT):
            system = studio.fixed({"guidance": guidance, "gumbel": gumbel, "temperature": temperature})
            name = f"base g{guidance:g} n{gumbel:g} t{temperature:g}"
            tried.append(_measured(folder, name, bench, system, steps))
        best = max(tried, key=lambda point: point.metrics[bench.metric].mean)
        rows.append(_row("base, tuned at this T", steps, [best], reference))
    for mode, (settings, levels) in THRESHOLDS.items():
        for level in levels:
            system = studio.fixed({"mode": mode, "threshold": level} | settings)
            point = _measured(folder, f"{mode} {level:g}", bench, system, studio.sampler.num_steps)
            rows.append(_row(f"{mode} sampler", level, [point], reference))
    return rows


def _measured(folder, name, bench, system, setting) -> measure.Point:
    """Measure once; a point that is on disk is read."""
    system = dataclasses.replace(system, name=name.replace(" ", "_"), label=name)
    path = folder / f"{system.name}-{setting:g}-{bench.settings.prompts}x{bench.settings.group}.json"
    if not path.exists():
        point = bench.measure(system, (setting,))[0]
        measure.save_samples(folder, point)
        path.write_text(json.dumps(point.to_json()))
    return measure.load_point(folder, json.loads(path.read_text()))


def _row(name: str, setting: float, points: list[measure.Point], reference: list[measure.Point]) -> dict:
    single = len({point.seed for point in points}) == 1 and len(reference) == 1
    against = [dataclasses.replace(reference[0], seed=points[0].seed)] if single else reference
    margins = {"graded": 0.02} if "graded" in points[0].metrics else {"judge": 0.02}
    compared = curve.compare(points, against, curve.Criteria(margins=margins))
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


def _write(rows: list[dict], reference: list[measure.Point], seeds: list[int]) -> None:
    facts = {"size": SIZE.value, "seeds": seeds, "commit": report.commit_hash(ROOT), "machine": report.machine()}
    facts |= {"samples": f"{reference[0].num_prompts} prompts x {reference[0].group}, every setting"}
    out = ROOT / OUT.value
    out.with_suffix(".json").write_text(json.dumps({"facts": facts, "rows": rows}, indent=1) + "\n")
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
    out.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print(f"wrote {out}.json and {out}.md", flush=True)


if __name__ == "__main__":
    app.run(main)
