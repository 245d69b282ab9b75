"""What stage `shortcut` samples with: the base, its shortcut and what is compared with it, and their measured times."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from maskrl_jax.distill.feature_shortcut import Buffer, open_loop
from maskrl_jax.errors import UserError
from maskrl_jax.evaluate import latency
from maskrl_jax.evaluate.bench import Bench, read_sampler
from maskrl_jax.evaluate.latency import Latency
from maskrl_jax.evaluate.measure import System
from maskrl_jax.evaluate.systems import (
    Costs,
    Engine,
    fixed_program,
    fixed_system,
    shortcut_program,
    shortcut_system,
)
from maskrl_jax.evaluate.timing import Spread
from maskrl_jax.keys import EVALUATE, sample_keys
from maskrl_jax.sampling import refresh
from maskrl_jax.sampling.maskgit import SamplerConfig, make_plan
from maskrl_jax.sampling.refresh import Refresh
from maskrl_jax.sampling.shortcut import Controls, Parts, branches, most_controls
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
OTHER_PROGRAMS = ("frozen", "linear")  # kinds whose step is another; the others differ in their full steps alone
BISECTIONS = 10  # of the drift at which an adaptive refresh runs the full model


@dataclasses.dataclass(frozen=True)
class Curve:
    """The points of a shortcut.

    num_steps: N. budgets: numbers of full steps B. beside: what is measured next to the shortcut, of `BESIDE`.
    calibration: samples, of training prompts, that calibrated sets of steps and thresholds are found on.
    longest: most shortcut steps in a row of an adaptive refresh. It decides for all rows of a device's batch at once:
      its samples depend on those beside them, and on the number of devices.
    timing_runs: runs of each sampling loop that its time is the median of.

    Budgets are of the plan's N steps: where a mode with a threshold ends early, fewer of them are run.
    """

    num_steps: int = 24
    budgets: tuple[int, ...] = (8, 12)
    beside: tuple[str, ...] = ("frozen",)
    calibration: int = 32
    longest: int = 6
    timing_runs: int = latency.REPEATS

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
        fewest = -(-self.num_steps // (self.longest + 1)) if self.longest > 0 else 0
        if "adaptive" in self.beside and self.budgets[0] < fewest:
            raise UserError(
                f"curve.budgets {self.budgets} go below the {fewest} full steps that curve.longest={self.longest} asks "
                f"for in {self.num_steps} steps"
            )
        if min(self.calibration, self.longest, self.timing_runs) < 1:
            raise UserError("curve.calibration, curve.longest and curve.timing_runs must be at least 1")

    @property
    def usual(self) -> int:
        """The budget in the middle."""
        return self.budgets[len(self.budgets) // 2]


class ShortcutSystems:
    """Systems of a base and its shortcut, how a feature drifts in them, and what they cost."""

    def __init__(self, context: Context, wiring: Any, engine: Engine, network: Any):
        """`network` are the parameters that the shortcut runs on: the base's own, or those of a policy tuned on it."""
        self.context, self.config, self.wiring, self.engine = context, context.config, wiring, engine
        self.curve, self.network = Curve(**context.config.curve), network
        self.plan = wiring.plan(self.curve.num_steps)
        self.most = most_controls(self.plan, engine.num_tokens)
        base, program = context.parents["maskgit"], fixed_program(engine)
        sampler = read_sampler(base.workdir, SamplerConfig(**base.config.sampler))
        longest = max(sampler.max_steps, self.curve.num_steps)
        self.sampler = dataclasses.replace(sampler, max_steps=longest)
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

    def parts_of(self, kind: str) -> Callable[[Any], Parts]:
        """Parts of a kind's sampling, of parameters {"base", "shortcut"}."""

        def parts(params):
            own = self.wiring.parts(params["shortcut"], params["base"])
            return dataclasses.replace(own, advance=lambda f, *_: f) if kind == "frozen" else own

        return parts

    def program(self, kind: str, pictures: bool = True) -> Callable:
        """Compiled sampling of a kind; those that differ in their full steps alone share it."""
        return self._program(kind if kind in OTHER_PROGRAMS else "shortcut", pictures)

    @functools.cache  # noqa: B019 - as many entries as kinds, for the life of the systems
    def _program(self, kind, pictures):
        extrapolate = kind == "linear"
        return shortcut_program(self.engine, self.parts_of(kind), self.most, extrapolate=extrapolate, pictures=pictures)

    def system(self, params: Any, kind: str, refresh_of: Callable[[float], Refresh], costs: Costs) -> System:
        """A kind as a system; its setting is the number of full steps."""
        both = {"base": self.network, "shortcut": params}
        return shortcut_system(self.engine, self.program(kind), both, self.plan, refresh_of, costs, kind, LABELS[kind])

    def evenly(self, budget: float) -> Refresh:
        """The official set of full steps."""
        return self._scheduled(refresh.even_steps(self.curve.num_steps, int(budget)))

    def _scheduled(self, steps):
        return refresh.scheduled(steps, len(self.plan.masked_after))

    def refreshes(self, kind: str, params: Any, error_AK: np.ndarray) -> Callable[[float], Refresh]:
        """When a kind runs the full model, by its setting."""
        if kind == "calibrated":
            # As revealed: modes with a threshold reveal more than the plan's counts.
            steps = np.arange(self.curve.num_steps)[:, None, None]
            counts = (self.calibration.commit_step == steps).sum(-1).mean(-1)
            return lambda budget: self._scheduled(refresh.calibrated_steps(error_AK, counts, int(budget)))
        if kind == "adaptive":
            return functools.cache(lambda budget: self._adaptive(params, budget))
        return self.evenly

    def _adaptive(self, params, budget):
        """The least threshold of drift whose rollouts take `budget` full steps or fewer in the mean, training prompts.

        A batch takes a whole number of them, hence the mean over several.
        """
        size, whole = self.bench.settings.batch_size, len(self.plan.masked_after)
        starts = range(0, max(self.curve.calibration, size), size)
        conds = self._calibration_prompts(len(starts) * size)

        def full_steps(asks):
            system = self.system(params, "adaptive", lambda _: asks, Costs(1.0, 0.0))
            rows = [np.arange(start, start + size, dtype=np.int32) for start in starts]
            return np.mean([system.generate(budget, conds[r], r, self.bench.settings.seed + 1).calls for r in rows])

        low, high = 1e-4, 1e2
        for _ in range(BISECTIONS):
            middle = math.sqrt(low * high)
            asks = refresh.adaptive(middle, self.curve.longest, self.curve.num_steps, whole)
            low, high = (middle, high) if full_steps(asks) > budget else (low, middle)
        return refresh.adaptive(high, self.curve.longest, self.curve.num_steps, whole)

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

    def drift(self, params: Any, frozen: bool = False, longest: int = 0) -> dict[str, np.ndarray]:
        """Mean errors [N, N] (or [N, longest + 1]) at (full step, steps since): see `open_loop`."""
        errors = self._drift_program(frozen, longest)
        found = self.engine.parallel.whole(errors(self.network, params, self.calibration))
        return {name: value[: self.curve.num_steps, : self.curve.num_steps] for name, value in found.items()}

    @functools.cache  # noqa: B019 - compiled once, for the life of the systems
    def _drift_program(self, frozen, longest):
        def errors(network, params, buffer):
            student = dataclasses.replace(self.wiring.student(network), most=self.most)
            return open_loop(student, params, buffer, jnp.asarray(self.plan.guidance), frozen, longest)

        return jax.jit(errors)

    # Time

    @functools.cached_property
    def _plain_program(self):
        return fixed_program(self.engine, pictures=False)

    def _run(self, program, own, frozen):
        """A closure that makes one batch of tokens, with other keys every time."""
        size, rows = self.bench.settings.batch_size, self.engine.parallel.rows(self.bench.settings.batch_size)
        cond = self._calibration_prompts(size)
        given = np.full((size, self.engine.num_tokens), self.engine.mask_id, np.int32)

        def once(repeat):
            index = np.arange(size, dtype=np.int32) + 10_000 * (repeat + 1)
            batch = {"cond": cond, "index": index, "seed": np.zeros(size, np.int32), "given": given}
            return program(own, frozen, {name: x[rows] for name, x in batch.items()})

        return once

    def _plain_run(self, own, sampler, steps):
        longest = max(steps, len(self.plan.masked_after))
        chosen = dataclasses.replace(sampler, num_steps=steps, max_steps=longest)
        return self._run(self._plain_program, own, {"plan": make_plan(chosen, self.engine.num_tokens)})

    def _light_run(self, params, kind, plan, asks):
        both = {"base": self.network, "shortcut": params}
        return self._run(self.program(kind, pictures=False), both, {"plan": plan, "refresh": asks})

    def _measured(self, runs):
        """Times of runs, those of process 0 on all of them: what follows from them must not differ."""
        found = latency.measure(runs, repeats=self.curve.timing_runs)
        seconds = self.engine.parallel.of_first(np.array([dataclasses.astuple(spread) for spread in found.values()]))
        return {name: Spread(*map(float, row)) for name, row in zip(found, seconds, strict=True)}

    def costs(self, params: Any, kinds: Sequence[str]) -> tuple[float, dict[str, Costs]]:
        """Seconds of one step of the base on a batch, and what the steps of each kind cost in such steps.

        specs/shortcut.md section 10: of loops of N steps of a kind's program, all of them full or the first alone, and
        of the plain base, in a mode that takes every step; kinds that share a program share its costs. Full steps
        alone has `tuned`, where the network is not the base.
        """
        steps = self.curve.num_steps
        own, base = (dataclasses.replace(s, mode="confidence") for s in (self.wiring.sampler, self.sampler))
        whole = make_plan(
            dataclasses.replace(own, num_steps=steps, max_steps=len(self.plan.masked_after)), self.engine.num_tokens
        )
        programs = {kind: kind if kind in OTHER_PROGRAMS else "shortcut" for kind in kinds}
        runs = {"base": self._plain_run(self.base_params, base, steps)}
        if self.tuned:
            runs["tuned"] = self._plain_run(self.network, own, steps)
        for program in set(programs.values()):
            runs[program, "all"] = self._light_run(params, program, whole, self._scheduled(range(steps)))
            runs[program, "first"] = self._light_run(params, program, whole, self._scheduled([0]))
        seconds = {name: spread.median for name, spread in self._measured(runs).items()}
        step = seconds["base"] / steps

        def cost(program):
            full = seconds[program, "all"] / steps
            light = max(seconds[program, "first"] - full, 0.0) / max(steps - 1, 1)
            return Costs(full / step, light / step)

        found = {kind: cost(name) for kind, name in programs.items()}
        return step, found | ({"tuned": Costs(seconds["tuned"] / steps / step, 0.0)} if self.tuned else {})

    def flops(self, params: Any) -> tuple[float, float]:
        """FLOPs of a full and of a shortcut step, an image, as compiled: network and head, both branches, no draw."""
        rows = branches(self.plan)
        features = jax.ShapeDtypeStruct((rows, *self.calibration.features.shape[3:]), jnp.float32)
        cond = jax.ShapeDtypeStruct((rows, *self.calibration.cond.shape[1:]), jnp.int32)
        ids, time = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((rows, self.engine.num_tokens), (rows,)))
        told = jax.ShapeDtypeStruct((rows, self.most), jnp.int32)
        controls = Controls(told, told, jax.ShapeDtypeStruct(told.shape, bool))

        def full(own, ids, time, cond):
            parts = self.wiring.parts(None, own["base"])
            return parts.head(parts.features(ids, time, cond))

        def light(own, features, controls, share):
            parts = self.wiring.parts(own["shortcut"], own["base"])
            return parts.head(parts.advance(features, controls, share))

        # Not placed: of the whole program, however arrays are split.
        own = {"base": self.network, "shortcut": params}
        own = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), own)
        compiled = (
            jax.jit(full).lower(own, ids, time, cond).compile(),
            jax.jit(light).lower(own, features, controls, jax.ShapeDtypeStruct((rows,), jnp.float32)).compile(),
        )
        return tuple((one.cost_analysis() or {}).get("flops", math.nan) for one in compiled)

    def times(
        self, params: Any, kinds: Mapping[str, Callable[[float], Refresh]], steps: Sequence[int]
    ) -> list[Latency]:
        """Times of one batch's sampling loop, without decoding: the base by steps, every kind by budget."""
        runs = {("base", n): self._plain_run(self.base_params, self.sampler, n) for n in steps}
        if self.tuned:
            for n in self.bench.settings.steps:
                runs["tuned", n] = self._plain_run(self.network, self.wiring.sampler, n)
        for kind, asks in kinds.items():
            for budget in self.curve.budgets:
                runs[kind, budget] = self._light_run(params, kind, self.plan, asks(budget))
        size, labels = self.bench.settings.batch_size, {"base": "base", **LABELS}
        return [
            Latency(system, labels[system], setting, size, spread)
            for (system, setting), spread in self._measured(runs).items()
        ]
