"""What stage `shortcut` reports: the base at fewer steps and the base with its shortcut, on one time axis."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from maskrl_jax.evaluate import curve, latency, shortcut_figures, tables
from maskrl_jax.evaluate.bench import tuning_notes
from maskrl_jax.evaluate.illustrate import Illustration
from maskrl_jax.evaluate.latency import Latency
from maskrl_jax.evaluate.report import Findings
from maskrl_jax.evaluate.systems import Costs, priced
from maskrl_jax.sampling.maskgit import SamplerConfig
from maskrl_jax.tasks.shortcut_systems import ShortcutSystems
from maskrl_jax.tasks.shortcut_times import ShortcutTimes

CAPTIONS = {
    "quality_vs_time": "Quality against the measured time of the sampling loop (no decoding), one image of a batch.",
    "drift": "How far a feature is from the full model's: one step after a full one, and by steps since then.",
    "budget": "Which steps run the full model, and what the steps of a setting cost an image.",
}
NOTES = (
    "Published numbers are of MaskGIT on ImageNet and of Lumina-DiMOO; no parity is claimed.",
    "Calls are in units of one step of the base: a shortcut step counts as the share of its time, or of its FLOPs where "
    "that was not measured, that it takes here.",
)
ADAPTIVE = "An adaptive refresh decides for a whole batch: its samples depend on those beside them."


class ShortcutGallery:
    """The glances and the report of a run."""

    def __init__(self, config: Any, systems: ShortcutSystems):
        self.config, self.systems = config, systems

    def evaluate(self, state: Any, step: int) -> tuple[dict, dict]:
        """A glance at the shortcut at its middle budget, full steps alone as calls; errors one step after a full one."""
        system = self.systems.system(state.ema, "shortcut", self.systems.evenly, Costs(1.0, 0.0))
        values, picture = self.systems.bench.glance(system, self.systems.curve.usual)
        for name, frozen in {"drift": False, "drift_frozen": True}.items():
            for measure, error_AK in self.systems.drift(state.ema, frozen, longest=1).items():
                after = range(1, self.systems.curve.num_steps)
                found = {f"{name}/{measure}@{step:02d}": float(error_AK[step - 1, 1]) for step in after}
                values |= {tag: value for tag, value in found.items() if np.isfinite(value)}  # what a sample reached
        return values, {"samples/grid": picture}

    def report(self, params: Any) -> None:
        """Times, curves of base and shortcut, drift, report.md."""
        systems, bench, config = self.systems, self.systems.bench, self.config
        times, params = ShortcutTimes(systems), systems.engine.parallel.replicate(params)
        errors = {"shortcut": systems.drift(params), "frozen feature": systems.drift(params, frozen=True)}
        names = ("shortcut", *systems.curve.beside)
        kinds = {kind: systems.refreshes(kind, params, errors["shortcut"]["kl"]) for kind in names}
        step_seconds, costs = times.costs(params, names)
        light = []
        for kind, asks in kinds.items():
            light += bench.measure(systems.system(params, kind, asks, costs[kind]), systems.curve.budgets)
        own = [point for point in light if point.system == "shortcut"]
        # The base at no less time than each point, rounded in its favour, besides its own curve.
        equal = {math.ceil(point.calls_mean - 1e-6) for point in light}
        steps = sorted({*bench.settings.steps, *(n for n in equal if n <= systems.curve.num_steps)})
        base_points = bench.measure(systems.base, steps)
        reference = [point for point in base_points if point.setting == bench.settings.reference]
        points = [*base_points]
        if systems.tuned:
            full = costs["tuned"].full
            points += bench.measure(priced(systems.plain, full), bench.settings.steps)
            points += bench.measure(priced(systems.policy_system(), full), systems.policy.settings)
        points += light
        latencies = times.loops(params, kinds, steps)
        found = curve.first_equal(own, reference, bench.criteria())
        timings = []
        if bench.settings.timing_repeats:
            setting = curve.of_the_verdict(found).setting
            sizes = (systems.engine.parallel.num_devices, bench.settings.batch_size)
            system = systems.system(params, "shortcut", systems.evenly, costs["shortcut"])
            timings = bench.time((systems.base, bench.settings.reference), (system, setting), sizes)
        findings = Findings(
            title=f"Feature shortcut on {config.data.name}",
            config=config.name,
            points=points,
            reference=reference,
            criteria=bench.criteria(),
            tuned="shortcut",
            goal=bench.settings.goal,
            trained_on=("features of the frozen base along its own rollouts",),
            held_out=("every score", "the prompts (never trained on here; the base has seen their pictures)"),
            notes=NOTES
            + (ADAPTIVE,) * ("adaptive" in names)
            + tuning_notes(systems.context.parents["maskgit"].workdir, bench.settings.reference),
            timings=timings,
            latencies=latencies,
            unlike=("tuned", "policy"),
        )
        step_ms = 1000 * step_seconds / bench.settings.batch_size
        bench.write(
            findings,
            config.num_steps,
            self._facts(costs, step_ms, times.flops(params)),
            lambda out: self._draw(out, points, latencies, kinds, errors, self._prices(costs, latencies)),
        )

    def _prices(self, costs: Mapping[str, Costs], latencies: Sequence[Latency]) -> tuple[float, float] | None:
        """Milliseconds of a full and of a shortcut step in the figure, or None where nothing was timed.

        As long as the loops of the table took, which were timed later than the costs.
        """
        base = ("base", self.systems.bench.settings.reference)
        loop = next((x for x in latencies if (x.system, x.setting) == base), None)
        if loop is None:
            return None
        step_ms = loop.milliseconds.median / self.systems.bench.settings.reference
        return step_ms * costs["shortcut"].full, step_ms * costs["shortcut"].light

    def _facts(self, costs: Mapping[str, Costs], step_ms: float, flops: tuple[float, float]) -> dict[str, str]:
        """Lines of the protocol: units, samplers, costs, length of training."""
        config, systems = self.config, self.systems
        wiring, size = systems.wiring, systems.bench.settings.batch_size
        rollouts, steps = config.num_steps * config.batch_size, np.mean(wiring.teacher.num_steps)
        pairs = wiring.batches * wiring.teacher.pairs * rollouts
        passes = rollouts * steps + pairs * (wiring.loss.chain - 1) * wiring.loss.student_tokens
        plain = f", one of the tuned network alone {costs['tuned'].full:.3f}" if systems.tuned else ""
        return {
            "network calls": "steps of the base, its second branch of guidance not counted; other steps count as the "
            "share of one that they take",
            "sampler of the base": _words(systems.sampler),
            "sampler with the shortcut": f"{_words(wiring.sampler)}; {systems.curve.num_steps} steps",
            "how it was chosen": self.systems.bench.choice,
            "a step's cost": ", ".join(
                f"{cost.light:.3f} ({systems.labels[kind]})" for kind, cost in costs.items() if kind != "tuned"
            )
            + " of a step of the base"
            + (
                f", which takes {step_ms:.3f} ms an image in batches of {size}; a full step in the shortcut's loop "
                f"{costs['shortcut'].full:.3f}{plain} (sampling loop alone, median of {systems.curve.timing_runs} runs "
                f"after {latency.WARM_UP}; no step is kept from one image to the next)"
                if systems.curve.timing_runs
                else " by FLOPs; loops were not timed"
            ),
            "FLOPs": f"{flops[0] / 1e6:.3g} million a full step of an image, {flops[1] / 1e6:.3g} million a shortcut step "
            f"({flops[1] / flops[0]:.3f}), as compiled, networks and head alone",
            "training": f"{rollouts} rollouts of the network ({'/'.join(map(str, wiring.teacher.num_steps))} steps), "
            f"{passes / 1e3:.0f} thousand passes of it, {config.num_steps * wiring.batches} updates, "
            f"{pairs / 1e3:.0f} thousand pairs, seed {config.seed}",
        }

    def _draw(self, out, points, latencies, kinds, errors, prices):
        place = epath.Path(out, "figures")
        metrics = tables.headline_metrics(points)[:6]
        rows = {
            f"{self.systems.labels[kind]}, {budget} full": asks(budget).full[: self.systems.curve.num_steps].tolist()
            for kind, asks in kinds.items()
            if kind in ("shortcut", "calibrated")  # an adaptive refresh decides as it goes
            for budget in self.systems.curve.budgets
        }
        drawn = {
            "quality_vs_time": shortcut_figures.quality_vs_time(
                place / "quality_vs_time.png", points, latencies, metrics
            ),
            "drift": shortcut_figures.drift(place / "drift.png", errors),
            "budget": shortcut_figures.budget(place / "budget.png", rows, *prices) if prices else None,
        }
        return [
            Illustration(f"figures/{name}.png", CAPTIONS[name], image)
            for name, image in drawn.items()
            if image is not None
        ]


def _words(sampler: SamplerConfig) -> str:
    return (
        f"{sampler.mode}, Gumbel {sampler.gumbel:g}, guidance {sampler.guidance:g}, temperature "
        f"{sampler.temperature:g}, {sampler.schedule}"
    )
