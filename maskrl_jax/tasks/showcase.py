"""What stages that tune for quality measure and show: the tuned model beside its base, both with the base's sampler."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

from maskrl_jax.evaluate import gain
from maskrl_jax.evaluate.bench import Bench, tuning_notes
from maskrl_jax.evaluate.illustrate import Illustration
from maskrl_jax.evaluate.measure import System
from maskrl_jax.evaluate.report import Findings
from maskrl_jax.evaluate.systems import Engine, fixed_program, fixed_system
from maskrl_jax.sampling.maskgit import SamplerConfig
from maskrl_jax.tasks import generators
from maskrl_jax.tasks.rollouts import ALARMS
from maskrl_jax.tasks.task import Context
from maskrl_jax.writers import read_metrics


class Showcase:
    """Measure a tuned model and its base with the same sampler, prompts and keys."""

    def __init__(
        self,
        context: Context,
        base: Any,
        engine: Engine,
        sampler: SamplerConfig,
        base_params: Any,
        *,
        title: str,
        facts: dict[str, str],
        notes: Sequence[str],
        model_of: Callable[[Any], Any] = lambda params: params,
        draw: Callable[[Any], Callable[[str], Sequence[Illustration]]] | None = None,
    ):
        """`model_of` finds the network among the stage's parameters.

        `draw(params)` prepares the stage's own figures, on all processes; what it returns draws into a folder.
        """
        self.context, self.config, self.base_of = context, context.config, base
        self.engine, self.sampler, self.title, self.facts, self.notes = engine, sampler, title, facts, notes
        self.draw, self.model_of, self.program = draw, model_of, fixed_program(engine)
        self.base = generators.kept(self._system(base_params, "base", "base"), context.parents, str(sampler))

    @functools.cached_property
    def bench(self) -> Bench:
        """Made when first needed: it reads the held-out pictures."""
        return generators.bench_of(self.context)

    def _system(self, params: Any, name: str, label: str) -> System:
        return fixed_system(self.engine, self.program, params, self.sampler, name, label)

    def evaluate(self, state: Any, step: int) -> tuple[dict, dict]:
        """A glance at the average of the parameters."""
        values, picture = self.bench.glance(
            self._system(self.model_of(state.ema), "tuned", "tuned"), self.bench.settings.reference
        )
        return values, {"samples/grid": picture}

    def report(self, params: Any) -> None:
        """Curves of base and tuned, the gain at T_ref, figures, report.md."""
        bench, config = self.bench, self.config
        params = self.engine.parallel.replicate(params)
        base_points = bench.measure(self.base, bench.settings.steps)
        tuned_points = bench.measure(
            self._system(self.model_of(params), "tuned", f"tuned ({config.task})"), bench.settings.steps
        )
        findings = Findings(
            title=self.title,
            config=config.name,
            points=[*base_points, *tuned_points],
            reference=base_points[-1:],
            criteria=bench.criteria(),
            tuned="tuned",
            aim=gain.Goal(bench.metric, **config.aim),
            trained_on=self.base_of.trained_on(),
            held_out=(
                *(self.base_of.held_out or ("no reward",)),
                "the prompts (never trained on here; the base has seen their pictures)",
            ),
            notes=(
                *self.notes,
                *tuning_notes(self.context.parents["maskgit"].workdir, bench.settings.reference),
                alarm_note(read_metrics(self.context.workdir)),
            ),
        )
        facts = {
            "sampler of both": f"{self.sampler.mode}, Gumbel {self.sampler.gumbel:g}, guidance "
            f"{self.sampler.guidance:g}, temperature {self.sampler.temperature:g}, {self.sampler.schedule}",
            "how it was chosen": bench.choice,
            "updates": f"{config.num_steps} rounds of {config.batch_size} rollouts, seed {config.seed}",
            **self.facts,
        }
        bench.write(findings, config.num_steps, facts, None if self.draw is None else self.draw(params))


def alarm_note(logged: Sequence[dict]) -> str:
    """Say when the reward-hacking alarm fired."""
    fired = []
    for tag, words in ALARMS.items():
        steps = [line["step"] for line in logged if line.get(tag)]
        if steps:
            fired.append(f"{words} (first in what was logged at update {steps[0]})")
    return f"The reward-hacking alarm fired: {'; '.join(fired)}." if fired else "The reward-hacking alarm never fired."
