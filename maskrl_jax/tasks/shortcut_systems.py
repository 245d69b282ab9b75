"""What stage `shortcut` samples with: the base, its shortcut and what is compared with it."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from maskrl_jax.data.dataset import conditioning_of
from maskrl_jax.distill.feature_shortcut import Buffer, open_loop
from maskrl_jax.errors import UserError
from maskrl_jax.evaluate import latency
from maskrl_jax.evaluate.bench import Bench, read_sampler
from maskrl_jax.evaluate.measure import System
from maskrl_jax.evaluate.systems import (
    Costs,
    Engine,
    clocked_program,
    clocked_system,
    fixed_program,
    fixed_system,
    shortcut_program,
    shortcut_system,
)
from maskrl_jax.keys import EVALUATE, sample_keys
from maskrl_jax.sampling import refresh
from maskrl_jax.sampling.maskgit import SamplerConfig
from maskrl_jax.sampling.refresh import Refresh
from maskrl_jax.sampling.shortcut import Parts, most_controls
from maskrl_jax.tasks import generators, speed_rl
from maskrl_jax.tasks.task import Context

LABELS = {
    "shortcut": "base with its shortcut",
    "frozen": "frozen feature",
    "linear": "linear extrapolation",
    "calibrated": "shortcut, calibrated steps",
    "adaptive": "shortcut, adaptive refresh",
    "tuned": "tuned network without shortcut",
    "policy": "tuned policy with its head",
}
ON_POLICY = {"shortcut": "tuned network with its shortcut"}
BESIDE = ("frozen", "linear", "calibrated", "adaptive")
OTHER_PROGRAMS = ("frozen", "linear")  # kinds whose step is another; the others differ in their full steps alone
BISECTIONS = 10  # of the drift at which an adaptive refresh runs the full model


@dataclasses.dataclass(frozen=True)
class Curve:
    """The points of a shortcut.

    num_steps: N. budgets: numbers of full steps B. beside: what is measured next to the shortcut, of `BESIDE`.
    calibration: samples, of training prompts, that calibrated sets of steps and thresholds are found on.
    longest: most shortcut steps in a row of an adaptive refresh. Such a refresh decides for all rows of a device's
      batch at once: its samples depend on those beside them, and on the number of devices.
    timing_runs: runs of each sampling loop that its time is the median of; 0: nothing is timed, and a shortcut step
      counts as its share of a full one's FLOPs.

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
        if min(self.calibration, self.longest) < 1 or self.timing_runs < 0:
            raise UserError("curve.calibration and curve.longest must be at least 1, curve.timing_runs at least 0")

    @property
    def usual(self) -> int:
        """The budget in the middle."""
        return self.budgets[len(self.budgets) // 2]


def program_of(kind: str) -> str:
    """The kind whose program it runs: kinds that differ in their full steps alone share one."""
    return kind if kind in OTHER_PROGRAMS else "shortcut"


@dataclasses.dataclass(frozen=True)
class TunedPolicy:
    """A Speed-RL policy: its clocked program with or without pictures, its parameters, the settings to measure."""

    program: Callable[[bool], Callable]
    params: Any
    settings: tuple[float, ...]


class ShortcutSystems:
    """Systems of a base and its shortcut, and how a feature drifts in them."""

    def __init__(self, context: Context, wiring: Any, engine: Engine, network: Any):
        """`network` are the parameters that the shortcut runs on: the base's own, or those of a policy tuned on it."""
        self.context, self.wiring, self.engine = context, wiring, engine
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
        self.labels = LABELS | ON_POLICY if self.tuned else LABELS
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
        """Compiled sampling of a kind."""
        return self._program(program_of(kind), pictures)

    @functools.cache  # noqa: B019 - as many entries as kinds, for the life of the systems
    def _program(self, kind, pictures):
        extrapolate = kind == "linear"
        return shortcut_program(self.engine, self.parts_of(kind), self.most, extrapolate=extrapolate, pictures=pictures)

    def system(self, params: Any, kind: str, refresh_of: Callable[[float], Refresh], costs: Costs) -> System:
        """A kind as a system; its setting is the number of full steps."""
        both = {"base": self.network, "shortcut": params}
        label = self.labels[kind]
        return shortcut_system(self.engine, self.program(kind), both, self.plan, refresh_of, costs, kind, label)

    @functools.cached_property
    def policy(self) -> TunedPolicy:
        """The policy that the shortcut stands on, where there is one."""
        trained, data = self.context.parents["speed_rl"], self.context.config.data
        wiring = speed_rl.Wiring(trained.config, conditioning_of(data))
        headed = wiring.policy.kind == "adaptive"
        return TunedPolicy(
            program=lambda pictures: clocked_program(self.engine, wiring.sampler, wiring.decide, pictures),
            params=self.engine.parallel.replicate(trained.params),
            settings=tuple(trained.config.evaluation.dials) if headed else (wiring.policy.usual_setting,),
        )

    def policy_system(self) -> System:
        """The policy with its head as a system; its setting is the speed dial."""
        policy = self.policy
        return clocked_system(self.engine, policy.program(True), policy.params, "policy", LABELS["policy"])

    def evenly(self, budget: float) -> Refresh:
        """The official set of full steps."""
        return self.scheduled(refresh.even_steps(self.curve.num_steps, int(budget)))

    def scheduled(self, steps: Sequence[int]) -> Refresh:
        """Full at these steps alone."""
        return refresh.scheduled(steps, len(self.plan.masked_after))

    def refreshes(self, kind: str, params: Any, error_AK: np.ndarray) -> Callable[[float], Refresh]:
        """When a kind runs the full model, by its setting."""
        if kind == "calibrated":
            # As revealed: modes with a threshold reveal more than the plan's counts.
            steps = np.arange(self.curve.num_steps)[:, None, None]
            counts = (self.calibration.commit_step == steps).sum(-1).mean(-1)
            return lambda budget: self.scheduled(refresh.calibrated_steps(error_AK, counts, int(budget)))
        if kind == "adaptive":
            return functools.cache(lambda budget: self._adaptive(params, budget))
        return self.evenly

    def _adaptive(self, params, budget):
        """The least threshold of drift whose rollouts take `budget` full steps or fewer in the mean, training prompts.

        A batch takes a whole number of them, hence the mean over several.
        """
        size, whole = self.bench.settings.batch_size, len(self.plan.masked_after)
        starts = range(0, max(self.curve.calibration, size), size)
        conds = self.calibration_prompts(len(starts) * size)

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

    def calibration_prompts(self, count: int) -> np.ndarray:
        """Encoded training prompts, so many."""
        data = self.bench.dataset
        return data.encode(list(data.prompts(count, self.bench.settings.seed + 1, held_out=False)))

    # Drift

    @functools.cached_property
    def calibration(self) -> Buffer:
        """Rollouts of the base on training prompts, at the steps of the curve."""
        devices = self.engine.parallel.num_devices
        count = -(-self.curve.calibration // devices) * devices
        rows = self.engine.parallel.rows(count)
        cond = self.calibration_prompts(count)

        def program(base, frozen, batch, axis):
            keys_B = sample_keys(0, EVALUATE, 0, batch["index"])
            return self.wiring.teach(base, frozen, keys_B, batch["cond"])

        made = self.engine.parallel.map(program)(
            self.network,
            {"plan": self.plan, "tokenizer": self.engine.tokenizer},
            {"cond": cond[rows], "index": np.arange(count, dtype=np.int32)[rows]},
        )
        return Buffer(**self.engine.parallel.gather(made))

    def drift(self, params: Any, frozen: bool = False, longest: int = 0) -> dict[str, np.ndarray]:
        """Mean errors [N, N] (or [N, longest + 1]) at (full step, steps since): see `open_loop`."""
        errors = self._drift_program(frozen, longest)
        found = self.engine.parallel.whole(errors(self.network, params, self.engine.tokenizer, self.calibration))
        return {name: value[: self.curve.num_steps, : self.curve.num_steps] for name, value in found.items()}

    @functools.cache  # noqa: B019 - compiled once, for the life of the systems
    def _drift_program(self, frozen, longest):
        def errors(network, params, tokenizer, buffer):
            cond, null = self.engine.conditions({"tokenizer": tokenizer}, buffer.cond)
            student, buffer = self.wiring.student(network, null), buffer.replace(cond=cond)
            student = dataclasses.replace(student, most=self.most)
            return open_loop(student, params, buffer, jnp.asarray(self.plan.guidance), frozen, longest)

        return jax.jit(errors)
