"""What the systems of stage `shortcut` cost: measured times of their sampling loops, and compiled FLOPs of a step."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from maskrl_jax.evaluate import latency
from maskrl_jax.evaluate.latency import Latency
from maskrl_jax.evaluate.systems import Costs, fixed_program
from maskrl_jax.evaluate.timing import Spread
from maskrl_jax.sampling.maskgit import make_plan
from maskrl_jax.sampling.refresh import Refresh
from maskrl_jax.sampling.shortcut import Controls, branches
from maskrl_jax.tasks.shortcut_systems import ShortcutSystems, program_of


class ShortcutTimes:
    """A stopwatch for systems on batches of the bench's size, without decoding."""

    def __init__(self, systems: ShortcutSystems):
        self.systems = systems

    @functools.cached_property
    def _plain_program(self):
        return fixed_program(self.systems.engine, pictures=False)

    def _run(self, program, own, frozen, setting=None):
        """A closure that makes one batch of tokens, with other keys every time."""
        engine, size = self.systems.engine, self.systems.bench.settings.batch_size
        rows, cond = engine.parallel.rows(size), self.systems.calibration_prompts(size)
        frozen = frozen | {"tokenizer": engine.tokenizer}  # of which no more is read than a text encoder
        fixed = {"cond": cond, "seed": np.zeros(size, np.int32)}
        if setting is None:
            fixed["given"] = np.full((size, engine.num_tokens), engine.mask_id, np.int32)
        else:
            fixed["setting"] = np.full(size, setting, np.float32)

        def once(repeat):
            batch = fixed | {"index": np.arange(size, dtype=np.int32) + 10_000 * (repeat + 1)}
            return program(own, frozen, {name: x[rows] for name, x in batch.items()})

        return once

    def _plain_run(self, own, sampler, steps):
        longest = max(steps, len(self.systems.plan.masked_after))
        chosen = dataclasses.replace(sampler, num_steps=steps, max_steps=longest)
        return self._run(self._plain_program, own, {"plan": make_plan(chosen, self.systems.engine.num_tokens)})

    def _light_run(self, params, kind, plan, asks):
        both = {"base": self.systems.network, "shortcut": params}
        return self._run(self.systems.program(kind, pictures=False), both, {"plan": plan, "refresh": asks})

    def _measured(self, runs):
        """Times of runs, those of process 0 on all of them: what follows from them must not differ."""
        found = latency.measure(runs, repeats=self.systems.curve.timing_runs)
        seconds = self.systems.engine.parallel.of_first(
            np.array([dataclasses.astuple(spread) for spread in found.values()])
        )
        return {name: Spread(*map(float, row)) for name, row in zip(found, seconds, strict=True)}

    def costs(self, params: Any, kinds: Sequence[str]) -> tuple[float, dict[str, Costs]]:
        """Seconds of one step of the base on a batch, and what the steps of each kind cost in such steps.

        specs/shortcut.md section 10: of loops of N steps of a kind's program, all of them full or the first alone, and
        of the plain base, in a mode that takes every step; kinds that share a program share its costs. `tuned`, the
        network alone where it is not the base, has full steps only. Where nothing is timed: by FLOPs of
        networks and head; of linear and frozen features, which are the head alone, as none.
        """
        steps = self.systems.curve.num_steps
        if not self.systems.curve.timing_runs:
            full, light = self.flops(params)
            share = {"shortcut": light / full}
            return math.nan, {kind: Costs(1.0, share.get(program_of(kind), 0.0)) for kind in (*kinds, "tuned")}
        own, base = (
            dataclasses.replace(s, mode="confidence") for s in (self.systems.wiring.sampler, self.systems.sampler)
        )
        whole = make_plan(
            dataclasses.replace(own, num_steps=steps, max_steps=len(self.systems.plan.masked_after)),
            self.systems.engine.num_tokens,
        )
        programs = {kind: program_of(kind) for kind in kinds}
        runs = {"base": self._plain_run(self.systems.base_params, base, steps)}
        if self.systems.tuned:
            runs["tuned"] = self._plain_run(self.systems.network, own, steps)
        for program in set(programs.values()):
            runs[program, "all"] = self._light_run(params, program, whole, self.systems.scheduled(range(steps)))
            runs[program, "first"] = self._light_run(params, program, whole, self.systems.scheduled([0]))
        seconds = {name: spread.median for name, spread in self._measured(runs).items()}
        step = seconds["base"] / steps

        def cost(program):
            full = seconds[program, "all"] / steps
            light = max(seconds[program, "first"] - full, 0.0) / max(steps - 1, 1)
            return Costs(full / step, light / step)

        found = {kind: cost(name) for kind, name in programs.items()}
        return step, found | ({"tuned": Costs(seconds["tuned"] / steps / step, 0.0)} if self.systems.tuned else {})

    def flops(self, params: Any) -> tuple[float, float]:
        """FLOPs of a full and of a shortcut step, an image, as compiled: network and head, both branches, no draw."""
        rows = branches(self.systems.plan)
        kept = self.systems.calibration.features
        features = jax.ShapeDtypeStruct((rows, *kept.shape[3:]), kept.dtype)
        cond = jax.ShapeDtypeStruct((rows, *self.systems.calibration.cond.shape[1:]), jnp.int32)
        ids, time = (
            jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((rows, self.systems.engine.num_tokens), (rows,))
        )
        told = jax.ShapeDtypeStruct((rows, self.systems.most), jnp.int32)
        controls = Controls(told, told, jax.ShapeDtypeStruct(told.shape, bool))

        def full(own, ids, time, cond):
            parts = self.systems.wiring.parts(None, own["base"])
            return parts.head(parts.features(ids, time, cond))

        def light(own, features, controls, share, cond):
            parts = self.systems.wiring.parts(own["shortcut"], own["base"])
            return parts.head(parts.advance(features, controls, share, cond))

        # Not placed: of the whole program, however arrays are split.
        own = {"base": self.systems.network, "shortcut": params}
        own = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), own)
        compiled = (
            jax.jit(full).lower(own, ids, time, cond).compile(),
            jax.jit(light).lower(own, features, controls, jax.ShapeDtypeStruct((rows,), jnp.float32), cond).compile(),
        )
        return tuple((one.cost_analysis() or {}).get("flops", math.nan) for one in compiled)

    def loops(
        self, params: Any, kinds: Mapping[str, Callable[[float], Refresh]], steps: Sequence[int]
    ) -> list[Latency]:
        """Times of one batch's sampling loop, without decoding: the base by steps, every kind by budget."""
        if not self.systems.curve.timing_runs:
            return []
        runs = {("base", n): self._plain_run(self.systems.base_params, self.systems.sampler, n) for n in steps}
        if self.systems.tuned:
            for n in self.systems.bench.settings.steps:
                runs["tuned", n] = self._plain_run(self.systems.network, self.systems.wiring.sampler, n)
            policy = self.systems.policy
            program = policy.program(False)
            for setting in policy.settings:
                runs["policy", setting] = self._run(program, policy.params, {}, setting)
        for kind, asks in kinds.items():
            for budget in self.systems.curve.budgets:
                runs[kind, budget] = self._light_run(params, kind, self.systems.plan, asks(budget))
        size, labels = self.systems.bench.settings.batch_size, {"base": "base", **self.systems.labels}
        return [
            Latency(system, labels[system], setting, size, spread)
            for (system, setting), spread in self._measured(runs).items()
        ]
