"""What stage `shortcut` measures and shows: the base at fewer steps and the base with its shortcut, on one time axis."""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from maskrl_jax.distill.feature_shortcut import Buffer, open_loop
from maskrl_jax.errors import UserError
from maskrl_jax.evaluate import curve, latency, shortcut_figures, tables
from maskrl_jax.evaluate.bench import CHOICE, Bench, read_sampler, tuning_notes
from maskrl_jax.evaluate.illustrate import Illustration
from maskrl_jax.evaluate.measure import System
from maskrl_jax.evaluate.report import Findings
from maskrl_jax.evaluate.systems import Engine, fixed_program, fixed_system, shortcut_program, shortcut_system
from maskrl_jax.evaluate.timing import Spread
from maskrl_jax.keys import EVALUATE, sample_keys
from maskrl_jax.sampling import maskgit, refresh
from maskrl_jax.sampling.maskgit import SamplerConfig, make_plan
from maskrl_jax.sampling.refresh import Refresh
from maskrl_jax.sampling.shortcut import Parts, most_controls
from maskrl_jax.tasks import generators
from maskrl_jax.tasks.task import Context

LABELS = {
    "shortcut": "base with its shortcut",
    "frozen": "frozen feature",
    "linear": "linear extrapolation",
    "calibrated": "shortcut, calibrated steps",
    "adaptive": "shortcut, adaptive refresh",
    "tuned": "tuned network without shortcut",
}
BESIDE = ("frozen", "linear", "calibrated", "adaptive")
CAPTIONS = {
    "quality_vs_time": "Quality against the measured time of the sampling loop (no decoding), one image of a batch.",
    "drift": "How far a feature is from the full model's: one step after a full one, and by steps since then.",
    "budget": "Which steps run the full model, and what the steps of a setting cost an image.",
}
NOTES = (
    "Published numbers are of MaskGIT on ImageNet and of Lumina-DiMOO; no parity is claimed.",
    "Calls are in units of one step of the base: a shortcut step counts as the share of its time that it takes here.",
)
COST = 0.0  # in the place of a setting: runs that tell what a step costs
BISECTIONS = 10  # of the drift at which an adaptive refresh runs the full model


@dataclasses.dataclass(frozen=True)
class Curve:
    """The points of a shortcut.

    num_steps: N. budgets: numbers of full steps B. beside: what is measured next to the shortcut, of `BESIDE`.
    calibration: samples, of training prompts, that calibrated sets of steps and thresholds are found on.
    longest: most shortcut steps in a row of an adaptive refresh.
    """

    num_steps: int = 24
    budgets: tuple[int, ...] = (8, 12)
    beside: tuple[str, ...] = ("frozen",)
    calibration: int = 32
    longest: int = 6

    def __post_init__(self):
        for name in ("budgets", "beside"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not self.budgets or list(self.budgets) != sorted(set(self.budgets)):
            raise UserError(f"curve.budgets {self.budgets} must rise and hold at least one number of full steps")
        for budget in self.budgets:
            refresh.even_steps(self.num_steps, budget)  # ValueError for one beyond num_steps
        unknown = sorted(set(self.beside) - set(BESIDE))
        if unknown:
            raise UserError(f"curve.beside {unknown} is not among {', '.join(BESIDE)}")
        if self.calibration < 1 or self.longest < 1:
            raise UserError("curve.calibration and curve.longest must be at least 1")

    @property
    def usual(self) -> int:
        """The budget in the middle."""
        return self.budgets[len(self.budgets) // 2]


class ShortcutGallery:
    """Systems of a base and its shortcut, their times, and the report."""

    def __init__(self, context: Context, wiring: Any, engine: Engine, network: Any):
        """`network` are the parameters that the shortcut runs on: the base's own, or those of a policy tuned on it."""
        self.context, self.config, self.wiring, self.engine = context, context.config, wiring, engine
        self.curve, self.network = Curve(**context.config.curve), network
        self.plan = wiring.plan(self.curve.num_steps)
        self.most = most_controls(self.plan, engine.num_tokens)
        base, program = context.parents["maskgit"], fixed_program(engine)
        self.sampler = read_sampler(base.workdir, SamplerConfig(**base.config.sampler))
        self.tuned = "speed_rl" in context.parents
        self.base_params = engine.parallel.replicate(base.params) if self.tuned else network
        system = fixed_system(engine, program, self.base_params, self.sampler, "base", "base")
        self.base = generators.kept(system, context.parents, str(self.sampler))
        # The network without its shortcut.
        self.plain = fixed_system(engine, program, network, wiring.sampler, "tuned", LABELS["tuned"])

    @functools.cached_property
    def bench(self) -> Bench:
        """Made when first needed: it reads the held-out pictures."""
        return generators.bench_of(self.context)

    # Systems

    def parts_of(self, kind: str) -> Callable[[Any], Parts]:
        """Parts of a kind's sampling, of parameters {"base", "shortcut"}."""

        def parts(params):
            own = self.wiring.parts(params["shortcut"], params["base"])
            return dataclasses.replace(own, advance=lambda f, *_: f) if kind == "frozen" else own

        return parts

    def program(self, kind: str, pictures: bool = True) -> Callable:
        """Compiled sampling of a kind; those that differ in their full steps alone share it."""
        return self._program(kind if kind in ("frozen", "linear") else "shortcut", pictures)

    @functools.cache  # noqa: B019 - as many entries as kinds, for the life of the gallery
    def _program(self, kind, pictures):
        extrapolate = kind == "linear"
        return shortcut_program(self.engine, self.parts_of(kind), self.most, extrapolate=extrapolate, pictures=pictures)

    def system(self, params: Any, kind: str, refresh_of: Callable[[float], Refresh], step_cost: float) -> System:
        """A kind as a system; its setting is the number of full steps."""
        both = {"base": self.network, "shortcut": params}
        return shortcut_system(
            self.engine, self.program(kind), both, self.plan, refresh_of, step_cost, kind, LABELS[kind]
        )

    def evenly(self, budget: float) -> Refresh:
        """The official set of full steps."""
        return self._scheduled(refresh.even_steps(self.curve.num_steps, int(budget)))

    def _scheduled(self, steps):
        return refresh.scheduled(steps, len(self.plan.masked_after))

    def refreshes(self, kind: str, params: Any, error_AK: np.ndarray) -> Callable[[float], Refresh]:
        """When a kind runs the full model, by its setting."""
        if kind == "calibrated":
            left = np.concatenate([[self.engine.num_tokens], self.plan.masked_after])
            counts = (left[:-1] - left[1:])[: self.curve.num_steps]
            return lambda budget: self._scheduled(refresh.calibrated_steps(error_AK, counts, int(budget)))
        if kind == "adaptive":
            return functools.cache(lambda budget: self._adaptive(params, budget))
        return self.evenly

    def _adaptive(self, params, budget):
        """The threshold of drift whose rollouts take about `budget` full steps, on training prompts."""
        conds = self._calibration_prompts(self.bench.settings.batch_size)
        low, high = 1e-4, 1e2
        for _ in range(BISECTIONS):
            middle = math.sqrt(low * high)
            asks = refresh.adaptive(middle, self.curve.longest, self.curve.num_steps, len(self.plan.masked_after))
            made = self.system(params, "adaptive", lambda _, asks=asks: asks, 0.0).generate(
                budget, conds, np.arange(len(conds), dtype=np.int32), self.bench.settings.seed + 1
            )
            low, high = (middle, high) if made.calls.mean() > budget else (low, middle)
        return refresh.adaptive(high, self.curve.longest, self.curve.num_steps, len(self.plan.masked_after))

    def _calibration_prompts(self, count):
        data = self.bench.dataset
        return data.encode(list(data.prompts(count, self.bench.settings.seed + 1, held_out=False)))

    # Drift

    @functools.cached_property
    def calibration(self) -> Buffer:
        """Rollouts of the base on training prompts, at the steps of the curve."""
        devices = self.engine.parallel.num_devices
        count = -(-self.curve.calibration // devices) * devices
        rows = self.engine.parallel.rows(count)
        cond = self._calibration_prompts(count)

        def program(base, frozen, batch, axis):
            keys_B = sample_keys(0, EVALUATE, 0, batch["index"])
            return self.wiring.teach(base, frozen["plan"], keys_B, batch["cond"])

        made = self.engine.parallel.map(program)(
            self.network,
            {"plan": self.plan},
            {"cond": cond[rows], "index": np.arange(count, dtype=np.int32)[rows]},
        )
        return Buffer(**self.engine.parallel.gather(made))

    def drift(self, params: Any, frozen: bool = False) -> dict[str, np.ndarray]:
        """Mean errors [N, N] at (full step, steps since): see `open_loop`."""
        buffer, plan = self.calibration, self.plan
        student = dataclasses.replace(self.wiring.student(self.network), most=self.most)

        @jax.jit
        def errors(params, buffer):
            return open_loop(student, params, buffer, jnp.asarray(plan.guidance), frozen)

        found = jax.device_get(errors(params, jax.tree.map(jnp.asarray, buffer)))
        steps = self.curve.num_steps
        return {name: value[:steps, :steps] for name, value in found.items()}

    # Time

    def times(self, params: Any, settings: dict[str, Callable[[float], Refresh]]) -> dict[tuple[str, float], Spread]:
        """Seconds of one batch's sampling loop, without decoding: the base by steps, every kind by budget.

        Under `COST`: all steps full, and of each kind the first alone, which is what its steps cost.
        """
        engine, size = self.engine, self.bench.settings.batch_size
        cond = self._calibration_prompts(size)
        rows = engine.parallel.rows(size)
        both = {"base": self.network, "shortcut": params}
        given = np.full((size, engine.num_tokens), engine.mask_id, np.int32)

        def plain(p, frozen, batch, axis):
            keys_B = sample_keys(0, EVALUATE, batch["seed"][0], batch["index"])
            plan = frozen["plan"]
            made = maskgit.decode(
                engine.logits(p), keys_B, batch["cond"], engine.null, plan, batch["given"], engine.mask_id
            )
            return made.ids

        plain_program = engine.parallel.map(plain)

        def run(program, own, frozen):
            def once(repeat):
                index = np.arange(size, dtype=np.int32) + 10_000 * (repeat + 1)
                batch = {"cond": cond, "index": index, "seed": np.zeros(size, np.int32), "given": given}
                return program(own, frozen, {name: x[rows] for name, x in batch.items()})

            return once

        def plan_of(sampler, steps, mode=None):
            longest = len(self.plan.masked_after)
            mode = sampler.mode if mode is None else mode
            return make_plan(
                dataclasses.replace(sampler, num_steps=steps, max_steps=max(steps, longest), mode=mode),
                engine.num_tokens,
            )

        # Of a mode that takes every step: others may stop early, and what is asked is the time of a step.
        whole = plan_of(self.wiring.sampler, self.curve.num_steps, "confidence")
        runs = {("full", COST): run(plain_program, self.network, {"plan": whole})}
        for steps in self.bench.settings.steps:
            runs["base", steps] = run(plain_program, self.base_params, {"plan": plan_of(self.sampler, steps)})
            if self.tuned:
                plan = plan_of(self.wiring.sampler, steps)
                runs["tuned", steps] = run(plain_program, self.network, {"plan": plan})
        for kind, refresh_of in settings.items():
            program = self.program(kind, pictures=False)
            once = {"plan": whole, "refresh": self._scheduled([0]), "step_cost": np.float32(0)}
            runs[kind, COST] = run(program, both, once)
            for budget in self.curve.budgets:
                frozen = {"plan": self.plan, "refresh": refresh_of(budget), "step_cost": np.float32(0)}
                runs[kind, budget] = run(program, both, frozen)
        found = latency.measure(runs)
        seconds = engine.parallel.of_first(np.array([dataclasses.astuple(spread) for spread in found.values()]))
        return {name: Spread(*map(float, row)) for name, row in zip(found, seconds, strict=True)}

    def full_seconds(self, seconds: dict[tuple[str, float], Spread]) -> float:
        """Time of a full step of a batch."""
        return seconds["full", COST].median / self.curve.num_steps

    def step_cost(self, seconds: dict[tuple[str, float], Spread], kind: str) -> float:
        """c: time of a kind's shortcut step over that of a full step (specs/shortcut.md section 10)."""
        full = self.full_seconds(seconds)
        return max((seconds[kind, COST].median - full) / max(self.curve.num_steps - 1, 1) / full, 0.0)

    # What the loop asks for

    def evaluate(self, state: Any, step: int) -> tuple[dict, dict]:
        """A glance at the shortcut at its middle budget; full steps alone count as calls."""
        system = self.system(state.ema, "shortcut", self.evenly, 0.0)
        values, picture = self.bench.glance(system, self.curve.usual)
        return values, {"samples/grid": picture}

    def report(self, params: Any) -> None:
        """Times, curves of base and shortcut, drift, report.md."""
        bench, config, wiring = self.bench, self.config, self.wiring
        params = self.engine.parallel.replicate(params)
        errors = {"shortcut": self.drift(params), "frozen feature": self.drift(params, frozen=True)}
        kinds = {
            kind: self.refreshes(kind, params, errors["shortcut"]["kl"]) for kind in ("shortcut", *self.curve.beside)
        }
        seconds = self.times(params, kinds)
        costs = {kind: self.step_cost(seconds, kind) for kind in kinds}
        systems = {kind: self.system(params, kind, asks, costs[kind]) for kind, asks in kinds.items()}
        # The base at no less time than each budget, rounded in its favour, besides its own curve.
        steps, cost = self.curve.num_steps, costs["shortcut"]
        equal = {math.ceil(b + (steps - b) * cost) for b in self.curve.budgets}
        base_points = bench.measure(self.base, sorted({*bench.settings.steps, *(n for n in equal if n < steps)}))
        points = [*base_points]
        if self.tuned:
            points += bench.measure(self.plain, bench.settings.steps)
        for system in systems.values():
            points += bench.measure(system, self.curve.budgets)
        own = [point for point in points if point.system == "shortcut"]
        found = curve.first_equal(own, base_points[-1:], bench.criteria())
        timings = []
        if bench.settings.timing_repeats:
            setting = curve.of_the_verdict(found).setting
            sizes = (self.engine.parallel.num_devices, bench.settings.batch_size)
            timings = bench.time((self.base, bench.settings.reference), (systems["shortcut"], setting), sizes)
        size, labels = bench.settings.batch_size, {"base": "base", **LABELS}
        latencies = [
            latency.Latency(system, labels[system], setting, size, spread)
            for (system, setting), spread in seconds.items()
            if setting != COST
        ]
        findings = Findings(
            title=f"Feature shortcut on {config.data.name}",
            config=config.name,
            points=points,
            reference=base_points[-1:],
            criteria=bench.criteria(),
            tuned="shortcut",
            goal=bench.settings.goal,
            trained_on=("features of the frozen base along its own rollouts",),
            held_out=("every score", "the prompts (never trained on here; the base has seen their pictures)"),
            notes=NOTES + tuning_notes(self.context.parents["maskgit"].workdir, bench.settings.reference),
            timings=timings,
            latencies=latencies,
        )
        full_ms = 1000 * self.full_seconds(seconds) / size
        pairs = wiring.batches * wiring.teacher.pairs * config.batch_size * config.num_steps
        facts = {
            "network calls": "steps of the base, its second branch of guidance not counted; a shortcut step counts as the "
            "share below",
            "sampler of the base": _words(self.sampler),
            "sampler with the shortcut": _words(wiring.sampler),
            "how it was chosen": CHOICE,
            "shortcut steps": "cost "
            + ", ".join(f"{c:.3f} ({LABELS[kind]})" for kind, c in costs.items())
            + f" of a full step ({full_ms:.3f} ms an image in batches of {size}; sampling loop alone, median of "
            f"{latency.REPEATS} runs after {latency.WARM_UP})",
            "training": f"{config.num_steps * config.batch_size} rollouts of the base "
            f"({'/'.join(map(str, wiring.teacher.num_steps))} steps), {config.num_steps * wiring.batches} updates, "
            f"{pairs / 1e3:.0f} thousand pairs, seed {config.seed}",
        }
        bench.write(
            findings,
            config.num_steps,
            facts,
            lambda out: self._draw(out, points, latencies, kinds, errors, full_ms, cost),
        )

    def _draw(self, out, points, latencies, kinds, errors, full_ms, cost):
        place = pathlib.Path(out, "figures")
        metrics = tables.headline_metrics(points)[:6]
        rows = {
            f"{LABELS[kind]}, {budget} full": asks(budget).full[: self.curve.num_steps].tolist()
            for kind, asks in kinds.items()
            if kind in ("shortcut", "calibrated")  # an adaptive refresh decides as it goes
            for budget in self.curve.budgets
        }
        drawn = {
            "quality_vs_time": shortcut_figures.quality_vs_time(
                place / "quality_vs_time.png", points, latencies, metrics
            ),
            "drift": shortcut_figures.drift(place / "drift.png", errors),
            "budget": shortcut_figures.budget(place / "budget.png", rows, full_ms, full_ms * cost),
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
