"""What stage `marval` measures: the teacher's chain, the student, and one step of the teacher without distillation."""

import functools
from typing import Any

import jax

from maskrl_jax.evaluate.bench import CHOICE, Bench, read_sampler, tuning_notes
from maskrl_jax.evaluate.measure import System
from maskrl_jax.evaluate.report import Findings
from maskrl_jax.sampling import mar
from maskrl_jax.tasks import continuous, generators
from maskrl_jax.tasks.continuous import MarSampler, row_noise
from maskrl_jax.tasks.task import Context

Array = jax.Array


def one_step_draw(wiring: Any, params: Any, zeta_scale: Array | float) -> mar.Draw:
    """Draw rows by one call of the student's head."""
    network, channels = wiring.network, wiring.base.sizes.channels

    def draw(z: Array, null: Array | None, scale: Array, keys_BR: Array) -> Array:
        zeta = zeta_scale * row_noise(keys_BR, 0, channels)
        return wiring.tokens(params, network.condition(params, z), zeta)

    return draw


@functools.cache
def _one_step_draws(wiring: Any):
    """One function for all systems of a wiring, so that they share their programs."""
    return lambda params, frozen: one_step_draw(wiring, params, frozen["temperature"])


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
        """A network whose tokens take one call of its head; the setting is the number of iterations."""
        draws = _one_step_draws(self.wiring)
        return continuous.system(self.engine, params, self.sampler, draws, False, name, label)

    def evaluate(self, state: Any, step: int) -> tuple[dict, dict]:
        """A glance at the student."""
        scores, picture = self.bench.glance(self.one_step(state.ema), self.bench.settings.glance_steps)
        return scores, {"samples/grid": picture}

    def report(self, params: Any) -> None:
        """Curves of teacher, student and the teacher's one step, report.md."""
        bench, config, parents = self.bench, self.context.config, self.context.parents
        best = read_sampler(parents["mar"].workdir, MarSampler(**config.parents.mar.sampler))
        base = continuous.chain_system(self.engine, self.teacher, best, "base", "teacher")
        points = bench.measure(generators.kept(base, parents, str(best)), bench.settings.steps)
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
            "how it was chosen": CHOICE,
        }
        bench.write(findings, config.num_steps, facts)
