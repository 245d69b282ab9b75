"""Rollouts of reinforcement-learning stages: requests, filters with resampling, and the base's reference quality."""

import dataclasses
import functools
import math
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from maskrl_jax.data.batches import batch_at
from maskrl_jax.data.dataset import Dataset
from maskrl_jax.errors import UserError
from maskrl_jax.evaluate import measure, measured
from maskrl_jax.evaluate.measure import Protocol, Scorer, System
from maskrl_jax.rewards import alarm, energy_distance, mix, statistics
from maskrl_jax.rewards.remote import RemoteReward
from maskrl_jax.rl import credit
from maskrl_jax.tasks import judge as judge_task
from maskrl_jax.tasks.base import opened_service
from maskrl_jax.tasks.task import Context

Array = jax.Array
ALARMS = {
    "alarm/held_out": "the trained reward rises while the held-out one falls",
    "alarm/pictures": "a statistic of the pictures has drifted far from where it began",
}
REAL_OF_PROMPT = 32  # so many stand for those of a prompt, where the set has them
REAL_PICTURES = 2048  # at least so many stand for the real ones, where the set has them


def memory_of(config: credit.CreditConfig) -> dict:
    """What rollouts remember between updates, empty: the filters with the scale of the reward, and the alarm."""
    return {"credit": credit.create(config), "alarm": alarm.create(len(statistics.NAMES))}


class Rollouts:
    """Rollouts of a batch of prompts with their advantages; rejected groups are rolled out anew.

    `reference` [P] is the base's quality (`reference_quality`) on every prompt of the training pool, zeros where
    the credit does not read it.
    """

    def __init__(self, context: Context, wiring: Any, train: Dataset, frozen: Any, reference: np.ndarray):
        self.config, self.parallel, self.wiring = context.config, context.parallel, wiring
        self.train, self.frozen, self.judge = train, frozen, judge_task.load(context.parents["judge"])
        self.pool = train.pool(held_out=False)
        # Prompts repeat: the reference quality is known per distinct condition.
        self.reference_of = dict(zip((cond.tobytes() for cond in self.pool), reference, strict=True))
        # Prompts come from the pool in equal shares, whatever their share of the pictures.
        self.prompts = dataclasses.replace(train, columns={"cond": self.pool, "label": self.pool})
        self.real: np.ndarray | None = None  # block means of real pictures, where they enter the reward
        self.real_of: dict[bytes, np.ndarray] = {}  # by prompt, where pictures are compared within prompts
        if self.config.energy_distance:
            self._read_real()
        self.program = context.parallel.map(wiring.rollout)
        self.rounds = self.config.resample.rounds if "resample" in self.config else 0
        # Groups of a resampling program: those asked for, filled up until the devices divide their rollouts, and the
        # processes the groups.
        least = self.parallel.num_devices // math.gcd(self.parallel.num_devices, self.config.group)
        least = math.lcm(least, jax.process_count())
        self.resampled = -(-self.config.resample.groups // least) * least if self.rounds else 0
        self.assign = jax.jit(functools.partial(credit.assign, wiring.credit))
        self.record = jax.jit(credit.record)
        self.watch = jax.jit(functools.partial(alarm.watch, wiring.base.alarm))
        self.warned: set[str] = set()
        self.images_per_sec = 0.0  # of the last first round
        self.remember = jax.jit(functools.partial(credit.remember, wiring.credit))

    def _read_real(self):
        """Block means of the real pictures; UserError where the set has none."""
        if not self.train.has_pictures:
            raise UserError(f"{self.train.name} has no pictures to be like; set energy_distance=0, or name another set")
        train, texts = self.train, self.train.describe(self.pool)
        few = -(-REAL_PICTURES // len(texts))  # of each prompt
        within = self.wiring.base.distance_scope == "prompt"
        found = train.take(train.positions_of(texts, max(REAL_OF_PROMPT, few) if within else few))
        real = energy_distance.blocks(np.float32(found["image"]) / 255)
        if within:
            same = [(found["cond"] == cond).reshape(len(real), -1).all(axis=1) for cond in self.pool]
            self.real_of = {cond.tobytes(): real[rows] for cond, rows in zip(self.pool, same, strict=True)}
        self.real = real[:: max(len(real) // (few * len(texts)), 1)]

    @functools.cached_property
    def service(self) -> RemoteReward:
        """The reward service, tested at the first rollout that is trained on: what is only measured needs none."""
        return opened_service(self.wiring.base.service)

    def batch(self, step: int) -> dict[str, np.ndarray]:
        """Rollout requests of an update, all processes' rows; a pure function of the step."""
        config, wiring = self.config, self.wiring
        prompts = batch_at(self.prompts, step, wiring.base.groups, slice(0, wiring.base.groups), config.seed)
        cond = prompts["cond"]
        texts = self.train.describe(cond)
        target = self.judge.targets(cond, texts)
        reference = np.asarray([self.reference_of[c.tobytes()] for c in cond], np.float32)
        rows = {"cond": cond, "target": target, "prompt": prompts["index"], "reference": reference}
        rows = {name: value.repeat(config.group, axis=0) for name, value in rows.items()}
        place = np.arange(config.batch_size, dtype=np.int32)
        return rows | {"index": (step * config.batch_size + place).astype(np.int32)} | wiring.settings(place)

    def shown(self, params: Any) -> tuple[dict, list[str]]:
        """Rollouts of the first batch of prompts with the noise of the last round there can be, and their captions."""
        batch = self.batch(0)
        return self.generate(params, batch, np.iinfo(np.int32).max), self.train.describe(batch["cond"])

    def generate(self, params: Any, batch: dict, number: int) -> dict:
        """Roll out a batch with the noise of a round; rows of all processes."""
        size = len(batch["index"])
        request, rows = batch | {"round": np.full(size, number, np.int32)}, self.parallel.rows(size)
        mine = {name: value[rows] for name, value in request.items()}
        return self.parallel.gather(self.program(params, self.frozen, mine))

    def collect(self, state: Any, batch: dict, step: int) -> tuple[dict, credit.Credit, Any, dict]:
        """Roll out, score and filter: (rollouts, credit, the filters' memory, shares rejected before and after).

        All processes get all rows. Thresholds are those before the update, so that what is rolled out anew
        changes nothing for the other groups; every group that was seen enters the history.
        """
        known = self.parallel.whole(state.extra["credit"])
        before = jax.device_put(known)
        began = time.monotonic()
        out = self._run(state, batch, step, 0)
        first_blocks = out["blocks"]
        self.images_per_sec = len(out["quality"]) / (time.monotonic() - began)
        result = self._credit(before, step, out, batch)
        memory = self._remember(before, step, result, out, batch)
        if known.sigma == 0:  # the very first batch: its first round sets the scale of the rounds that follow
            before = before.replace(sigma=memory.sigma)
        rejected = jax.device_get(result.rejected)
        first = rejected.mean()
        for attempt in range(1, self.rounds + 1):
            groups = np.flatnonzero(rejected)[: self.config.resample.groups]
            if not len(groups):
                break
            out = self._resample(state, batch, step, attempt, groups, out, first_blocks)
            result = self._credit(before, step, out, batch)
            anew = jax.device_put(np.isin(np.arange(len(rejected)), groups))
            memory = self.record(memory, result.replace(scored=result.scored & anew))
            rejected = jax.device_get(result.rejected)
        return out, result, memory, {"rejected_first": float(first), "rejected": float(rejected.mean())}

    def _remember(self, memory, step, result, out, batch):
        quality, reference = self._grouped(out["quality"]), self._reference(batch)
        return self.remember(memory, result, quality, reference, jax.device_put(np.int32(step)))

    def _credit(self, memory, step, out, batch):
        grouped = (self._grouped(out["quality"]), self._grouped(out["calls"]), self._reference(batch))
        bonus = self._grouped(self.config.energy_distance * out["witness"])
        return self.assign(memory, jax.device_put(np.int32(step)), *grouped, bonus)

    def _grouped(self, values: np.ndarray) -> Array:
        return jax.device_put(np.reshape(values, (self.wiring.base.groups, self.config.group)))

    def _reference(self, batch: dict) -> Array:
        return jax.device_put(batch["reference"].reshape(self.wiring.base.groups, -1)[:, :1])

    def _run(self, state, batch, step, attempt, others=None):
        """Roll out a batch with the keys of an attempt; rows of all processes.

        `others` are the generated pictures that these are compared with, if not themselves.
        """
        out = self.generate(state.params, batch, step * (self.rounds + 1) + attempt)
        if self.wiring.base.service is not None:
            out |= self._served(out, batch)
        if self.wiring.base.reward_scale == "group":
            scores = {name: out[f"reward/{name}"] for name in self.wiring.base.rewards}
            spread = mix.standardised(scores, self.config.group)
            out["quality"] = np.float32(mix.weighted_sum(spread, self.wiring.base.rewards))
        blocks = energy_distance.blocks(np.asarray(out["images"]))
        return out | {"blocks": blocks, "witness": self._witness(blocks, batch, others)}

    def _witness(self, blocks, batch, others):
        if self.real_of:
            reals = [self.real_of[c.tobytes()] for c in batch["cond"][:: self.config.group]]
            return energy_distance.witness_of_groups(blocks, reals)
        if self.real is None:
            return np.where(np.isfinite(blocks).all(1), np.float32(0), np.float32(np.nan))
        return energy_distance.witness(blocks, self.real, others)

    def _served(self, out, batch):
        """What the service says of the pictures, and the quality with it; NaN, which drops a group, where it fails.

        Process 0 asks for all: a failure must drop the same groups everywhere, or stop all processes (UserError).
        """
        known, prompts = self.wiring.base.service, self.train.describe(batch["cond"])
        told, reason = np.zeros(1 + len(prompts), np.float32), None  # whether to stop, and the scores
        if jax.process_index() == 0:
            try:
                told[1:] = self.service.score(out["images"], prompts)
            except UserError as error:
                told[0], reason = 1, error
        told = self.parallel.of_first(told)
        if told[0]:
            raise reason or UserError(f"the reward service at {known.remote.url} stopped process 0, which says why")
        scores = told[1:]
        return {f"reward/{known.name}": scores, "quality": np.float32(out["quality"] + known.weight * scores)}

    def _resample(self, state, batch, step, attempt, groups, out, others):
        """Roll the given groups out anew in a program of `resampled` groups, whatever their number."""
        size = self.config.group
        filled = np.resize(groups, self.resampled)
        rows = (filled[:, None] * size + np.arange(size)).reshape(-1)
        fresh = self._run(state, {name: value[rows] for name, value in batch.items()}, step, attempt, others)
        out = {name: value.copy() for name, value in out.items()}
        for name, value in out.items():
            value[rows[: len(groups) * size]] = fresh[name][: len(groups) * size]
        return out

    def statistics(
        self, state: Any, out: dict, result: credit.Credit, memory: Any, filtered: dict, batch: dict
    ) -> tuple[dict, Any]:
        """Numbers of a batch of rollouts for the logs, and the alarm's memory; held-out measures are only read."""
        result, memory = jax.device_get((result, memory))
        calls, scored = out["calls"], result.scored
        seen = np.repeat(scored, self.config.group)  # a failed score drops its group
        values = {
            "reward/failed": 1 - scored.mean(),
            "reward/total": _mean(result.reward[scored]),
            "reward/sigma": memory.sigma,
            "sampling/images_per_sec": self.images_per_sec,
            "sampling/calls": calls.mean(),
            "rl/adv_std": _std(result.advantage, result.keep),
            "rl/zero_std_ratio": _mean(result.std[scored] == 0),
            "rl/rejected": filtered["rejected"],
            "rl/rejected_first": filtered["rejected_first"],
            "rl/dropped": result.dropped.mean(),
            "rl/updated": result.keep.mean(),
        }
        if self.real is not None:
            values["reward/energy_distance"] = energy_distance.energy_distance(out["blocks"], self.real)
        if self.wiring.credit.speed != "off":
            values |= {
                "reward/speed": _mean(result.speed[scored]),
                "reward/gate": _mean(result.gate[scored]),
                "sampling/calls_sd": calls.std(),
                "sampling/calls_max": calls.max(),
                "rl/speed_weight": result.speed_weight,
                "rl/decision_adv_std": _std(result.decision_advantage, result.decision_keep),
                "rl/decided": result.decision_keep.mean(),
            }
        if self.wiring.credit.reads_reference:
            values["reward/surplus"] = _mean((out["quality"] - batch["reference"])[seen])
        values |= self._rewards(out, batch, seen)
        looks = statistics.describe(out["images"][seen], out["ids"][seen], out["blocks"][seen], self.config.group)
        values |= {f"pictures/{name}": value for name, value in looks.items()}
        held_out = sum(w * values[f"reward_heldout/{name}"] for name, w in self.wiring.base.held_out.items())
        watched = np.float32([values["reward/quality"], held_out, *looks.values()])
        alarm_memory, alarms = self.watch(
            jax.device_put(self.parallel.whole(state.extra["alarm"])), jax.device_put(watched)
        )
        values |= {f"alarm/{name}": fired for name, fired in jax.device_get(alarms).items()}
        self._warn(values)
        return {name: float(value) for name, value in values.items()}, alarm_memory

    def _warn(self, values: dict[str, float]) -> None:
        """Say once a run and kind that the alarm fires."""
        for name, words in ALARMS.items():
            if values[name] and name not in self.warned and jax.process_index() == 0:
                self.warned.add(name)
                print(f"warning: reward hacking? {words}; see {name} and reward_heldout/ in TensorBoard", flush=True)

    def _rewards(self, out: dict, batch: dict, seen: np.ndarray) -> dict[str, float]:
        """Every reward by name: means, and the spread within groups of those that are trained on."""
        base, values = self.wiring.base, {}
        scores = {name.removeprefix("reward/"): x for name, x in out.items() if name.startswith("reward/")}
        for name, score in scores.items():
            if name not in base.held_out:
                values[f"reward/{name}"] = _mean(score[seen])
        for name in base.rewards:
            grouped = scores[name][seen].reshape(-1, self.config.group)
            values[f"reward/{name}_std"] = _mean(grouped.std(1, ddof=1))
        if self.train.verify is not None:
            scores |= self.train.verify(out["images"], self.train.describe(batch["cond"]))
        values |= {f"reward_heldout/{name}": _mean(scores[name][seen]) for name in base.held_out}
        values["reward/quality"] = sum(w * values[f"reward/{name}"] for name, w in base.rewards.items())
        return values


def _mean(values: np.ndarray) -> float:
    """Mean; 0 of nothing."""
    return values.mean() if len(values) else 0.0


def _std(values: np.ndarray, kept: np.ndarray) -> float:
    """Standard deviation of what is kept; 0 where nothing is."""
    return float(values[kept > 0].std()) if (kept > 0).any() else 0.0


def reference_quality(
    context: Context, train: Dataset, base: System, steps: int, scorer: Scorer, rewards: Mapping[str, float]
) -> np.ndarray:
    """Mean quality of the base at T_ref on every prompt of the pool, float32; measured once for all runs above it.

    It gates the speed reward and bounds low quality (specs/speed_rl.md 4.5).
    """
    config, cond = context.config, train.pool(held_out=False)
    protocol = Protocol(
        prompts=tuple(train.describe(cond)),
        cond=cond,
        group=config.reference_samples,
        batch_size=config.evaluation.batch_size,
        seed=0,  # the same for every seed of a policy
    )

    def make():
        numbers, _ = measure.collect(base, steps, protocol, scorer)
        return {"quality": mix.weighted_sum(numbers, rewards).reshape(len(cond), -1).mean(1)}

    key = measured.identity(
        dataclasses.asdict(protocol), steps, sorted(rewards.items()), base.identity, scorer.identity
    )
    return measured.once(context.measured_dir, "reference", key, make)["quality"]
