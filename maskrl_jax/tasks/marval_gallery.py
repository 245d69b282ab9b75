"""What stages `marval` and `marval_rl` measure: the teacher's chain, the student, what it comes from and what it becomes."""

import functools
from collections.abc import Mapping
from typing import Any

import jax

from maskrl_jax.evaluate import gain
from maskrl_jax.evaluate.bench import Bench, read_sampler, tuning_notes
from maskrl_jax.evaluate.measure import System
from maskrl_jax.evaluate.report import Findings
from maskrl_jax.sampling import mar
from maskrl_jax.tasks import continuous, generators
from maskrl_jax.tasks.continuous import MarSampler, row_noise
from maskrl_jax.tasks.task import Context

Array = jax.Array


def one_step_draw(wiring: Any, params: Any) -> mar.Draw:
    """Draw rows by one call of the student's head."""
    network, channels = wiring.network, wiring.base.sizes.channels

    def draw(z: Array, null: Array | None, dials: mar.Dials, keys_BR: Array) -> Array:
        zeta = dials.temperature * row_noise(keys_BR, 0, channels)
        return wiring.tokens(params, network.condition(params, z), zeta)

    return draw


@functools.cache
def one_step_draws(wiring: Any):
    """One function for all systems of a wiring, so that they share their programs."""
    return lambda params: one_step_draw(wiring, params)


def one_step_system(
    engine: continuous.Engine, wiring: Any, params: Any, sampler: MarSampler, name: str, label: str
) -> System:
    """A network whose tokens take one call of its head; the setting is the number of iterations."""
    return continuous.system(engine, params, sampler, one_step_draws(wiring), False, name, label)


def student_studio(
    context: Context, wiring: Any, engine: continuous.Engine, params: Any, label: str
) -> continuous.Studio:
    """A one-call student as a user samples from it."""
    params = context.parallel.replicate(params)
    system = lambda chosen: one_step_system(engine, wiring, params, chosen, "fixed", label)  # noqa: E731
    held_out, sampler = generators.conditions_of(context), MarSampler(**context.config.sampler)
    return continuous.Studio(engine, held_out, sampler, system, takes=("num_steps", "temperature", "full_noise"))


def chain_of_teacher(context: Context, engine: continuous.Engine, teacher: Any, name: str) -> tuple[System, MarSampler]:
    """The teacher with the sampler that its own report chose, and that sampler."""
    parent = context.parents["mar"]
    best = read_sampler(parent.workdir, MarSampler(**parent.config.sampler))
    chain = continuous.chain_system(engine, teacher, best, name, "teacher")
    return generators.kept(chain, context.parents, str(best)), best


class MarvalGallery:
    """The glances and the report of a run; `teacher` are the parameters of the frozen network."""

    def __init__(self, context: Context, wiring: Any, engine: continuous.Engine, teacher: Any):
        self.context, self.wiring, self.engine, self.teacher = context, wiring, engine, teacher
        self.sampler = MarSampler(**context.config.sampler)

    @functools.cached_property
    def bench(self) -> Bench:
        """Made when first needed: it reads the held-out pictures."""
        return generators.bench_of(self.context)

    def one_step(self, params: Any, name: str = "tuned", label: str = "student, one call") -> System:
        return one_step_system(self.engine, self.wiring, params, self.sampler, name, label)

    def evaluate(self, state: Any, step: int) -> tuple[dict, dict]:
        """A glance at the student."""
        scores, picture = self.bench.glance(self.one_step(state.ema), self.bench.settings.glance_steps)
        return scores, {"samples/grid": picture}

    def report(self, params: Any) -> None:
        """Curves of teacher, student and the teacher's one step, report.md."""
        bench, config, parents = self.bench, self.context.config, self.context.parents
        base, best = chain_of_teacher(self.context, self.engine, self.teacher, "base")
        points = bench.measure(base, bench.settings.steps)
        reference = points[-1:]
        points += bench.measure(self.one_step(self.engine.parallel.replicate(params)), bench.settings.steps)
        points += bench.measure(self.one_step(self.teacher, "untrained", "teacher, one step"), bench.settings.steps)
        findings = Findings(
            title=f"MARVAL on {config.data.name}",
            config=config.name,
            points=points,
            reference=reference,
            criteria=bench.criteria(),
            tuned="tuned",
            goal=bench.settings.goal,
            trained_on=("scores of the teacher at the student's samples",),
            held_out=("every score", "the prompts (the teacher has seen pictures of every caption)"),
            notes=tuning_notes(parents["mar"].workdir, bench.settings.reference),
        )
        facts = {
            "network calls": "iterations of the backbone, the teacher's second branch of guidance not counted; each also "
            f"runs {best.inner_steps} calls of the teacher's head or one of the student's",
            "sampler of the teacher": best.in_words(),
            "how it was chosen": bench.choice,
            "noise of the student": self.sampler.noise_in_words(),
        }
        bench.write(findings, config.num_steps, facts)


class MarvalRlGallery(MarvalGallery):
    """The same glances and another report, of `marval_rl`; `networks` are the parameters of teacher and student."""

    def __init__(self, context: Context, tuning: Any, engine: continuous.Engine, networks: Mapping[str, Any]):
        super().__init__(context, tuning.marval, engine, networks["teacher"])
        self.tuning, self.student = tuning, networks["student"]

    def report(self, params: Any) -> None:
        """Curves of student, tuned student and teacher, under the same noise; report.md."""
        bench, config, wiring = self.bench, self.context.config, self.tuning
        tuned = self.engine.parallel.replicate(params)
        points = bench.measure(self.one_step(self.student, "base", "student"), bench.settings.steps)
        reference = points[-1:]
        points += bench.measure(self.one_step(tuned, "tuned", "tuned student"), bench.settings.steps)
        teacher, best = chain_of_teacher(self.context, self.engine, self.teacher, "teacher")
        points += bench.measure(teacher, bench.settings.steps)
        findings = Findings(
            title=f"MARVAL-RL on {config.data.name}",
            config=config.name,
            points=points,
            reference=reference,
            criteria=bench.criteria(),
            tuned="tuned",
            aim=gain.Goal(bench.metric, **config.aim),
            trained_on=tuple(f"{name} x {weight:g}" for name, weight in wiring.rewards.items()),
            held_out=(
                *bench.untrained(wiring.rewards),
                "the prompts (the teacher has seen pictures of every caption)",
            ),
            notes=tuning_notes(self.context.parents["mar"].workdir, bench.settings.reference),
        )
        kept = wiring.truncation.iterations or wiring.plan.num_steps
        facts = {
            "network calls": "iterations of the backbone; each also runs one call of the student's head or "
            f"{best.inner_steps} of the teacher's",
            "sampler of the teacher": best.in_words(),
            "how it was chosen": bench.choice,
            "noise of the student": self.sampler.noise_in_words(),
            "gradient": f"of the policy, noise {wiring.policy.settings.deviation:g}"
            if wiring.policy
            else f"of the reward through {kept} of {wiring.plan.num_steps} iterations"
            + ", contexts detached" * wiring.truncation.detach_context,
            "noise on the tokens that are scored": f"{wiring.smoothing:g}",
            "anchor": f"{wiring.anchor.kind}, weight {wiring.anchor.weight:g} by {wiring.anchor.by}",
        }
        bench.write(findings, config.num_steps, facts)
