"""From qualities and calls to advantages: gate, speed reward, both filters (specs/speed_rl.md 4.5 and 5.1)."""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp

from maskrl_jax.rl import advantages, speed_reward

Array = jax.Array
LOW_QUALITY = ("drop", "clip", "off")
GATES = ("hard", "soft", "off")
LAMBDAS = ("schedule", "dual", "off")


@dataclasses.dataclass(frozen=True)
class CreditConfig:
    """Static settings; all values are our choice unless the spec marks them published."""

    max_calls: int
    min_calls: int = 4
    speed: str = "schedule"  # "off": lambda = 0 (policy `fixed`)
    lambda_value: float = 1.0
    lambda_zero_until: int = 50
    lambda_full_at: int = 250
    gate: str = "hard"
    gate_margin: float = 0.5
    low_quality: str = "drop"  # F2
    low_quality_factor: float = 3.0
    percentile: float = 10.0  # F1, published; 0 switches it off
    history: int = 1000
    history_min: int = 64
    down_sample: int = 0  # rollouts of a group that are updated, those whose rewards vary most; 0: all
    std_of_quality: bool = False  # F1's statistic: std of R, or of r_q (policy `budget`)

    def __post_init__(self):
        if self.speed not in LAMBDAS:
            raise ValueError(f"speed {self.speed!r} is not one of {', '.join(LAMBDAS)}")
        if self.low_quality not in LOW_QUALITY:
            raise ValueError(f"low_quality {self.low_quality!r} is not one of {', '.join(LOW_QUALITY)}")
        if self.gate not in GATES:
            raise ValueError(f"gate {self.gate!r} is not one of {', '.join(GATES)}")
        if not 0 < self.min_calls < self.max_calls:
            raise ValueError(f"min_calls {self.min_calls} must lie between 0 and max_calls {self.max_calls}")
        if not 0 <= self.percentile <= 100:
            raise ValueError(f"percentile {self.percentile} must lie in [0, 100]")
        if self.down_sample < 0 or self.down_sample == 1:
            raise ValueError(f"down_sample {self.down_sample} must be 0 (all) or at least 2")
        if not 0 <= self.lambda_zero_until <= self.lambda_full_at:
            raise ValueError(
                f"lambda_full_at {self.lambda_full_at} is before lambda_zero_until {self.lambda_zero_until}"
            )

    @property
    def reads_reference(self) -> bool:
        """Whether anything depends on the base's quality: the gate, F2 or the dual rule."""
        return self.speed == "dual" or self.gate != "off" or self.low_quality != "off"


class CreditState(flax.struct.PyTreeNode):
    """What the filters and the reward remember between updates."""

    history: advantages.History
    sigma: Array  # sigma_w, float32 []; 0 before the first batch, at its floor before the first with a spread
    weight: Array  # lambda of the dual rule, float32 []


class Credit(flax.struct.PyTreeNode):
    """Outcome for a batch of P groups of G rollouts. All is finite; reward and gate say nothing where not `scored`."""

    advantage: Array  # float32 [P,G], of the rollouts whose tokens are updated
    keep: Array  # float32 [P,G], omega: 0 for rollouts dropped or left out, and for rejected groups
    decision_advantage: Array  # float32 [P,G], among all that were not dropped: decisions cost no network calls
    decision_keep: Array  # float32 [P,G], omega of the decisions
    reward: Array  # float32 [P,G], R
    speed: Array  # float32 [P,G], r_s
    gate: Array  # float32 [P,G]
    rejected: Array  # bool [P]
    dropped: Array  # bool [P,G], by F2
    std: Array  # float32 [P], F1's statistic
    quality_std: Array  # float32 [P]
    scored: Array  # bool [P], groups without a failed score
    speed_weight: Array  # float32 [], lambda


def create(config: CreditConfig) -> CreditState:
    """Empty memory."""
    return CreditState(
        history=advantages.history_create(config.history),
        sigma=jnp.zeros((), jnp.float32),
        weight=jnp.full((), config.lambda_value, jnp.float32),
    )


def assign(
    config: CreditConfig,
    state: CreditState,
    step: Array,
    quality_PG: Array,
    calls_PG: Array,
    reference_P1: Array,
    bonus_PG: Array | float = 0.0,
) -> Credit:
    """Rewards, filters and advantages of a batch; the memory is only read (see `remember`).

    R = (r_q + bonus) / sigma_w + lambda g r_s, without a speed reward r_q + bonus; the gate and F2 judge r_q
    alone. A score that is not finite has failed and drops its group: it is rejected and enters no memory. A group
    is rejected (weight 0), too, where F1's std is below the percentile of the history, or fewer than half survive F2.
    """
    scored_P1 = jnp.isfinite(quality_PG + bonus_PG).all(1, keepdims=True)
    quality_PG = jnp.where(scored_P1, quality_PG, 0.0)  # selected before any arithmetic: 0 * NaN is NaN
    quality_std = advantages.group_std(quality_PG, scored_P1 & jnp.ones(quality_PG.shape, bool))
    first = speed_reward.update_sigma(state.sigma, quality_std, scored_P1[:, 0])
    sigma = jnp.where(state.sigma > speed_reward.SIGMA_FLOOR, state.sigma, first)
    floor_args = (quality_PG, reference_P1, sigma, config.low_quality_factor)
    dropped = jnp.zeros(quality_PG.shape, bool)
    if config.low_quality == "drop":
        dropped = scored_P1 & ~advantages.low_quality_mask(*floor_args)
    elif config.low_quality == "clip":
        quality_PG = advantages.clip_low_quality(*floor_args)
    keep = scored_P1 & ~dropped
    gate = speed_reward.quality_gate(quality_PG, reference_P1, sigma, kind=config.gate, margin=config.gate_margin)
    speed = speed_reward.speed_reward(calls_PG, config.max_calls, config.min_calls)
    weight = _speed_weight(config, state, step)
    paid_PG = jnp.where(scored_P1, quality_PG + bonus_PG, 0.0)
    reward = paid_PG  # in its own units where nothing is weighed against it
    if config.speed != "off":
        reward = speed_reward.total_reward(paid_PG, sigma, speed, gate, weight)
    std = quality_std if config.std_of_quality else advantages.group_std(reward, keep)
    rejected = ~advantages.enough_survivors(keep)
    if config.percentile > 0:
        threshold = advantages.history_threshold(state.history, config.percentile, config.history_min)
        rejected |= std < threshold
    rejected |= std == 0  # nothing to learn from, with or without a history
    updated = advantages.max_variance_subset(reward, keep, config.down_sample) if config.down_sample else keep
    return Credit(
        advantage=advantages.group_advantage(reward, updated),
        keep=(updated & ~rejected[:, None]).astype(jnp.float32),
        decision_advantage=advantages.group_advantage(reward, keep),
        decision_keep=(keep & ~rejected[:, None]).astype(jnp.float32),
        reward=reward,
        speed=speed,
        gate=gate,
        rejected=rejected,
        dropped=dropped,
        std=std,
        quality_std=quality_std,
        scored=scored_P1[:, 0],
        speed_weight=weight,
    )


def _speed_weight(config: CreditConfig, state: CreditState, step: Array) -> Array:
    """Lambda of this update."""
    if config.speed == "off":
        return jnp.zeros((), jnp.float32)
    if config.speed == "dual":
        return jnp.where(step < config.lambda_zero_until, 0.0, state.weight)
    return speed_reward.lambda_schedule(
        step, zero_until=config.lambda_zero_until, full_at=config.lambda_full_at, value=config.lambda_value
    )


def record(state: CreditState, credit: Credit) -> CreditState:
    """Add the scored groups to the history, rejected ones too: else the threshold ratchets up."""
    return state.replace(history=advantages.history_push(state.history, credit.std, credit.scored))


def remember(
    config: CreditConfig,
    state: CreditState,
    credit: Credit,
    quality_PG: Array,
    reference_P1: Array,
    step: Array,
) -> CreditState:
    """Record a batch and move what is averaged over updates: sigma_w, and lambda of the dual rule."""
    weight = state.weight
    sigma = speed_reward.update_sigma(state.sigma, credit.quality_std, credit.scored)
    if config.speed == "dual":
        moved = speed_reward.dual_lambda(weight, quality_PG, reference_P1, sigma, credit.scored)
        weight = jnp.where(step < config.lambda_zero_until, weight, moved)
    return record(state, credit).replace(sigma=sigma, weight=weight)
