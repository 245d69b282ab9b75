"""The clocked decode loop: every call decides how far to advance, and the loop ends when all are done."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from maskrl_jax.sampling import draws, observation, schedules
from maskrl_jax.sampling.clock import Clock, next_masked

Array = jax.Array
ACTIONS = ("stride", "threshold")
ORDERS = ("confident", "uncertain")
MOST_CALLS = 255  # commit steps are uint8


@dataclasses.dataclass(frozen=True)
class AdaptiveConfig:
    """Static settings of a clocked sampler (specs/speed_rl.md section 4; our choice)."""

    clock: Clock
    max_calls: int  # T_max
    action: str = "stride"
    order: str = "confident"  # threshold: it commits at least the surest draws, or the most uncertain places
    temperature: float = 1.0
    guidance: float = 1.0
    guidance_schedule: str = "constant"
    keep_predictions: bool = False  # record what every call drew, also where it was masked again

    def __post_init__(self):
        if self.action not in ACTIONS:
            raise ValueError(f"action {self.action!r} is not one of {', '.join(ACTIONS)}")
        if self.order not in ORDERS:
            raise ValueError(f"order {self.order!r} is not one of {', '.join(ORDERS)}")
        if not 1 <= self.max_calls <= MOST_CALLS:
            raise ValueError(f"max_calls {self.max_calls} must lie in 1..{MOST_CALLS}, what a commit step can count")
        schedules.guidance_table(self.guidance_schedule, self.guidance, np.zeros(1))  # raises for an unknown one
        self.clock.stride(self.max_calls)  # raises unless T_max divides the clock


class State(NamedTuple):
    """What a decision may depend on."""

    features: Array  # float32 [B,F]
    previous: Array  # int32 [B], the decision before
    call: Array  # int32 [B], k, calls made so far
    keys: Array  # typed keys [B] of this call, for drawing the decision


class Decision(NamedTuple):
    """How far a call goes."""

    index: Array  # int32 [B], which stride (0 where strides are given)
    action: Array  # float32 [B], a of the threshold action (0 otherwise)
    jump: Array  # int32 [B], ticks


class Record(flax.struct.PyTreeNode):
    """A rollout, enough to rebuild every state; logits are never kept.

    Before call k: x_k = where(commit_step < k, ids, MASK). Entries of calls beyond `calls` are 0.
    """

    ids: Array  # int32 [B,N]
    commit_step: Array  # uint8 [B,N]
    calls: Array  # int32 [B], T
    tick: Array  # int32 [B,T_max]
    decision: Array  # int32 [B,T_max]
    action: Array  # float32 [B,T_max]
    z_star: Array  # float32 [B,T_max], lowest committed z (stride) or log c* (threshold)
    log_floor: Array  # float32 [B,T_max], lowest committed log-probability (likelihood `hard`)
    features: Array  # float32 [B,T_max,F]
    predictions: Array  # uint16 [B,T_max,N] where kept, else [B,0,N]

    def state_before(self, call_M: Array, mask_id: int, row_M: Array | slice = slice(None)) -> Array:
        """Token grids that calls k saw, int32 [M,N], of the rollouts `row_M` (by default of all)."""
        return jnp.where(self.commit_step[row_M] < call_M[:, None], self.ids[row_M], mask_id)


def given_strides(jump_B: Array) -> Callable[[State], Decision]:
    """Decide the same jump at every call: a constant stride C/T is the cosine sampler of T steps.

    With constant guidance; a ramp follows the clock here, while that of a plan reaches its scale at the last call.
    """

    def decide(state: State) -> Decision:
        zero = jnp.zeros_like(state.previous)
        return Decision(zero, zero.astype(jnp.float32), jump_B)

    return decide


def rollout(
    logits_fn: draws.LogitsFn,
    decide: Callable[[State], Decision],
    keys_B: Array,
    cond: Any,
    null_cond: Any,
    config: AdaptiveConfig,
    num_tokens: int,
    mask_id: int,
    *,
    early_stop: bool = True,
) -> Record:
    """Sample B images, each with its own number of calls of at most T_max.

    `early_stop` ends the loop with the slowest sample (a while loop); without it the loop always runs
    T_max calls (a scan) and gives the same result bit for bit.
    """
    chex.assert_rank(keys_B, 1)
    batch = keys_B.shape[0]
    empty = _empty_record(batch, num_tokens, config)
    carry = (jnp.int32(0), jnp.full((batch, num_tokens), mask_id, jnp.int32), jnp.zeros((batch,), jnp.int32), empty)

    def body(carry):
        return _call(carry, logits_fn, decide, keys_B, cond, null_cond, config, mask_id)

    def running(carry):
        call, ids_BN, *_ = carry
        return (call < config.max_calls) & (ids_BN == mask_id).any()

    if early_stop:
        *_, record = jax.lax.while_loop(running, body, carry)
    else:
        *_, record = jax.lax.fori_loop(0, config.max_calls, lambda _, c: body(c), carry)
    return record


def _call(carry, logits_fn, decide, keys_B, cond, null_cond, config, mask_id):
    """One network call of every sample; samples that are done keep their tokens and write nothing."""
    call, ids_BN, tick_B, record = carry
    clock, call_B = config.clock, jnp.full_like(tick_B, call)
    masked_BN = ids_BN == mask_id
    left_B = masked_BN.sum(-1)
    active_B = left_B > 0
    logp_BNK = guided_logp(logits_fn, ids_BN, tick_B, cond, null_cond, config)
    features_BF = observation.features(
        logp_BNK, masked_BN, tick_B, call_B, ticks=clock.ticks, max_calls=config.max_calls
    )
    previous_B = record.decision[:, jnp.maximum(call - 1, 0)]
    decision_keys = draws.step_keys(keys_B, call, draws.DECISION)
    decision = decide(State(features_BF, previous_B, call_B, decision_keys))
    next_B = jnp.minimum(tick_B + decision.jump, clock.ticks)
    drawn_BN, confidence_BN = draws.draw_tokens(draws.step_keys(keys_B, call, draws.TOKENS), logp_BNK)
    target_B = next_masked(clock, next_B, left_B)
    noise_BN = jnp.asarray(clock.noise)[tick_B][:, None] * draws.gumbel(
        draws.step_keys(keys_B, call, draws.NOISE), ids_BN.shape[1]
    )
    if config.action == "threshold":
        last_B = jnp.full(active_B.shape, call == config.max_calls - 1)
        rule = (masked_BN, jax.nn.log_sigmoid(decision.action), left_B - target_B, last_B)
        if config.order == "confident":
            commit, z_star_B = draws.threshold_commit(confidence_BN, *rule)
        else:
            commit, z_star_B = draws.frontier_commit(confidence_BN, draws.entropy(logp_BNK) + noise_BN, *rule)
    else:
        z_BN = confidence_BN + noise_BN
        commit = draws.commit_top(z_BN, masked_BN, left_B - target_B)
        z_star_B = jnp.where(commit, z_BN, jnp.inf).min(-1)

    def write(buffer, value):
        keep = active_B.reshape(-1, *[1] * (value.ndim - 1))
        return buffer.at[:, call].set(jnp.where(keep, value, jnp.zeros_like(value)))

    record = record.replace(
        ids=jnp.where(commit, drawn_BN, record.ids),
        commit_step=jnp.where(commit, call.astype(jnp.uint8), record.commit_step),
        calls=record.calls + active_B,
        tick=write(record.tick, tick_B),
        decision=write(record.decision, decision.index),
        action=write(record.action, decision.action),
        z_star=write(record.z_star, z_star_B),
        log_floor=write(record.log_floor, jnp.where(commit, confidence_BN, jnp.inf).min(-1)),
        features=write(record.features, features_BF),
        predictions=write(record.predictions, drawn_BN.astype(jnp.uint16))
        if config.keep_predictions
        else record.predictions,
    )
    return call + 1, jnp.where(commit, drawn_BN, ids_BN), next_B, record


def guided_logp(logits_fn, ids_BN, tick_B, cond, null_cond, config: AdaptiveConfig) -> Array:
    """Log-probabilities [B,N,K] that tokens are drawn from: guided and tempered."""
    clock = config.clock
    timestep_B = jnp.asarray(clock.timestep)[tick_B]
    if config.guidance == 1.0:
        logits = logits_fn(ids_BN, timestep_B, cond)
    else:
        logits = draws.guided(logits_fn, null_cond)(ids_BN, timestep_B, cond, guidance_at(config, tick_B))
    return draws.log_probabilities(logits / config.temperature)


def guidance_at(config: AdaptiveConfig, tick_B: Array) -> Array:
    """Guidance scale at a tick, float32 [B]."""
    progress = np.arange(config.clock.ticks + 1) / config.clock.ticks
    table = schedules.guidance_table(config.guidance_schedule, config.guidance, progress)
    return jnp.asarray(table)[tick_B]


def _empty_record(batch: int, num_tokens: int, config: AdaptiveConfig) -> Record:
    """Zeros of a record's shapes, each its own array."""
    per_call = (batch, config.max_calls)
    return Record(
        ids=jnp.zeros((batch, num_tokens), jnp.int32),
        commit_step=jnp.zeros((batch, num_tokens), jnp.uint8),
        calls=jnp.zeros((batch,), jnp.int32),
        tick=jnp.zeros(per_call, jnp.int32),
        decision=jnp.zeros(per_call, jnp.int32),
        action=jnp.zeros(per_call, jnp.float32),
        z_star=jnp.zeros(per_call, jnp.float32),
        log_floor=jnp.zeros(per_call, jnp.float32),
        features=jnp.zeros((*per_call, observation.NUM_FEATURES), jnp.float32),
        predictions=jnp.zeros((batch, config.max_calls * config.keep_predictions, num_tokens), jnp.uint16),
    )
