"""MAR, its one-call student and the tuned student on the embedded task, and the experiments of specs/marval.md section 14.

python benchmarks/marval.py --jobs=2                 # the claim: every stage, three seeds of all of them
python benchmarks/marval.py --only=marval            # this arm, and what it stands on where that is not there
python benchmarks/marval.py --screen --jobs=2        # section 14: one change each, one teacher; marval_arms.{json,md,png}

Tokenizer and judge are those of the store; a seed has a MAR, a student and tuned students of its own, and noise of its
own to measure them with. An arm is compared with what stands beside it in its own report, under the same prompts and
keys: MAR with nothing, a student with its teacher's chain, a tuned student with the student. What is finished is in
<out>.json with a number a prompt, and is not done again; --screen draws <out>.png, too. Bounds: 95 % paired bootstrap
over prompts and seeds.
"""

import dataclasses
import functools
import json
import os
import pathlib
import sys
from typing import Any

import numpy as np
from absl import app, flags

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import marval_table, side_by_side  # noqa: E402
from maskrl_jax import paths  # noqa: E402
from maskrl_jax.evaluate import measure  # noqa: E402

STAGES = ("mar", "marval", "marval_rl")


@dataclasses.dataclass(frozen=True)
class Arm:
    """A run of a stage with changes of its config."""

    stage: str
    changes: dict[str, Any] = dataclasses.field(default_factory=dict)
    argument: str = ""


FREE = {"anchor.kind": "none", "anchor.weight": 0.0}
CLAIM = {
    "mar": Arm("mar"),
    "marval": Arm("marval"),
    "marval_rl": Arm("marval_rl"),
    "marval_rl, no anchor": Arm("marval_rl", FREE),
}
# The score matching alone, from a copy of the teacher, in small batches: 200 updates of the student.
SHORT = {"num_steps": 250, "batch_size": 16, "regression.updates": 0, "optimizer.learning_rate": 4e-5}
SHORT |= {"evaluation.steps": "(16,)", "evaluation.group": 2}


def _student(**changes: Any) -> Arm:
    return Arm("marval", SHORT | {name.replace("__", "."): value for name, value in changes.items()})


def _tuned(argument: str = "", **changes: Any) -> Arm:
    own = FREE | {"truncation.detach_context": False, "num_steps": 30, "batch_size": 32}
    own |= {"evaluation.steps": "(16,)", "evaluation.group": 2, "eval_every": 0}
    return Arm("marval_rl", own | {name.replace("__", "."): value for name, value in changes.items()}, argument)


SCREEN = {
    "score matching alone": _student(),
    "rate 1e-5": _student(optimizer__learning_rate=1e-5),
    # 0, ours: how the student begins
    "regression first": _student(regression__updates=250, num_steps=500),
    "regression first, rate 1e-5": _student(regression__updates=250, num_steps=500, optimizer__learning_rate=1e-5),
    "regression alone": _student(regression__updates=250, num_steps=251, distillation__warm_up=0),  # and one update
    "regression of 8 steps": _student(
        regression__updates=250, num_steps=251, distillation__warm_up=0, regression__chain_steps=8
    ),
    "regression, radius 1": _student(
        regression__updates=250, num_steps=251, distillation__warm_up=0, regression__radius=1.0
    ),
    # 1: the loss
    "kappa 1 (GSIM)": _student(loss__kappa=1.0),
    "kappa -0.4": _student(loss__kappa=-0.4),
    "squared norm": _student(loss__norm="squared", loss__weight="x0"),
    "frozen norm": _student(loss__norm="frozen"),
    "dmd": _student(loss__norm="dmd"),
    "as published": _student(loss__kappa=1.0, loss__guidance=1.2),
    # 2: the one-step form
    "t* 399": _student(model__time=399),
    "t* 600": _student(model__time=600),
    "t* 900": _student(model__time=900),
    "u = zeta": _student(model__scale="one"),
    "direct x0": _student(model__form="x0", model__time=999),
    # 3: weight, times, radius
    "weight x0": _student(loss__weight="x0"),
    "weight raw": _student(loss__weight="raw"),
    "weight kl, squared": _student(loss__norm="squared", loss__weight="kl"),
    "t up to 900": _student(loss__last=900),
    "t up to 990": _student(loss__last=990),
    "t from 100": _student(loss__first=100),
    "r 1e-3": _student(loss__radius=1e-3),
    "r 1e-2": _student(loss__radius=1e-2),
    "r 0.2": _student(loss__radius=0.2),
    # 4: trained parts
    "student's head alone": _student(distillation__student="head_only"),
    "auxiliary's head alone": _student(distillation__auxiliary="head_only"),
    "heads alone": _student(distillation__student="head_only", distillation__auxiliary="head_only"),
    # 5: guidance; 2 is the default
    "w 1.0": _student(loss__guidance=1.0),
    "w 1.2": _student(loss__guidance=1.2),
    "w 1.5": _student(loss__guidance=1.5),
    "w 3": _student(loss__guidance=3.0),
    # 6: norm, updates
    "norm over an image": _student(loss__over="image"),
    "2 auxiliary steps": _student(distillation__auxiliary_steps=2),
    "5 auxiliary steps": _student(distillation__auxiliary_steps=5),
    # As many updates of the student as the others.
    "no warm-up": _student(distillation__warm_up=0, num_steps=200),
    "warm-up of 200": _student(distillation__warm_up=200, num_steps=400),
    # 7, iterations, is in the claim: every run of it measures several numbers of them
    # 8: tuning
    "tuned": _tuned(),
    "tuned, K 8": _tuned(rollout__num_steps=8, evaluation__steps="(8, 16)"),  # measured where it was tuned, too
    "tuned, J 4 of 16": _tuned(truncation__iterations=4),
    "tuned, J 2 of 16": _tuned(truncation__iterations=2),
    "tuned, contexts detached": _tuned(truncation__detach_context=True),
    "tuned, gsim": _tuned(anchor__kind="gsim", anchor__weight=1.0, anchor__by="gradient"),
    "tuned, l2_ref": _tuned(anchor__kind="l2_ref", anchor__weight=10.0),
    "tuned by policy gradient": _tuned("policy"),
}
SEEDS = flags.DEFINE_multi_integer("seeds", None, "seed of all stages, once for each; default 0, 1, 2; of --screen 0")
SCREENED = flags.DEFINE_bool("screen", False, "run section 14's arms, short, on seed 0's stages of the claim")
ONLY = flags.DEFINE_multi_enum("only", None, [*CLAIM, *SCREEN], "train this arm; the table holds what is finished")
JOBS = flags.DEFINE_integer("jobs", 1, "runs at a time; what several print goes to <run>.log", lower_bound=1)
RUNS = flags.DEFINE_string("runs", "runs/marval-arms", "where the runs go")
STORE = flags.DEFINE_string("store", "runs/stages", "where tokenizer and judge are")
OUT = flags.DEFINE_string(
    "out", None, "result files without their ending; default benchmarks/marval, _arms with --screen"
)
METRICS = ("graded", "strict", "diversity")
EVALUATION_SEED = 17  # of seed 0; each further seed has the next


def main(_: list[str]) -> None:
    """Train what is missing, a stage after the other, and write after every run."""
    arms = SCREEN if SCREENED.value else CLAIM
    foreign = [name for name in ONLY.value or () if name not in arms]
    if foreign:
        sys.exit(f"error: {foreign[0]!r} is an arm {'without' if SCREENED.value else 'of'} --screen")
    out = ROOT / f"{OUT.value or 'benchmarks/marval' + '_arms' * SCREENED.value}.json"
    done = json.loads(out.read_text()) if out.exists() else {"runs": {}}
    unknown = [key for key in done["runs"] if marval_table.arm_of(key) not in arms]
    if unknown:
        sys.exit(f"error: {out} holds {unknown[0]!r}, which is no arm {'of' if SCREENED.value else 'without'} --screen")
    runs = side_by_side.Runs(JOBS.value)

    def keep(name: str, workdir: pathlib.Path) -> None:
        done["runs"][name] = _numbers(arms[marval_table.arm_of(name)], workdir)
        paths.write(str(out), json.dumps(done) + "\n")

    seeds = SEEDS.value or ((0,) if SCREENED.value else (0, 1, 2))
    lacks = {
        (name, seed) for name in ONLY.value or arms for seed in seeds if f"{name}, seed {seed}" not in done["runs"]
    }
    lacks |= _parents_that_are_gone(arms, lacks)
    failed = ""
    for stage in STAGES:  # a stage stands on the one before it
        missing = {
            f"{name}, seed {seed}": functools.partial(_train, runs, name, arms[name], seed)
            for name, seed in sorted(lacks)
            if arms[name].stage == stage
        }
        failed = failed or runs.all(missing, keep)
        if failed:
            break
    if done["runs"]:
        title = "MAR, MARVAL and MARVAL-RL on the embedded task" + ": section 14" * SCREENED.value
        marval_table.write(title, done["runs"], list(arms), out.with_suffix(".md"))
        if SCREENED.value:
            marval_table.draw(done["runs"], list(arms), out.with_suffix(".png"))
        print(f"wrote {out.with_suffix('.md')}", flush=True)
    if failed:
        sys.exit(failed)


def _parents_that_are_gone(arms: dict[str, Arm], lacks: set[tuple[str, int]]) -> set[tuple[str, int]]:
    """Arms to train again, though the table has them, for a lacking arm stands on their workdir; of the claim alone."""
    below = {(parent, seed) for name, seed in lacks for parent in STAGES[: STAGES.index(arms[name].stage)]}
    return {(parent, seed) for parent, seed in below if parent in arms and not os.path.exists(_workdir(parent, seed))}


def _workdir(name: str, seed: int) -> pathlib.Path:
    return ROOT / RUNS.value / f"{name.replace(' ', '_').replace(',', '')}-seed{seed}"


def _train(runs: side_by_side.Runs, name: str, arm: Arm, seed: int) -> pathlib.Path:
    changes = {"seed": seed, "evaluation.seed": EVALUATION_SEED + seed}
    for parent in STAGES[: STAGES.index(arm.stage)]:
        below = _workdir(parent, seed)
        if not os.path.exists(below):
            sys.exit(f"error: {name} stands on {below}, which is not there; train --only={parent} first")
        changes[f"init.{parent}"] = below
    config = f"configs/{arm.stage}.py" + f":{arm.argument}" * bool(arm.argument)
    folder = f"screen/{name}" if SCREENED.value else name
    return runs.train(config, _workdir(folder, seed), STORE.value, changes | arm.changes)


def _numbers(arm: Arm, workdir: pathlib.Path) -> dict:
    """What is kept of a run: every point with a number a prompt, and what training took."""
    results = json.loads((workdir / "results.json").read_text())
    points = []
    for plain in results["points"]:
        point = measure.load_point(workdir / "points", plain)
        values = {name: np.round(point.per_prompt(name), 4).tolist() for name in METRICS}
        kept = {"system": point.system, "label": point.label, "setting": point.setting}
        points.append(kept | {"frechet": point.frechet} | values)
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    seconds = [line["perf/step_time"] for line in lines if "perf/step_time" in line]
    return {
        "stage": arm.stage,
        "points": points,
        "reference": results["reference"][0]["setting"],
        "updates": lines[-1]["step"],
        "seconds_an_update": float(np.mean(seconds)),  # phases differ
        "sampler": results["facts"].get("sampler", results["facts"].get("sampler of the teacher")),
        "commit": results["facts"]["commit"],
        "machine": results["facts"]["machine"],
    }


if __name__ == "__main__":
    app.run(main)
