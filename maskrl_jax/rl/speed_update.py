"""The gradient of Speed-RL's loss from recorded rollouts (specs/speed_rl.md section 5; our choice)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from maskrl_jax.keys import MASKS, sample_keys
from maskrl_jax.rl import surrogate
from maskrl_jax.rl.pairs import accumulate
from maskrl_jax.rl.policy import Head, Policy
from maskrl_jax.rl.token_terms import Calls, Model, TokenLoss, masked_images, token_terms
from maskrl_jax.sampling import adaptive
from maskrl_jax.sampling.draws import commit_top

Array = jax.Array
RECORD = tuple(adaptive.Record.__dataclass_fields__)


@dataclasses.dataclass(frozen=True)
class SpeedUpdate:
    """Static parts of an update.

    A batch holds the record's fields and, per rollout, cond, advantage [B], keep [B] (omega), the same two for
    decisions (decision_advantage, decision_keep), prompt [B] and round [B] int32 (the same for all: the update's
    number).
    """

    policy: Policy
    head: Head
    tokens: TokenLoss
    model: Model
    num_tokens: int
    mask_id: int
    seed: int
    micro_batch: int  # network calls a device scores at a time
    kl_coefficient: float = 0.01
    # Factors of a rollout's first call; `budget` scores no calls, so they are not for it.
    first_call_tokens: float = 1.0  # of its token terms
    first_call_kl: float = 1.0  # of its KL
    per_rollout_mean: bool = False
    scored_calls: tuple[int, int] | None = None  # first and one past the last call that the loss reads; None: all

    @property
    def sampler(self) -> adaptive.AdaptiveConfig:
        """The sampler that rollouts of this update come from."""
        return self.policy.sampler(self.num_tokens, keep_predictions=self.tokens.reads_draws)

    def gradients(
        self, params: Any, old: Any, reference: Any, batch: dict, entropy_coefficient: Array, axis: Any
    ) -> tuple[Any, dict]:
        """Gradient of the loss over the whole batch, and metrics as (sum, weight), both all-reduced.

        `params` and `old` are {"model", "head"}; `old` is None where they are the behaviour's own, `reference`
        where there is no KL.
        """
        record = adaptive.Record(**{name: batch[name] for name in RECORD})
        budget = self.policy.kind == "budget"
        valid, build = self._budget_calls(batch) if budget else self._policy_calls(record, batch)
        kept = batch["keep"]
        valid &= kept[:, None] > 0  # what is left out costs no network calls, and enters no mean
        free = self._free_decisions(record, batch)
        counts = (kept.sum(), batch["decision_keep"].sum(), free.sum().astype(jnp.float32))
        totals = surrogate.Normalisers(*axis.all_reduce(jnp.stack(counts)))
        zero = jnp.float32(0)

        def assemble(terms):
            return surrogate.policy_loss(
                terms, totals, kl_coefficient=self.kl_coefficient, entropy_coefficient=entropy_coefficient
            )

        def decision_loss(head):
            decision, entropy = self._decision_terms(head, old, record, batch, free)
            return assemble(surrogate.Terms(zero, decision, zero, entropy)), entropy

        def token_loss(model, pair, real):
            calls, floor = axis.split(build(pair, real))
            sums, error, drawn = token_terms(
                self.tokens, self.model, model, old and old["model"], reference, calls, axis
            )
            gap = jnp.abs(jnp.where(calls.committed, drawn, jnp.inf).min(-1) - floor)
            seen = (real & calls.committed.any(-1)).astype(jnp.float32)
            stats = {
                "kl": sums.kl,
                "clip": sums.clip,
                "moved": sums.moved,
                "entropy": sums.entropy,
                "gap": (jnp.where(seen > 0, gap, 0.0).sum(), seen.sum()),
            }
            return assemble(surrogate.Terms(sums.token, zero, sums.penalty, zero)), (stats, error)

        def part(pair, real):
            grads, (stats, error) = jax.grad(token_loss, has_aux=True)(params["model"], pair, real)
            return (grads, stats), error

        (model, stats), error = accumulate(part, valid, self.micro_batch * axis.size)
        head, head_entropy = jax.grad(decision_loss, has_aux=True)(params["head"])
        grads, stats, head_entropy = axis.all_reduce(({"model": model, "head": head}, stats, head_entropy))
        metrics = {} if reference is None else {"rl/kl": (stats["kl"], totals.survivors)}
        metrics |= {
            "rl/clip_frac": stats["clip"],
            "rl/approx_kl": stats["moved"],
            "rl/entropy": stats["entropy"],
            "rl/head_entropy": (head_entropy, totals.decisions),
            "rl/ratio_max_err": (axis.largest(error), jnp.float32(1)),
        }
        # A surrogate likelihood has no sampler to agree with.
        return grads, metrics if budget else metrics | {"rl/sampler_gap": stats["gap"]}

    def _policy_calls(self, record: adaptive.Record, batch: dict):
        """Pairs of `adaptive` and `fixed`: every call that a rollout made."""
        length, num_tokens = self.policy.max_calls, self.num_tokens
        call = jnp.arange(length)[None]
        first_call, end = self.scored_calls or (0, length)
        valid = (call < record.calls[:, None]) & (call >= first_call) & (call < end)

        def build(pair, real):
            row, call = pair // length, pair % length
            ids = record.ids[row]
            committed = (record.commit_step[row] == call[:, None]) & real[:, None]
            remasked = (record.commit_step[row] > call[:, None]) & real[:, None]
            if self.tokens.reads_draws:
                ids = record.predictions[row, call].astype(jnp.int32)
            weights = surrogate.term_weights(
                record.calls[row],
                num_tokens=num_tokens,
                max_calls=length,
                per_rollout_mean=self.per_rollout_mean,
            )
            keep = batch["keep"][row] * real
            first = call == 0
            exact = self.tokens.likelihood == "hard" and self.sampler.action == "stride"
            tick = record.tick[row, call]
            scored = jnp.clip(record.calls[row], first_call, end) - first_call
            kl_weight = surrogate.kl_weight(committed | remasked, scored) * real[:, None]
            calls = Calls(
                inputs=record.state_before(call, self.mask_id, row),
                timestep=jnp.asarray(self.sampler.clock.timestep)[tick],
                cond=jax.tree.map(lambda x: x[row], batch["cond"]),
                ids=ids,
                committed=committed,
                remasked=remasked,
                z_star=(record.log_floor if exact else record.z_star)[row, call],
                tau=jnp.asarray(self.sampler.clock.noise)[tick] * (self.sampler.action == "stride"),
                scale=adaptive.guidance_at(self.sampler, tick),
                advantage=batch["advantage"][row],
                token_weight=(keep * weights.token * jnp.where(first, self.first_call_tokens, 1.0))[:, None]
                * jnp.ones((1, num_tokens)),
                kl_weight=kl_weight,
                penalty_weight=kl_weight * jnp.where(first, self.first_call_kl, 1.0)[:, None],
            )
            return calls, record.log_floor[row, call]

        return valid, build

    def _budget_calls(self, batch: dict):
        """Pairs of `budget`: mask levels of the final image, the same for all rollouts of a prompt.

        This likelihood is not the behaviour's (specs/speed_rl.md 4.3): a surrogate, on the conditional
        branch of randomly masked images.
        """
        levels, num_tokens = self.policy.levels, self.num_tokens
        clock = self.sampler.clock
        keys_B = sample_keys(self.seed, MASKS, batch["round"][0], batch["prompt"])
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
            kl_weight = surrogate.budget_weight(masked, levels) * real[:, None]
            token_weight = surrogate.budget_weight(masked, levels) * (batch["keep"][row] * real)[:, None]
            timestep, cond = jnp.asarray(clock.timestep)[tick], jax.tree.map(lambda x: x[row], batch["cond"])
            of_row = (batch["ids"][row], masked, self.mask_id, timestep, cond, batch["advantage"][row])
            return masked_images(*of_row, token_weight, kl_weight), jnp.zeros(row.shape)

        return valid, build

    def _free_decisions(self, record: adaptive.Record, batch: dict) -> Array:
        """Which calls of which rollouts hold a decision that counts, bool [B,T]."""
        call = jnp.arange(self.policy.max_calls)[None]
        # The last call of the threshold action is forced: no decision, so no term.
        last = self.policy.max_calls - (self.sampler.action == "threshold")
        return (call < jnp.minimum(record.calls, last)[:, None]) & (batch["decision_keep"] > 0)[:, None]

    def _decision_terms(self, head: Any, old: Any, record: adaptive.Record, batch: dict, free: Array):
        """(clipped objective, entropy) of all decisions, summed."""
        if self.policy.kind != "adaptive":
            return jnp.float32(0), jnp.float32(0)
        rows, length = free.shape
        previous = jnp.pad(record.decision, ((0, 0), (1, 0)))[:, :-1]
        call = jnp.broadcast_to(jnp.arange(length)[None], free.shape)
        fields = (record.features, previous, record.decision, record.action, call)
        seen = [x.reshape(rows * length, *x.shape[2:]) for x in fields]
        logp, entropy = self.head.score(head, *seen)
        before = logp if old is None else self.head.score(old["head"], *seen)[0]
        weights = surrogate.term_weights(
            record.calls,
            num_tokens=self.num_tokens,
            max_calls=length,
            per_rollout_mean=self.per_rollout_mean,
        )
        weight = (batch["decision_keep"] * weights.decision)[:, None] * free
        total = surrogate.clipped_surrogate(
            logp,
            before,
            batch["decision_advantage"].repeat(length),
            weight.reshape(-1),
            low=self.tokens.clip_low,
            high=self.tokens.clip_high,
        )
        return total, jnp.where(free.reshape(-1), entropy, 0.0).sum()
