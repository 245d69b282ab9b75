"""What stage `speed_rl` measures and shows: the tuned policy beside the base at its best sampler."""

import functools
from typing import Any

import jax

from maskrl_jax.evaluate import curve
from maskrl_jax.evaluate.bench import Bench, tuning_notes
from maskrl_jax.evaluate.measure import Point, System
from maskrl_jax.evaluate.report import Findings
from maskrl_jax.evaluate.systems import Engine, clocked_program, clocked_system, fixed_program, fixed_system
from maskrl_jax.rl.policy import Policy
from maskrl_jax.sampling.maskgit import SamplerConfig
from maskrl_jax.tasks import checks, generators
from maskrl_jax.tasks.task import Context

_UNKNOWN = "The paper's algorithm and numbers are not public; this is our algorithm, and no parity is claimed."
NOTES = {
    "adaptive": (_UNKNOWN, "The number of calls is decided by the policy, so the speed reward has a true gradient."),
    "fixed": (_UNKNOWN, "No speed reward: quality is trained at a fixed number of calls."),
    "budget": (_UNKNOWN, "The likelihood of `budget` is a surrogate (random re-masking), not the behaviour's."),
}


class Gallery:
    """What the stage measures: the tuned policy beside the base at its best sampler."""

    def __init__(self, context: Context, wiring: Any, engine: Engine, sampler: SamplerConfig, base_params: Any):
        self.context, self.config, self.wiring, self.engine = context, context.config, wiring, engine
        self.sampler, self.base_params = sampler, base_params
        system = fixed_system(engine, fixed_program(engine), base_params, sampler, "base", "base")
        self.base = generators.kept(system, context.parents, str(sampler))
        self.clocked = clocked_program(engine, wiring.sampler, wiring.decide)

    @functools.cached_property
    def bench(self) -> Bench:
        """Made when first needed: it reads the held-out pictures."""
        return generators.bench_of(self.context)

    def tuned(self, params: Any) -> System:
        """The policy as a system; its setting is the speed dial, or the steps of a policy without a head."""
        return clocked_system(self.engine, self.clocked, params, "tuned", f"tuned ({self.wiring.policy.kind})")

    def untrained(self) -> list[Point]:
        """What the head's prior does for the base before any training: the part of a gain that is no learning."""
        if self.wiring.policy.kind != "adaptive":
            return []
        head = self.wiring.head.init(jax.random.key(0))
        params = {"model": self.base_params, "head": self.engine.parallel.replicate(head)}
        system = clocked_system(self.engine, self.clocked, params, "untrained", "untrained head on the base")
        system = generators.kept(system, self.context.parents, head, str(self.wiring.policy))
        return self.bench.measure(system, self.settings())

    def settings(self) -> tuple[float, ...]:
        """Settings of the tuned curve."""
        s, policy = self.bench.settings, self.wiring.policy
        if policy.kind == "adaptive":
            return s.dials
        trained = (policy.target_calls,) if policy.kind == "fixed" else policy.step_set
        if policy.timesteps == "countdown":  # of the trained number of calls alone
            return trained
        fitting = {t for t in s.steps if policy.ticks % t == 0 and t <= policy.max_calls}
        return tuple(sorted(fitting | set(trained)))

    def evaluate(self, state: Any, step: int) -> tuple[dict, dict]:
        """A glance at the average and at the raw parameters."""
        setting = self.wiring.policy.usual_setting
        values, picture = self.bench.glance(self.tuned(state.ema), setting)
        raw, _ = self.bench.glance(self.tuned(state.params), setting)
        return values | {f"raw/{name}": value for name, value in raw.items()}, {"samples/grid": picture}

    def _biases(self) -> tuple[str, ...]:
        """Name what of the settings gives the policy a biased gradient (specs/speed_rl.md sections 3 and 5.2)."""
        policy, tokens, found = self.wiring.policy, self.wiring.speed.tokens, []
        if policy.kind == "budget":
            return ()
        if tokens.likelihood == "kept":
            found.append("Likelihood `kept` is biased to lower entropy: a negative control.")
        strides = policy.kind == "fixed" or policy.action == "stride"
        if tokens.likelihood == "hard" and strides and policy.noise > 0:
            found.append("Likelihood `hard` is biased where noise decides what is committed; `transition` is not.")
        if tokens.distribution == "cond" and policy.guidance != 1:
            found.append("Scoring the conditional branch of guided samples (`cond`) is biased.")
        return tuple(found)

    def _clock_note(self) -> str:
        """Say where guidance costs one side alone a second forward."""
        forwards = [2 if sampler.guidance != 1 else 1 for sampler in (self.sampler, self.wiring.policy)]
        if forwards == [2, 1]:
            return "A call of the base takes two forwards (guidance), one of the policy a single one: a part of this."
        return "A call of the policy takes two forwards (guidance), one of the base one." * (forwards == [1, 2])

    def report(self, params: Any) -> None:
        """Curves of base and tuned, T*, timing, figures, report.md."""
        bench, config, policy = self.bench, self.config, self.wiring.policy
        tuned = self.tuned(self.engine.parallel.replicate(params))
        base_points = bench.measure(self.base, bench.settings.steps)
        tuned_points = bench.measure(tuned, self.settings())
        found = curve.first_equal(tuned_points, base_points[-1:], bench.criteria())
        timings = []
        if bench.settings.timing_repeats:
            setting = curve.of_the_verdict(found).setting
            sizes = (self.engine.parallel.num_devices, bench.settings.batch_size)
            timings = bench.time((self.base, bench.settings.reference), (tuned, setting), sizes)
        findings = Findings(
            title=f"Speed-RL-like tuning on {config.data.name}: {policy.kind}",
            config=config.name,
            points=[*base_points, *tuned_points, *self.untrained()],
            reference=base_points[-1:],
            criteria=bench.criteria(),
            tuned="tuned",
            goal=bench.settings.goal,
            trained_on=self.wiring.base.trained_on(),
            held_out=(
                *bench.untrained(self.wiring.base.rewards),
                "the prompts (the policy never trains on them; the base has seen their pictures)",
            ),
            notes=NOTES[policy.kind]
            + self._biases()
            + checks.timesteps_notes(policy.timesteps, self.sampler.timesteps)
            + tuning_notes(self.context.parents["maskgit"].workdir, bench.settings.reference),
            timings=timings,
            clock_note=self._clock_note(),
        )
        facts = {
            "base sampler": f"{self.sampler.mode}, {_settings(self.sampler.gumbel, self.sampler)}, "
            f"{self.sampler.schedule}",
            "how it was chosen": bench.choice,
            "policy sampler": f"{_deciding(policy)}, {_settings(policy.noise, policy)}",
            "updates": f"{config.num_steps} of {config.batch_size} rollouts, seed {config.seed}",
        }
        bench.write(findings, config.num_steps, facts)


def _settings(noise: float, sampler: Any) -> str:
    return f"Gumbel {noise:g}, guidance {sampler.guidance:g}, temperature {sampler.temperature:g}"


def _deciding(policy: Policy) -> str:
    """Who decides what a call commits."""
    if policy.kind != "adaptive":
        return f"{policy.kind}, strides given"
    if policy.action == "stride":
        return "strides of the head"
    return f"most {policy.order} first and whatever is surer than the head's kappa (starting at {policy.kappa:g})"
