"""MaskFocus against its base, its ablations and Mask-GRPO (specs/maskfocus.md section 12), in one resumable command.

python benchmarks/maskfocus.py                                  # the ablation: every arm, three seeds
python benchmarks/maskfocus.py --only=critical --only=all       # trains these, writes what is finished
python benchmarks/maskfocus.py --claim --out=benchmarks/maskfocus_claim   # the default config as it is, three seeds
XLA_PYTHON_CLIENT_PREALLOCATE=false python benchmarks/maskfocus.py --iterations=80 --jobs=15 --out=benchmarks/maskfocus_80

Arms of the ablation optimise two of the eight steps (the spec's least K) and the first call, for equally many
iterations with one optimizer update each (`accumulate`), so that arms that optimise more steps do not get more updates.
"First 20 %" needs K of the first fifth of the steps and has no arm: a fifth of eight is one. `all, equal compute` and
`mask-grpo, equal compute` get as many iterations as the compute model of section 11 allows for the same forwards.
What is finished is in <out>.json with a number a prompt, and is not done again, on whatever machine the command goes
on; every run is compared with its own base, for the same training ends elsewhere on another processor. Bounds: 95 %
paired bootstrap over prompts and seeds.
"""

import functools
import json
import pathlib
import sys

import numpy as np
from absl import app, flags

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import side_by_side  # noqa: E402
from configs import maskfocus as maskfocus_config  # noqa: E402
from maskrl_jax import paths  # noqa: E402
from maskrl_jax.evaluate import bootstrap, canvas, measure  # noqa: E402
from maskrl_jax.evaluate.bootstrap import Interval  # noqa: E402

SEEDS = flags.DEFINE_multi_integer("seeds", [0, 1, 2], "seed of a run, once for each; the base is shared")
ITERATIONS = flags.DEFINE_integer("iterations", 24, "rounds of rollouts of an arm of the ablation", lower_bound=12)
JOBS = flags.DEFINE_integer("jobs", 1, "runs at a time; what several print goes to <run>.log", lower_bound=1)
CLAIM = flags.DEFINE_bool("claim", False, "train the default config instead of the ablation")
RUNS = flags.DEFINE_string("runs", "runs/maskfocus-arms", "where the runs go")
STORE = flags.DEFINE_string("store", "runs/stages", "where trained parents are")
OUT = flags.DEFINE_string("out", "benchmarks/maskfocus", "result files without their ending")

ABLATION = {"loss.update_mode": "accumulate", "steps.count": 2, "optimizer.learning_rate": 4e-4}
ARMS = {
    "critical": {},
    "random early": {"steps.select": "random_early"},
    "random all": {"steps.select": "random"},
    "first": {"steps.select": "first"},
    "all": {"steps.select": "all"},
    "all, equal compute": {"steps.select": "all"},
    "routing off": {"rollout.routing": "off"},
    "routing all": {"rollout.routing": "all_explore"},
    "trajectory masks": {"loss.remask": "trajectory"},
    "mask-grpo, equal compute": {},
}
MORE = {  # trained only when named with --only
    "offset 0": {"steps.timestep_offset": 0},  # changes nothing for this base, which reads no timestep
    "frozen noise": {"rollout_noise": "frozen"},
    "sequential": {"loss.update_mode": "sequential"},
    "no clip": {"loss.update_mode": "sequential", "loss.clip_eps": 0.0},
    "full KL": {"loss.kl": "full"},
    "no guidance": {"rollout.guidance": 1.0},
    "guidance 3": {"rollout.guidance": 3.0},
    "guidance 5": {"rollout.guidance": 5.0},
}
ONLY = flags.DEFINE_multi_enum("only", None, [*ARMS, *MORE], "train this arm; the table holds what is finished")
METRICS = ("graded", "strict", "judge", "diversity")


def forwards(slots: int, guided: bool, per_slot: int) -> float:
    """Forward passes of an image in one iteration (section 11; a backward counts two)."""
    steps = maskfocus_config.SAMPLING_STEPS[""]
    return steps * (2 if guided else 1) + slots * per_slot


def iterations(arm: str) -> int:
    """Rounds of an arm."""
    config = maskfocus_config.get_config("")
    if arm == "claim":
        return config.num_steps
    steps, guided = config.rollout.num_steps, config.rollout.guidance != 1
    first = config.steps.first_call
    ours = forwards(ABLATION["steps.count"] + first, guided, 4)  # reference, forward, backward
    theirs = {
        "all, equal compute": forwards(steps - 1 + first, guided, 4),
        "mask-grpo, equal compute": forwards(steps, False, 4),
    }
    return max(round(ITERATIONS.value * ours / theirs[arm]), 1) if arm in theirs else ITERATIONS.value


def main(_: list[str]) -> None:
    """Train what is missing, write after every run."""
    if CLAIM.value and ONLY.value:
        sys.exit("error: --only names arms of the ablation, and --claim trains the default config; leave one out")
    out = (ROOT / OUT.value).with_suffix(".json")
    done = json.loads(out.read_text()) if out.exists() else {"runs": {}}
    arms = ["claim"] if CLAIM.value else list(ONLY.value or ARMS)
    missing = []
    for seed in SEEDS.value:
        for arm in arms:
            name, wanted = f"{arm}, seed {seed}", iterations(arm)
            known = done["runs"].get(name)
            if known and known["iterations"] != wanted:
                sys.exit(
                    f"error: {out} has {name} with {known['iterations']} iterations, not {wanted}; give another --out"
                )
            if not known:
                missing.append((name, arm, seed))
    runs = side_by_side.Runs(JOBS.value)

    def keep(name: str, workdir: pathlib.Path) -> None:
        done["runs"][name] = _numbers(workdir)
        paths.write(str(out), json.dumps(done) + "\n")

    trainings = {name: functools.partial(_train, runs, arm, seed) for name, arm, seed in missing}
    failed = runs.all(trainings, keep)
    if done["runs"]:
        _write(done, out.with_suffix(".md"))
    if failed:
        sys.exit(failed)


def _train(runs: side_by_side.Runs, arm: str, seed: int) -> pathlib.Path:
    workdir = ROOT / RUNS.value / f"{arm.replace(' ', '_').replace(',', '')}-{iterations(arm)}-seed{seed}"
    stage = "mask_grpo" if arm.startswith("mask-grpo") else "maskfocus"
    changes = {"seed": seed}
    if arm != "claim":  # average and warm-up are the same share of a run, whatever its length
        averaged, warmup = 1 - 2.4 / ITERATIONS.value, ITERATIONS.value // 12
        changes |= {"num_steps": iterations(arm), "optimizer.ema_decay": averaged, "optimizer.warmup_steps": warmup}
    if arm in ARMS | MORE and stage == "maskfocus":
        changes |= ABLATION | (ARMS | MORE)[arm]
    return runs.train(f"configs/{stage}.py", workdir, STORE.value, changes)


def _points(workdir: pathlib.Path, system: str) -> dict[str, list[float]]:
    """A number a prompt at T_ref, and the Frechet distance."""
    results = json.loads((workdir / "results.json").read_text())
    setting = results["reference"][0]["setting"]
    plain = next(p for p in results["points"] if (p["system"], p["setting"]) == (system, setting))
    point = measure.load_point(workdir / "points", plain)
    values = {name: np.round(point.per_prompt(name), 4).tolist() for name in METRICS}
    return values | {"frechet": [point.frechet]}


def _numbers(workdir: pathlib.Path) -> dict:
    """What is kept of a run."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    updates = [line for line in lines if "rl/clip_frac" in line]
    last = updates[-max(len(updates) // 4, 1) :]
    logged = {
        name: float(np.mean([line[name] for line in last if line.get(name) is not None]))
        for name in ("rl/kl", "rl/clip_frac", "reward/quality", "reward_heldout/graded")
        if any(line.get(name) is not None for line in last)
    }
    seconds = [line["perf/step_time"] for line in updates[1:]]  # the first compiles
    facts = json.loads((workdir / "results.json").read_text())["facts"]
    return {
        "base": _points(workdir, "base"),
        "tuned": _points(workdir, "tuned"),
        "iterations": updates[-1]["step"],
        "seconds_an_iteration": float(np.median(seconds)) if seconds else None,
        "alarms": sum(bool(line.get("alarm/held_out")) for line in updates),
        "last_quarter": logged,
        "commit": facts["commit"],
        "machine": facts["machine"],
    }


def _write(done: dict, path: pathlib.Path) -> None:
    arms = {
        arm: [done["runs"][name] for name in sorted(done["runs"]) if name.rsplit(", seed", 1)[0] == arm]
        for arm in (*ARMS, *MORE, "claim")
    }
    arms = {arm: runs for arm, runs in arms.items() if runs}
    bases = {json.dumps(run["base"]): run["base"] for run in done["runs"].values()}
    prompts = len(next(iter(bases.values()))["graded"])
    scores = "; ".join(
        f"graded {np.mean(base['graded']):.3f}, strict {np.mean(base['strict']):.3f}, diversity "
        f"{np.mean(base['diversity']):.2f}, Frechet distance {base['frechet'][0]:.1f}"
        for base in bases.values()
    )
    lines = [
        f"# {'MaskFocus, the default config' if 'claim' in arms else 'MaskFocus: ablation'} on the embedded task",
        "",
        f"At T = {maskfocus_config.SAMPLING_STEPS['']} with the base's best sampler, {prompts} held-out prompts x "
        f"{maskfocus_config.evaluation('')['group']} samples, the same keys for all. Base: {scores}. Commits: "
        f"{', '.join(sorted({run['commit'] for runs in arms.values() for run in runs}))}. Machine: "
        f"{', '.join(sorted({run['machine'] for runs in arms.values() for run in runs}))}.",
        "",
        "| arm | seeds | iterations | s / iteration | graded | strict | gap closed [95 %] | each seed "
        "| graded against critical | diversity ratio | FD ratio | KL | alarms |",
        "|---|---:|---:|---:|---:|---:|---|---|---|---:|---:|---:|---:|",
    ]
    lines += [_row(arm, runs, _against(done["runs"], arm)) for arm, runs in arms.items()]
    path.write_text("\n".join(lines) + "\n")
    if len(arms) > 1:
        _draw(arms, path.with_suffix(".png"))
    print(f"wrote {path}", flush=True)


def _closed(runs: list[dict]) -> tuple[Interval, np.ndarray]:
    """Share of the base's gap to a graded score of 1 that is closed, over all seeds and of each alone."""
    tuned, base = (np.array([run[side]["graded"] for run in runs]) for side in ("tuned", "base"))
    left = bootstrap.paired_ratio(1 - tuned, 1 - base)
    alone = 1 - (1 - tuned).mean(1) / (1 - base).mean(1)
    return Interval(1 - left.mean, 1 - left.high, 1 - left.low), alone


@canvas.styled
def _draw(arms: dict[str, list[dict]], path: pathlib.Path) -> None:
    """Draw the share of the gap that each arm closes, with its bounds, and its seeds as small dots."""
    figure = canvas.new_figure(height=0.3 * len(arms) + 0.9, width=6.4)
    axes = figure.subplots()
    for place, runs in enumerate(arms.values()):
        closed, alone = _closed(runs)
        colour = canvas.COLOURS[1 if not place else 2]
        axes.plot([100 * closed.low, 100 * closed.high], [place, place], color=colour, linewidth=1.6)
        axes.plot(100 * closed.mean, place, "D", color=colour, markeredgecolor="white", markersize=7, zorder=3)
        axes.plot(100 * alone, np.full(len(alone), place + 0.25), ".", color=canvas.QUIET, markersize=4)
    axes.axvline(0, color=canvas.QUIET, linewidth=0.9)
    axes.set_yticks(range(len(arms)), [f"{arm} ({len(runs)})" for arm, runs in arms.items()])
    axes.invert_yaxis()
    axes.set_xlabel("% of the gap to a graded score of 1 closed (bar: 95 %, dot: a seed)")
    axes.grid(axis="y", visible=False)
    canvas.save(figure, path)


def _row(arm: str, runs: list[dict], against: str) -> str:
    scores = {name: np.array([run["tuned"][name] for run in runs]) for name in (*METRICS, "frechet")}
    base = {name: np.array([run["base"][name] for run in runs]) for name in (*METRICS, "frechet")}
    closed, alone = _closed(runs)
    seconds = [run["seconds_an_iteration"] for run in runs if run["seconds_an_iteration"]]
    kl = [run["last_quarter"].get("rl/kl") for run in runs]
    cells = [
        arm,
        str(len(runs)),
        "/".join(str(i) for i in sorted({run["iterations"] for run in runs})),
        f"{np.mean(seconds):.1f}" if seconds else "",
        f"{scores['graded'].mean():.3f}",
        f"{scores['strict'].mean():.3f}",
        f"{100 * closed.mean:.0f} % [{100 * closed.low:.0f}, {100 * closed.high:.0f}]",
        ", ".join(f"{100 * share:.0f} %" for share in alone),
        against,
        f"{scores['diversity'].mean() / base['diversity'].mean():.2f}",
        f"{scores['frechet'].mean() / base['frechet'].mean():.2f}",
        f"{np.mean([x for x in kl if x is not None]):.4f}" if any(x is not None for x in kl) else "",
        str(sum(run["alarms"] for run in runs)),
    ]
    return "| " + " | ".join(cells) + " |"


def _against(runs: dict[str, dict], arm: str) -> str:
    """Paired difference of the graded score from that of the critical arm, over the seeds that both have."""
    pairs = [
        (run["tuned"]["graded"], other["tuned"]["graded"])
        for name, run in runs.items()
        if name.startswith(f"{arm}, seed") and (other := runs.get(name.replace(arm, "critical", 1)))
    ]
    if arm == "critical" or not pairs:
        return ""
    return f"{bootstrap.paired_difference(*(np.array(side) for side in zip(*pairs, strict=True))):+}"


if __name__ == "__main__":
    app.run(main)
