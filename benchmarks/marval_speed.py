"""Speed of MARVAL's one-call student against our own jitted MAR, with the FLOP ratio and the quality beside it.

python benchmarks/marval_speed.py --workdir=runs/marval      # a finished run of configs/marval.py

specs/marval.md section 13: sampling loops to tokens and to pictures, compiled, median of 20 runs after 3, all programs of
a batch size in turn; every batch size gives the time of one image. Operations are those of the traced programs. Quality
is what the run's report measured: of the teacher with its own sampler, and of the student. Writes
benchmarks/marval_speed.json and .md.
"""

import dataclasses
import json
import pathlib
import sys

import jax
import numpy as np
from absl import app, flags, logging

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from maskrl_jax import paths, program, runner  # noqa: E402
from maskrl_jax.data.dataset import conditioning_of  # noqa: E402
from maskrl_jax.evaluate import latency, provenance  # noqa: E402
from maskrl_jax.evaluate.bench import read_sampler  # noqa: E402
from maskrl_jax.tasks import continuous, marval, marval_gallery  # noqa: E402
from maskrl_jax.tasks import mar as mar_task  # noqa: E402
from maskrl_jax.tasks.continuous import MarSampler  # noqa: E402

WORKDIR = flags.DEFINE_string("workdir", "runs/marval", "finished run of configs/marval.py")
BATCHES = flags.DEFINE_multi_integer("batches", [1, 8, 32, 128], "images at a time")
STEPS = flags.DEFINE_multi_integer("steps", [8, 16], "iterations N")
INNER = flags.DEFINE_multi_integer("inner", [100, 50, 30, 10], "steps of MAR's chain")
REPEATS = flags.DEFINE_integer("repeats", latency.REPEATS, "timed runs of each")
OUT = flags.DEFINE_string("out", "benchmarks/marval_speed", "result files without their ending")


@dataclasses.dataclass(frozen=True)
class Arm:
    """A way to draw: MAR with a chain of so many steps, with or without guidance, or the student (no chain)."""

    steps: int
    inner: int
    guided: bool

    @property
    def label(self) -> str:
        if not self.inner:
            return "student, one call"
        return f"MAR, {self.inner} steps of the chain" + ", guided" * self.guided


class Loops:
    """The sampling loops of a run's two networks."""

    def __init__(self, workdir: str):
        self.context, student = runner.open_workdir(workdir)
        config = self.context.config
        conditioning = conditioning_of(config.data.name, config.data.text_length)
        self.wiring, self.null = marval.Wiring(config, conditioning), conditioning.null
        self.engine = mar_task.engine_of(self.context, self.wiring.base)
        place = self.context.parallel.replicate
        self.teacher, self.student = place(self.context.parents["mar"].params), place(student)
        parent = self.context.parents["mar"]
        self.sampler = read_sampler(parent.workdir, MarSampler(**parent.config.sampler))

    def made(self, arm: Arm, size: int, pictures: bool) -> tuple:
        """(program, its parameters, frozen arrays, a batch) of an arm."""
        chosen = dataclasses.replace(self.sampler, num_steps=arm.steps)
        plan = chosen.plan(self.engine.codec.config.num_tokens)
        draws = marval_gallery.one_step_draws(self.wiring)
        if arm.inner:
            draws = continuous.chain_draws(self.engine.network, arm.inner, chosen.method)
        run = self.engine.program(plan, arm.guided, draws, pictures)
        frozen = {"tokenizer": self.engine.tokenizer, "dials": chosen.dials(plan)}
        batch = {"cond": np.broadcast_to(self.null, (size, *self.null.shape)).astype(np.int32)}
        batch |= {"index": np.arange(size, dtype=np.int32), "seed": np.zeros(size, np.int32)}
        return run, self.teacher if arm.inner else self.student, frozen, batch

    def operations(self, arm: Arm) -> float:
        """Of one image's tokens, as traced."""
        run, params, frozen, batch = self.made(arm, 1, False)
        abstract = lambda tree: jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype), tree)  # noqa: E731
        place = self.context.parallel
        arguments = (place.abstract(abstract(params)), place.abstract(abstract(frozen)), place.abstract_batch(batch))
        return program.operations(run.jaxpr(*arguments).jaxpr, 1)

    def seconds(self, arms: list[Arm], size: int, pictures: bool) -> dict[Arm, dict]:
        """Time of one batch of every arm."""

        def timed(arm):
            run, params, frozen, batch = self.made(arm, size, pictures)
            return lambda repeat: run(params, frozen, batch | {"index": batch["index"] + size * repeat})

        return latency.measure({arm: timed(arm) for arm in arms}, repeats=REPEATS.value)


def main(_: list[str]) -> None:
    """Measure, batch size by batch size; write after each."""
    logging.set_verbosity(logging.WARNING)
    loops = Loops(WORKDIR.value)
    chains = [(inner, guided) for inner in INNER.value for guided in (True, False)]
    arms = [Arm(n, inner, guided) for n in STEPS.value for inner, guided in (*chains, (0, False))]
    operations = {arm: loops.operations(arm) for arm in arms}
    results = json.loads(pathlib.Path(WORKDIR.value, "results.json").read_text())
    scored = [p for p in results["points"] if "graded" in p["metrics"]]  # a set of classes has no verifier
    quality = {(p["system"], p["setting"]): p["metrics"]["graded"]["mean"] for p in scored}
    rows = [
        {
            **dataclasses.asdict(arm),
            "label": arm.label,
            "operations": operations[arm],
            "graded": quality.get(("base" if arm.inner else "tuned", arm.steps)) if _is_measured(loops, arm) else None,
            "tokens": {},
            "pictures": {},
        }
        for arm in arms
    ]
    out = (ROOT / OUT.value).with_suffix(".json")
    # Before anything is written: the tables themselves are no change of the code.
    facts = {"machine": provenance.machine(), "commit": provenance.commit_hash(ROOT), "config": results["config"]}
    for size in BATCHES.value:
        for kind in ("tokens", "pictures"):
            for row, spread in zip(rows, loops.seconds(arms, size, kind == "pictures").values(), strict=True):
                row[kind][str(size)] = dataclasses.asdict(spread)
        paths.write(str(out), json.dumps({"facts": facts, "rows": rows}, indent=1) + "\n")
        paths.write(str(out.with_suffix(".md")), table(facts, rows))
    print(f"wrote {out.with_suffix('.md')}", flush=True)


def _is_measured(loops: Loops, arm: Arm) -> bool:
    """Whether the run's report measured an arm: the student, or the teacher with the sampler of its own report."""
    if not arm.inner:
        return True
    return (arm.inner, arm.guided) == (loops.sampler.inner_steps, loops.sampler.guidance != 1)


def table(facts: dict, rows: list[dict]) -> str:
    """One row an arm; the best batch is that of the least time an image, of each arm for itself."""
    sizes = list(rows[0]["tokens"])
    own = {row["steps"]: row for row in rows if not row["inner"]}
    columns = ["iterations", "system", "graded", "GFLOP an image", "x student's"]
    columns += [f"ms an image, batch {size}" for size in sizes] + [f"with pictures, batch {sizes[0]}"]
    columns += [f"x student's, batch {sizes[0]}", "x student's, best batch"]
    lines = [
        "# One call against the chain",
        "",
        f"{facts['config']}, commit {facts['commit']}, {facts['machine']}. Times are of sampling loops to tokens, and with "
        "the decoder where it says so; a best batch is each system's own.",
        "",
        "| " + " | ".join(columns) + " |",
        "|---:|---|" + "---:|" * (len(columns) - 2),
    ]
    for row in rows:
        one = own[row["steps"]]
        per = {size: row["tokens"][size]["median"] / int(size) for size in sizes}
        their = {size: one["tokens"][size]["median"] / int(size) for size in sizes}
        graded = "" if row["graded"] is None else f"{row['graded']:.3f}"
        cells = [str(row["steps"]), row["label"], graded, f"{row['operations'] / 1e9:.3f}"]
        cells += [f"{row['operations'] / one['operations']:.1f}"]
        cells += [f"{1000 * x:.2f}" for x in per.values()] + [f"{1000 * row['pictures'][sizes[0]]['median']:.2f}"]
        cells += [f"{per[sizes[0]] / their[sizes[0]]:.1f}", f"{min(per.values()) / min(their.values()):.1f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    app.run(main)
