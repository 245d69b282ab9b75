"""Generators as systems to be measured: the base with a fixed plan, a shortcut on it, a clocked policy with its head."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from maskrl_jax.axis import Axis
from maskrl_jax.evaluate.measure import Generated, Scorer, System
from maskrl_jax.evaluate.measured import identity
from maskrl_jax.keys import EVALUATE, sample_keys
from maskrl_jax.parallel import Parallel
from maskrl_jax.rewards.judges import ClipJudge, TrainedJudge
from maskrl_jax.sampling import adaptive, shortcut
from maskrl_jax.sampling.maskgit import GIVEN, SamplerConfig, decode, make_plan
from maskrl_jax.sampling.refresh import Refresh


@dataclasses.dataclass(frozen=True)
class Engine:
    """What generation needs beside the parameters that are compared.

    Attributes:
      parallel: where programs run.
      logits: params -> logits_fn(ids, timestep, cond).
      codec: the tokenizer, with what reads prompts where there is such (`tasks.codecs.Codec`).
      tokenizer: its parameters.
      null: null condition of one sample.
      num_tokens: N.
      mask_id: id of MASK.
    """

    parallel: Parallel
    logits: Callable
    codec: Any
    tokenizer: Any
    null: np.ndarray
    num_tokens: int
    mask_id: int

    def conditions(self, frozen: Mapping[str, Any], cond: Any) -> tuple[Any, Any]:
        """What the network reads of a batch's conditions and of the null one."""
        return self.codec.told(frozen["tokenizer"], cond, self.null)

    def run(self, program: Callable, params: Any, frozen: Mapping[str, Any], batch: Mapping[str, np.ndarray]) -> dict:
        """Run a per-sample program over a batch that every process holds; rows of all processes as numpy."""
        rows = self.parallel.rows(len(batch["index"]))
        return self.parallel.gather(program(params, frozen, {name: x[rows] for name, x in batch.items()}))


@dataclasses.dataclass(frozen=True)
class Costs:
    """What a step costs on the clock, in steps of the base: one that runs the full network, and a light one."""

    full: float
    light: float


def fixed_program(engine: Engine, pictures: bool = True) -> Callable:
    """Compile the fixed-plan decode; one program per sampler mode serves every number of steps.

    Without `pictures` it ends with the tokens, for timing.
    """

    def program(p, frozen, batch, axis):
        keys_B = sample_keys(0, EVALUATE, batch["seed"][0], batch["index"])
        cond, null = engine.conditions(frozen, batch["cond"])
        rollout = decode(engine.logits(p), keys_B, cond, null, frozen["plan"], batch["given"], engine.mask_id)
        return _outputs(engine, frozen, rollout, axis) if pictures else {"ids": rollout.ids}

    return engine.parallel.map(program)


def fixed_system(
    engine: Engine,
    program: Callable,
    params: Any,
    sampler: SamplerConfig,
    name: str,
    label: str,
    given: np.ndarray | None = None,
) -> System:
    """A generator with a fixed plan, through a `fixed_program`; the setting is the number of steps.

    `given` int32 [N] are tokens that every sample keeps where they are not MASK.
    """
    start = _start(engine, given)

    def generate(setting, cond, sample_ids, seed):
        plan = make_plan(dataclasses.replace(sampler, num_steps=int(setting)), engine.num_tokens)
        kept = np.tile(start, (len(sample_ids), 1))
        frozen = {"plan": plan, "tokenizer": engine.tokenizer}
        return Generated(**engine.run(program, params, frozen, _batch(cond, sample_ids, seed) | {"given": kept}))

    return System(name, label, generate)


def shortcut_program(
    engine: Engine,
    parts_of: Callable[[Any], shortcut.Parts],
    most: int,
    *,
    extrapolate: bool = False,
    pictures: bool = True,
) -> Callable:
    """Compile the decode with a feature shortcut; one program serves every plan and every set of full steps.

    Without `pictures` it ends with the tokens, for timing.
    """

    def program(p, frozen, batch, axis):
        keys_B = sample_keys(0, EVALUATE, batch["seed"][0], batch["index"])
        cond, null = engine.conditions(frozen, batch["cond"])
        rollout, _ = shortcut.decode(
            parts_of(p),
            keys_B,
            cond,
            null,
            frozen["plan"],
            frozen["refresh"],
            batch["given"],
            engine.mask_id,
            most=most,
            extrapolate=extrapolate,
        )
        if not pictures:
            return {"ids": rollout.ids}
        steps_B = jnp.where(rollout.commit_step == GIVEN, 0, rollout.commit_step.astype(jnp.int32) + 1).max(-1)
        calls_B = frozen["full"] * rollout.calls + frozen["light"] * (steps_B - rollout.calls)
        return _outputs(engine, frozen, rollout, axis) | {"calls": calls_B, "steps": steps_B}

    return engine.parallel.map(program)


def shortcut_system(
    engine: Engine,
    program: Callable,
    params: Any,
    plan: Any,
    refresh_of: Callable[[float], Refresh],
    costs: Costs,
    name: str,
    label: str,
    given: np.ndarray | None = None,
) -> System:
    """A base with a shortcut, through a `shortcut_program`; the setting is the number of full steps.

    Its calls are its steps at their costs: what the same time buys of the base. `given` as in `fixed_system`.
    """
    start = _start(engine, given)
    prices = {name: np.float32(cost) for name, cost in dataclasses.asdict(costs).items()}

    def generate(setting, cond, sample_ids, seed):
        frozen = {"plan": plan, "refresh": refresh_of(setting), "tokenizer": engine.tokenizer, **prices}
        batch = _batch(cond, sample_ids, seed) | {"given": np.tile(start, (len(sample_ids), 1))}
        return Generated(**engine.run(program, params, frozen, batch))

    return System(name, label, generate)


def priced(system: System, cost: float) -> System:
    """The same system with each of its calls counted at a cost."""

    def generate(*arguments):
        made = system.generate(*arguments)
        return dataclasses.replace(made, calls=made.calls * cost, steps=made.taken)

    return dataclasses.replace(system, generate=generate)


def clocked_program(
    engine: Engine, config: adaptive.AdaptiveConfig, decide: Callable, pictures: bool = True
) -> Callable:
    """Compile the clocked decode; `decide(params, setting float32 [B])` gives its decision function.

    Without `pictures` it ends with the tokens, for timing.
    """

    def program(p, frozen, batch, axis):
        keys_B = sample_keys(0, EVALUATE, batch["seed"][0], batch["index"])
        cond, null = engine.conditions(frozen, batch["cond"])
        record = adaptive.rollout(
            engine.logits(p["model"]),
            decide(p, batch["setting"]),
            keys_B,
            cond,
            null,
            config,
            engine.num_tokens,
            engine.mask_id,
        )
        return _outputs(engine, frozen, record, axis) if pictures else {"ids": record.ids}

    return engine.parallel.map(program)


def clocked_system(engine: Engine, program: Callable, params: Any, name: str, label: str) -> System:
    """A policy through a `clocked_program`.

    The setting is the head's speed dial, or the number of steps where strides are given.
    """

    def generate(setting, cond, sample_ids, seed):
        batch = _batch(cond, sample_ids, seed)
        batch["setting"] = np.full(len(sample_ids), setting, np.float32)
        return Generated(**engine.run(program, params, {"tokenizer": engine.tokenizer}, batch))

    return System(name, label, generate)


def _start(engine: Engine, given: np.ndarray | None) -> np.ndarray:
    """Tokens of one sample before the first step, int32 [N]."""
    return np.full(engine.num_tokens, engine.mask_id, np.int32) if given is None else given.astype(np.int32)


def _batch(cond: np.ndarray, sample_ids: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    return {"cond": cond, "index": sample_ids, "seed": np.full(len(sample_ids), seed, np.int32)}


def _outputs(engine: Engine, frozen: Any, rollout: Any, axis: Axis) -> dict[str, jax.Array]:
    decode = functools.partial(engine.codec.decode, frozen["tokenizer"])
    images = axis.in_parts(decode, rollout.ids, engine.codec.at_once)
    return {"images": images, "calls": rollout.calls, "commit_step": rollout.commit_step}


def judge_scorer(judge: TrainedJudge | ClipJudge, params: Any, dataset: Any) -> Scorer:
    """The judge and, where the set has one, the exact verifier; its parameters best lie on the device."""
    program = jax.jit(judge.measured)

    def scores(images, prompts):
        target = judge.targets(dataset.encode(list(prompts)), prompts)
        return jax.device_get(program(params, images, jnp.asarray(target)))

    return Scorer(scores, dataset.verify, identity(params, judge.identity, dataset.name))


def features_of(judge: TrainedJudge | ClipJudge, params: Any, images: np.ndarray, batch_size: int = 256) -> np.ndarray:
    """Judge features of uint8 images [n,H,W,3], float32 [n,D]."""
    program = jax.jit(judge.features)
    parts = []
    for start in range(0, len(images), batch_size):
        part = images[start : start + batch_size].astype(np.float32) / 255
        padded = np.pad(part, ((0, batch_size - len(part)), *[(0, 0)] * 3))
        parts.append(jax.device_get(program(params, padded))[: len(part)])
    return np.concatenate(parts)
