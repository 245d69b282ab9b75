"""Stage `speed_rl`: reinforcement learning on quality and on the number of network calls (Speed-RL-like).

Everything quantitative here is our choice (specs/speed_rl.md section 2): the paper's algorithm is not public.
"""

import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from maskrl_jax import state as train_state
from maskrl_jax.data.batches import batch_at
from maskrl_jax.data.dataset import Conditioning, conditioning_of, open_dataset
from maskrl_jax.errors import UserError
from maskrl_jax.keys import EVALUATE, MASKS, ROLLOUT, sample_keys
from maskrl_jax.models.judge import Judge, JudgeConfig
from maskrl_jax.phase import Phase
from maskrl_jax.rewards import judge as judge_reward
from maskrl_jax.rewards import mix
from maskrl_jax.rl import credit, surrogate
from maskrl_jax.rl.pairs import accumulate
from maskrl_jax.rl.policy import Head, Policy
from maskrl_jax.rl.token_terms import Calls, Model, TokenLoss, token_terms
from maskrl_jax.sampling import adaptive
from maskrl_jax.sampling.draws import commit_top
from maskrl_jax.sampling.maskgit import SamplerConfig, decode, make_plan
from maskrl_jax.tasks import judge as judge_task
from maskrl_jax.tasks import maskgit as maskgit_task
from maskrl_jax.tasks import tokenizer as tokenizer_task
from maskrl_jax.tasks.task import Context, Task

Array = jax.Array
RECORD = tuple(adaptive.Record.__dataclass_fields__)


class Wiring:
    """The stage's pure functions, closed over its static configuration."""

    def __init__(self, config: Any, conditioning: Conditioning):
        self.config = config
        base = config.parents.maskgit
        self.sizes = maskgit_task.model_config(base, base.parents.tokenizer, conditioning)
        self.generator = maskgit_task.generator(self.sizes, None, conditioning.null)
        self.codec = tokenizer_task.codec(tokenizer_task.TokenizerConfig(**base.parents.tokenizer.model), None)
        self.judge_sizes = JudgeConfig(**config.parents.judge.model)
        self.judge = Judge(self.judge_sizes)
        self.null = conditioning.null
        self.policy = Policy(**config.policy)
        self.head = Head(self.policy)
        self.loss = TokenLoss(
            **config.loss.tokens, temperature=self.policy.temperature, guided=self.policy.guidance != 1.0
        )
        self.sampler = self.policy.sampler(self.sizes.num_tokens, keep_predictions=self.loss.likelihood == "all")
        self.credit = credit.CreditConfig(
            **config.credit, max_calls=self.policy.max_calls, std_of_quality=self.policy.kind == "budget"
        )
        self.rewards = dict(config.rewards)
        mix.check(self.rewards, judge_reward.names(self.judge_sizes.kind))
        self.optimizer = train_state.OptimizerConfig(**config.optimizer)
        self.tx = train_state.make_optimizer(self.optimizer)
        self.groups = _groups(config)
        self.model = Model(self.generator.features, self.generator.head, self.null)
        if self.policy.kind == "budget" and config.group % len(self.policy.step_set):
            raise UserError(
                f"group {config.group} is not divisible by the {len(self.policy.step_set)} step counts of "
                "policy.step_set; every group holds each of them equally often"
            )

    def init(self, key: Array, params: Any) -> train_state.TrainState:
        """State that starts from the base model's parameters."""
        params = {"model": params, "head": self.head.init(key)}
        return train_state.create(params, self.tx, extra={"credit": credit.create(self.credit)})

    # Rollout

    def rollout(self, params: Any, frozen: Any, batch: dict, axis: Any) -> dict:
        """Sample, decode and score a batch of rollouts; per-sample outputs."""
        keys_B = sample_keys(self.config.seed, ROLLOUT, batch["round"][0], batch["index"])
        logits = self.generator.logits(params["model"])
        decide = self.head.decide(params["head"])
        if self.policy.kind != "adaptive":
            decide = adaptive.given_strides(batch["jump"])
        record = adaptive.rollout(
            logits, decide, keys_B, batch["cond"], self.null, self.sampler, self.sizes.num_tokens, self.sizes.mask_id
        )
        images = self.codec.decode(frozen["tokenizer"], record.ids)
        scores = judge_reward.score(
            self.judge_sizes.kind, self.judge.apply(frozen["judge"], images), batch["target"]
        )
        fields = {name: getattr(record, name) for name in RECORD}
        return fields | {"quality": mix.weighted_sum(scores, self.rewards), "images": images}

    def reference(self, params: Any, frozen: Any, batch: dict, axis: Any) -> dict:
        """Quality of the base at its reference number of calls, per sample."""
        keys_B = sample_keys(self.config.seed, EVALUATE, batch["round"][0], batch["index"])
        given = jnp.full((len(keys_B), self.sizes.num_tokens), self.sizes.mask_id, jnp.int32)
        rollout = decode(
            self.generator.logits(params),
            keys_B,
            batch["cond"],
            self.null,
            frozen["plan"],
            given,
            self.sizes.mask_id,
        )
        images = self.codec.decode(frozen["tokenizer"], rollout.ids)
        scores = judge_reward.score(
            self.judge_sizes.kind, self.judge.apply(frozen["judge"], images), batch["target"]
        )
        return {"quality": mix.weighted_sum(scores, self.rewards)}

    # Update

    def update(self, state: Any, frozen: Any, batch: dict, axis: Any) -> tuple[Any, dict]:
        """One optimizer step from recorded rollouts with advantages."""
        record = adaptive.Record(**{name: batch[name] for name in RECORD})
        old = frozen.get("old")
        valid, build = self._budget_calls(batch) if self.policy.kind == "budget" else self._policy_calls(record, batch)
        totals = surrogate.Normalisers(
            *axis.all_reduce(
                (batch["keep"].sum(), jnp.float32(len(batch["keep"])), record.calls.sum().astype(jnp.float32))
            )
        )
        entropy_coefficient = _linear(self.config.loss.head_entropy, state.step, self.config.num_steps)

        def loss(params, pair, real):
            rows, calls, floor = build(pair, real)
            calls, rows, real = axis.split((calls, rows, real))
            sums, error, drawn = token_terms(
                self.loss, self.model, params["model"], old and old["model"], frozen["reference"], calls
            )
            decision, head_entropy = self._decision_terms(params["head"], old, record, batch, rows, pair, real)
            terms = surrogate.Terms(sums.token, decision, sums.kl, head_entropy)
            total = surrogate.policy_loss(
                terms, totals, kl_coefficient=self.config.loss.kl_coefficient, entropy_coefficient=entropy_coefficient
            )
            gap = jnp.where(calls.committed, drawn, jnp.inf).min(-1) - floor
            gap = jnp.where(real, jnp.abs(gap), 0.0).sum()
            stats = {
                "kl": sums.kl,
                "clip": sums.clip,
                "entropy": sums.entropy,
                "head_entropy": head_entropy,
                "gap": (gap, real.sum().astype(jnp.float32)),
            }
            return total, (stats, error)

        def part(pair, real):
            grads, (stats, error) = jax.grad(loss, has_aux=True)(state.params, pair, real)
            return (grads, stats), error

        (grads, stats), error = accumulate(part, valid, self.config.micro_batch * axis.size)
        grads, stats = axis.all_reduce((grads, stats))
        state, info = train_state.apply_gradients(state, grads, self.tx, ema_decay=self.optimizer.ema_decay)
        one = jnp.float32(1)
        return state, {
            "rl/kl": (stats["kl"], totals.rollouts),
            "rl/clip_frac": stats["clip"],
            "rl/entropy": stats["entropy"],
            "rl/head_entropy": (stats["head_entropy"], totals.decisions),
            "rl/sampler_gap": stats["gap"],
            # The largest of a device, averaged over devices: there is no max in the all-reduce.
            "rl/ratio_max_err": axis.all_reduce((error, one)),
            "train/grad_norm": (info["grad_norm"], one),
            "train/skipped": (info["skipped"], one),
        }

    def _policy_calls(self, record: adaptive.Record, batch: dict):
        """Pairs of `adaptive` and `fixed`: every call that a rollout made."""
        length, num_tokens = self.policy.max_calls, self.sizes.num_tokens
        valid = jnp.arange(length)[None] < record.calls[:, None]

        def build(pair, real):
            row, call = pair // length, pair % length
            ids = record.ids[row]
            committed = (record.commit_step[row] == call[:, None]) & real[:, None]
            remasked = (record.commit_step[row] > call[:, None]) & real[:, None]
            if self.loss.likelihood == "all":
                ids = record.predictions[row, call].astype(jnp.int32)
            weights = surrogate.term_weights(
                record.calls[row],
                num_tokens=num_tokens,
                max_calls=length,
                per_rollout_mean=self.config.loss.per_rollout_mean,
            )
            keep = batch["keep"][row] * real
            exact = self.loss.likelihood == "hard" and self.policy.action == "stride"
            tick = record.tick[row, call]
            calls = Calls(
                inputs=jnp.where(record.commit_step[row] < call[:, None], record.ids[row], self.sizes.mask_id),
                timestep=jnp.asarray(self.sampler.clock.timestep)[tick],
                cond=batch["cond"][row],
                ids=ids,
                committed=committed,
                remasked=remasked,
                z_star=(record.log_floor if exact else record.z_star)[row, call],
                tau=jnp.asarray(self.sampler.clock.noise)[tick] * (self.policy.action == "stride"),
                scale=adaptive.guidance_at(self.sampler, tick),
                advantage=batch["advantage"][row],
                token_weight=(keep * weights.token)[:, None] * jnp.ones((1, num_tokens)),
                kl_weight=surrogate.kl_weight(committed | remasked, record.calls[row]) * real[:, None],
            )
            return row, calls, record.log_floor[row, call]

        return valid, build

    def _budget_calls(self, batch: dict):
        """Pairs of `budget`: mask levels of the final image, the same for all rollouts of a prompt.

        This likelihood is not the behaviour's (specs/speed_rl.md 4.3): a surrogate, on the conditional
        branch of randomly masked images.
        """
        levels, num_tokens = self.policy.levels, self.sizes.num_tokens
        clock = self.sampler.clock
        keys_B = sample_keys(self.config.seed, MASKS, batch["round"][0], batch["prompt"])
        valid = jnp.ones((len(batch["prompt"]), levels), bool)

        def build(pair, real):
            row, level = pair // levels, pair % levels
            keys = jax.vmap(jax.random.fold_in)(keys_B[row], level)
            place = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, 0)))(keys)
            share = (level + place) / levels
            score = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, 1), (num_tokens,)))(keys)
            count = jnp.clip(jnp.ceil(num_tokens * jnp.cos(jnp.pi / 2 * share)), 1, num_tokens).astype(jnp.int32)
            masked = commit_top(score, jnp.ones(score.shape, bool), count) & real[:, None]
            tick = jnp.minimum(share * clock.ticks, clock.ticks - 1).astype(jnp.int32)
            ids, zero = batch["ids"][row], jnp.zeros(row.shape)
            calls = Calls(
                inputs=jnp.where(masked, self.sizes.mask_id, ids),
                timestep=jnp.asarray(clock.timestep)[tick],
                cond=batch["cond"][row],
                ids=ids,
                committed=masked,
                remasked=jnp.zeros(masked.shape, bool),
                z_star=zero,
                tau=zero,
                scale=zero + 1,
                advantage=batch["advantage"][row],
                token_weight=surrogate.budget_weight(masked, levels) * (batch["keep"][row] * real)[:, None],
                kl_weight=surrogate.budget_weight(masked, levels) * real[:, None],
            )
            return row, calls, zero

        return valid, build

    def _decision_terms(self, head: Any, old: Any, record: adaptive.Record, batch: dict, row, pair, real):
        """(clipped objective, entropy) of the decisions of a micro-batch, summed."""
        if self.policy.kind != "adaptive":
            return jnp.float32(0), jnp.float32(0)
        call = pair % self.policy.max_calls
        # The last call of the threshold action is forced: no decision, so no term.
        free = real & ((call < self.policy.max_calls - 1) | (self.policy.action == "stride"))
        seen = (
            record.features[row, call],
            record.decision[row, jnp.maximum(call - 1, 0)],
            record.decision[row, call],
            record.action[row, call],
            call == 0,
        )
        logp, entropy = self.head.score(head, *seen)
        before = logp if old is None else self.head.score(old["head"], *seen)[0]
        weights = surrogate.term_weights(
            record.calls[row],
            num_tokens=self.sizes.num_tokens,
            max_calls=self.policy.max_calls,
            per_rollout_mean=self.config.loss.per_rollout_mean,
        )
        total, _ = surrogate.clipped_surrogate(
            logp,
            before,
            batch["advantage"][row],
            batch["keep"][row] * free * weights.decision,
            low=self.config.loss.tokens.clip_low,
            high=self.config.loss.tokens.clip_high,
        )
        return total, jnp.where(free, entropy, 0.0).sum()


def _groups(config: Any) -> int:
    """Prompts of an update; UserError where rollouts do not fill whole groups."""
    if config.group < 2 or config.batch_size % config.group:
        raise UserError(
            f"batch_size {config.batch_size} rollouts do not fill groups of {config.group}; "
            "make it a multiple of group (at least 2)"
        )
    return config.batch_size // config.group


def _linear(ends: tuple[float, float], step: Array, num_steps: int) -> Array:
    """Value that moves linearly from the first to the second number over the run."""
    return ends[0] + (ends[1] - ends[0]) * jnp.minimum(step / num_steps, 1.0)


class Rollouts:
    """Rollouts of a batch of prompts with their advantages; rejected groups are rolled out anew."""

    def __init__(self, context: Context, wiring: Wiring, train: Any, frozen: Any, references: np.ndarray):
        self.config, self.parallel, self.wiring = context.config, context.parallel, wiring
        self.train, self.frozen = train, frozen
        # Prompts repeat: the reference quality is known per distinct condition.
        self.reference_of = {key: value for key, value in zip(distinct(train)[1], references, strict=True)}
        self.program = context.parallel.map(wiring.rollout)
        self.assign = jax.jit(functools.partial(credit.assign, wiring.credit))
        self.remember = jax.jit(functools.partial(credit.remember, wiring.credit))

    def batch(self, step: int) -> dict[str, np.ndarray]:
        """Rollout requests of an update, all processes' rows; a pure function of the step."""
        config, wiring = self.config, self.wiring
        prompts = batch_at(self.train, step, wiring.groups, slice(0, wiring.groups), config.seed)
        cond = prompts["cond"]
        texts = self.train.describe(cond)
        target = judge_reward.targets(wiring.judge_sizes.kind, cond, texts)
        reference = np.asarray([self.reference_of[c.tobytes()] for c in cond], np.float32)
        rows = {"cond": cond, "target": target, "prompt": prompts["index"], "reference": reference}
        rows = {name: value.repeat(config.group, axis=0) for name, value in rows.items()}
        place = np.arange(config.batch_size, dtype=np.int32)
        steps = wiring.policy.steps() if wiring.policy.kind != "adaptive" else (1,)
        return rows | {
            "index": (step * config.batch_size + place).astype(np.int32),
            "jump": (wiring.policy.ticks // np.asarray(steps, np.int32))[place % len(steps)],
        }

    def collect(self, state: Any, batch: dict, step: int) -> tuple[dict, credit.Credit, Any, dict]:
        """Roll out, score and filter: (rollouts, credit, the filters' memory, shares rejected before and after).

        All processes get all rows. Thresholds are those before the update, so that what is rolled out anew
        changes nothing for the other groups; every group that was seen enters the history.
        """
        out = self._run(state, batch, step, 0)
        result = self._credit(state.extra["credit"], step, out, batch)
        memory = self._remember(state.extra["credit"], step, result, out, batch)
        rejected = jax.device_get(result.rejected)
        first = rejected.mean()
        for attempt in range(1, self.config.resample.rounds + 1):
            groups = np.flatnonzero(rejected)[: self.config.resample.groups]
            if not len(groups):
                break
            out = self._resample(state, batch, step, attempt, groups, out)
            result = self._credit(state.extra["credit"], step, out, batch)
            anew = jax.device_put(np.isin(np.arange(len(rejected)), groups))
            memory = self._remember(memory, step, result.replace(scored=result.scored & anew), out, batch)
            rejected = jax.device_get(result.rejected)
        return out, result, memory, {"rejected_first": float(first), "rejected": float(rejected.mean())}

    def _remember(self, memory, step, result, out, batch):
        reference = self._grouped(batch["reference"])[:, :1]
        return self.remember(
            memory, result, self._grouped(out["quality"]), reference, jax.device_put(np.int32(step))
        )

    def _grouped(self, values: np.ndarray) -> Array:
        return jax.device_put(np.asarray(values).reshape(self.wiring.groups, self.config.group))

    def _credit(self, memory, step, out, batch):
        return self.assign(
            memory,
            jax.device_put(np.int32(step)),
            self._grouped(out["quality"]),
            self._grouped(out["calls"]),
            self._grouped(batch["reference"])[:, :1],
        )

    def _run(self, state, batch, step, attempt):
        """Roll out a batch with the keys of an attempt; rows of all processes."""
        size = len(batch["index"])
        number = step * (self.config.resample.rounds + 1) + attempt
        request = batch | {"round": np.full(size, number, np.int32)}
        rows = self.parallel.rows(size)
        mine = {name: value[rows] for name, value in request.items()}
        return self.parallel.gather(self.program(state.params, self.frozen, mine))

    def _resample(self, state, batch, step, attempt, groups, out):
        """Roll the given groups out anew in a program of `resample.groups` groups, whatever their number."""
        size = self.config.group
        filled = np.resize(groups, self.config.resample.groups)
        rows = (filled[:, None] * size + np.arange(size)).reshape(-1)
        fresh = self._run(state, {name: value[rows] for name, value in batch.items()}, step, attempt)
        out = {name: value.copy() for name, value in out.items()}
        for name, value in out.items():
            value[rows[: len(groups) * size]] = fresh[name][: len(groups) * size]
        return out
