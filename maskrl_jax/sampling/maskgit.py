"""The fixed-plan decode loop: confidence, Halton, random order, and the training-free threshold."""

import dataclasses
from collections.abc import Callable
from typing import Any

import chex
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from maskrl_jax.sampling import draws, schedules

Array = jax.Array
MODES = ("confidence", "halton", "random", "threshold", "uncertain", "entropy")
NOISY = ("confidence", "uncertain")
ORDERED = ("halton", "random")  # a sample's order is drawn once, from its key
NOISE_ENDS = ("after", "at", "ahead")
OPEN_ENDED = ("threshold", "uncertain", "entropy")  # may commit more than the plan's counts
GIVEN = 255  # commit step of tokens that were given, not sampled


@dataclasses.dataclass(frozen=True)
class SamplerConfig:
    """What a user sets. `max_steps` fixes the table length: one program serves every num_steps up to it."""

    mode: str = "confidence"
    num_steps: int = 16
    max_steps: int = 16
    schedule: str = "cosine"
    gumbel: float = 4.5  # modes confidence, uncertain: noise scale at the first step; linear from there
    last_gumbel: float = 0.0  # noise scale at the end
    # The end is `after` the last step, s/T, or at it: `at`, s/(T-1), as in sampler A; `ahead`, (s+1)/T, as in sampler B.
    noise_ends: str = "after"
    temperature: float = 1.0  # divides the logits before the draw
    factors: tuple[float, float] = (1.0, 1.0)  # multiply them, at the first and the last step, as in sampler C
    factor_power: float = 1.0
    factor_warmup: int = 0  # steps at which the factor is halved
    entropy_filtering: bool = False  # divides them by `draws.entropy_temperature` besides, as in MaskFocus' scheduler
    plain_confidence: bool = False  # confidences are read from the logits before all of that, as in Lumina-DiMOO
    timesteps: str = "clock"  # what the network is told of where it is, see `schedules.timesteps`
    randomize: bool = True  # mode halton: every sample begins elsewhere in the order
    guidance: float = 1.0  # 1 = no guidance
    guidance_schedule: str = "constant"
    threshold: float = 0.9  # modes threshold, uncertain: commit at probability >= this; entropy: at nats <= this

    def __post_init__(self):
        if self.mode not in MODES:
            raise ValueError(f"sampler mode {self.mode!r} is not one of {', '.join(MODES)}")
        if not 1 <= self.num_steps <= self.max_steps < GIVEN:
            raise ValueError(f"num_steps {self.num_steps} must lie in 1..max_steps ({self.max_steps}), below {GIVEN}")
        if self.noise_ends not in NOISE_ENDS:
            raise ValueError(f"noise_ends {self.noise_ends!r} is not one of {', '.join(NOISE_ENDS)}")
        schedules.timesteps(self.timesteps, np.zeros(1), 1, 1)  # raises for an unknown one
        if self.temperature <= 0:
            raise ValueError(f"temperature {self.temperature} must be positive")
        object.__setattr__(self, "factors", tuple(self.factors))
        if len(self.factors) != 2 or min(self.factors) <= 0:
            raise ValueError(f"factors {self.factors} on the logits must be two positive numbers")
        if self.factor_power < 0 or self.factor_warmup < 0:
            raise ValueError(f"factor_power {self.factor_power} and factor_warmup {self.factor_warmup} are at least 0")
        for name in ("gumbel", "last_gumbel"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} {getattr(self, name)} is a noise scale; it must be at least 0")
        if self.mode in ("threshold", "uncertain") and not 0 < self.threshold <= 1:
            raise ValueError(f"threshold {self.threshold} of mode {self.mode} is a probability; it must lie in (0, 1]")
        if self.mode == "entropy" and self.threshold < 0:
            raise ValueError(f"threshold {self.threshold} of mode entropy is in nats; it must be at least 0")


class Plan(flax.struct.PyTreeNode):
    """Host-made constants of one sampler; leaves are traced, so changing them compiles nothing."""

    num_steps: Array  # int32 []
    masked_after: Array  # int32 [S], tokens left masked after each step of an empty grid
    noise: Array  # float32 [S]
    guidance: Array  # float32 [S]
    timestep: Array  # int32 [S], float32 as a mask ratio, down to 0
    order: Array  # int32 [N], rank of every position (Halton)
    temperature: Array  # float32 [S], divides the logits
    threshold: Array  # float32 []
    mode: str = flax.struct.field(pytree_node=False)
    guide: bool = flax.struct.field(pytree_node=False)
    filtered: bool = flax.struct.field(pytree_node=False, default=False)
    roll: bool = flax.struct.field(pytree_node=False, default=True)  # whether a sample rolls the order
    least: int = flax.struct.field(pytree_node=False, default=1)  # tokens that a step commits whatever its count says
    plain_confidence: bool = flax.struct.field(pytree_node=False, default=False)
    # Tokens left masked after each step by how many were at the start, int32 [S,N+1]; None: in proportion.
    left: Array | None = None


class Rollout(flax.struct.PyTreeNode):
    """What a decode returns."""

    ids: Array  # int32 [B,N], no MASK left
    commit_step: Array  # uint8 [B,N], the call that committed each token; GIVEN where it was given
    calls: Array  # int32 [B], network calls the sample needed (guidance doubles the batch, not this)


class Carry(flax.struct.PyTreeNode):
    """The decode loop between two steps."""

    step: Array  # int32 []
    ids: Array  # int32 [B,N]
    commit_step: Array  # uint8 [B,N], GIVEN where not committed yet
    calls: Array  # int32 [B]
    memory: Any  # of the prediction


# (memory, step, ids [B,N], commit_step [B,N]) -> (logits [B,N,K], memory, whether the full network ran, bool [])
Predict = Callable[[Any, Array, Array, Array], tuple[Array, Any, Array]]


def make_plan(config: SamplerConfig, num_tokens: int) -> Plan:
    """Tables of a sampler for N tokens, padded to `max_steps`. Raises ValueError when T > N."""
    steps = config.num_steps
    progress = np.arange(steps) / steps
    left = schedules.masked_after(config.schedule, num_tokens, steps)
    last = np.arange(steps) / max(steps - 1, 1)
    side = round(num_tokens**0.5)

    def pad(table, dtype, mode="constant"):
        table = np.asarray(table, dtype)
        return np.pad(table, [(0, config.max_steps - steps), *[(0, 0)] * (table.ndim - 1)], mode)

    shares = config.schedule.removeprefix("shares-")
    ends = {"after": progress, "at": last, "ahead": np.arange(1, steps + 1) / steps}[config.noise_ends]
    factors = schedules.factor_table(config.factors, config.factor_power, config.factor_warmup, steps)
    order = schedules.halton_order(side) if config.mode == "halton" else np.arange(num_tokens)
    noise = (config.gumbel * (1 - ends) + config.last_gumbel * ends) * (config.mode in NOISY)
    timestep = schedules.timesteps(config.timesteps, np.arange(steps), steps, steps)
    return Plan(
        num_steps=np.int32(steps),
        masked_after=pad(left, np.int32),
        noise=pad(noise, np.float32),
        guidance=pad(schedules.guidance_table(config.guidance_schedule, config.guidance, last), np.float32),
        timestep=pad(timestep, timestep.dtype),
        order=np.argsort(order).astype(np.int32),
        temperature=pad(np.float32(config.temperature) / factors, np.float32, "edge"),
        threshold=np.float32(config.threshold),
        mode=config.mode,
        guide=config.guidance != 1.0,
        filtered=config.entropy_filtering,
        roll=config.randomize,
        least=int(config.schedule not in schedules.IDLE),
        plain_confidence=config.plain_confidence,
        left=None if shares == config.schedule else pad(schedules.shares_left(shares, num_tokens, steps), np.int32),
    )


def decode(
    logits_fn: draws.LogitsFn,
    keys_B: Array,
    cond: Any,
    null_cond: Any,
    plan: Plan,
    given_BN: Array,
    mask_id: int,
    first_step: int = 0,
) -> Rollout:
    """Fill every MASK of `given_BN` int32 [B,N]; tokens that are not MASK never change (inpainting).

    A while loop: it stops after the plan's steps, or when no sample has a masked token left, which is
    how the threshold modes save calls. Given tokens shrink every step's share in proportion. `first_step` leaves out
    steps before it: an editor that keeps much of a picture begins where that much would be known.
    Published: order by confidence with Gumbel noise (arXiv 2202.04200), Halton order (arXiv 2503.17076). Our choice:
    the noise of step s is scale (1 - s/T) unless `noise_ends` asks for the published law of sampler A or B, the former
    also Meissonic's (`convert.meissonic.sampler_of` gives its settings); threshold, entropy and uncertain, with the
    plan's counts as the least to commit.
    `uncertain` spends those on the places of highest entropy: what is settled there makes the rest certain, where the
    surest tokens tell nothing new.
    """
    batch, plan = len(given_BN), jax.tree.map(jnp.asarray, plan)
    branch = draws.guided(logits_fn, null_cond) if plan.guide else lambda ids, t, c, _: logits_fn(ids, t, c)

    def predict(memory, step, ids_BN, _):
        timestep_B, scale_B = (jnp.full((batch,), table[step]) for table in (plan.timestep, plan.guidance))
        return branch(ids_BN, timestep_B, cond, scale_B), memory, jnp.bool_(True)

    return fill(predict, (), keys_B, plan, given_BN, mask_id, first_step)[0]


def fill(
    predict: Predict, memory: Any, keys_B: Array, plan: Plan, given_BN: Array, mask_id: int, first_step: int = 0
) -> tuple[Rollout, Any]:
    """Run the loop of `decode` with logits from wherever `predict` takes them; returns its last memory besides."""
    chex.assert_rank([given_BN, keys_B], [2, 1])
    plan = jax.tree.map(jnp.asarray, plan)
    start_B = (given_BN == mask_id).sum(-1)

    def running(carry):
        return (carry.step < plan.num_steps) & (carry.ids == mask_id).any()

    def body(carry):
        return call(predict, keys_B, plan, start_B, mask_id, carry)

    carry = jax.lax.while_loop(running, body, begin(given_BN, memory).replace(step=jnp.int32(first_step)))
    return finish(carry), carry.memory


def begin(given_BN: Array, memory: Any) -> Carry:
    """The loop before its first step."""
    zero_B = jnp.zeros((len(given_BN),), jnp.int32)
    return Carry(jnp.int32(0), given_BN, jnp.full(given_BN.shape, GIVEN, jnp.uint8), zero_B, memory)


def finish(carry: Carry) -> Rollout:
    """What the loop has made."""
    return Rollout(ids=carry.ids, commit_step=carry.commit_step, calls=carry.calls)


def call(predict: Predict, keys_B: Array, plan: Plan, start_B: Array, mask_id: int, carry: Carry) -> Carry:
    """One step: predict, draw a token everywhere, commit the plan's count; `start_B` [B] were masked at the start."""
    step, ids_BN = carry.step, carry.ids
    masked_BN = ids_BN == mask_id
    logits, memory, is_full = predict(carry.memory, step, ids_BN, carry.commit_step)
    logp_BNK = tempered(plan, step, logits)
    drawn_BN, confidence_BN = draws.draw_tokens(draws.step_keys(keys_B, step, draws.TOKENS), logp_BNK)
    if plan.plain_confidence:
        plain_BNK = draws.log_probabilities(logits)
        confidence_BN = jnp.take_along_axis(plain_BNK, drawn_BN[..., None], axis=-1)[..., 0]
    left_B = masked_BN.sum(-1)
    target_B = _target(plan, step, start_B, left_B, ids_BN.shape[1])
    priority_BN = _priority(plan, keys_B, step, confidence_BN, logp_BNK)
    sure_BN, level_B = _sureness(plan, confidence_BN, logp_BNK)
    never = jnp.zeros(left_B.shape, bool)  # the plan's last count commits all
    commit, _ = draws.frontier_commit(sure_BN, priority_BN, masked_BN, level_B, left_B - target_B, never)
    return Carry(
        step=step + 1,
        ids=jnp.where(commit, drawn_BN, ids_BN),
        commit_step=jnp.where(commit, step.astype(jnp.uint8), carry.commit_step),
        calls=carry.calls + ((left_B > 0) & is_full),
        memory=memory,
    )


def _target(plan: Plan, step: Array, start_B: Array, left_B: Array, num_tokens: int) -> Array:
    """How many tokens stay masked after a step, int32 [B], of `start_B` at the start and `left_B` now."""
    most_B = jnp.maximum(left_B - plan.least, 0)
    if plan.left is None:
        return jnp.minimum(plan.masked_after[step] * start_B // num_tokens, most_B)
    # Sampler B keeps one masked, and draws it anew, until the last step.
    wanted_B = plan.left[step, start_B]
    return jnp.maximum(jnp.minimum(wanted_B, most_B), jnp.minimum(wanted_B, jnp.minimum(left_B, 1)))


def tempered(plan: Plan, step: Array, logits: Array) -> Array:
    """Log-probabilities [B,N,K] that a step's tokens are drawn from and judged by."""
    logp_BNK = draws.log_probabilities(logits / plan.temperature[step])
    if plan.filtered:
        logp_BNK = draws.log_probabilities(logp_BNK / draws.entropy_temperature(draws.entropy(logp_BNK))[..., None])
    return logp_BNK


def _priority(plan: Plan, keys_B: Array, step: Array, confidence_BN: Array, logp_BNK: Array) -> Array:
    """Order in which masked positions are committed, [B,N] float32, highest first."""
    num_tokens = confidence_BN.shape[1]
    if plan.mode == "halton" and not plan.roll:
        return jnp.broadcast_to(-plan.order.astype(jnp.float32)[None], confidence_BN.shape)
    if plan.mode == "halton":
        # Every sample rolls the list by its own offset (`randomize` of the published sampler).
        roll = jax.vmap(lambda key: jax.random.randint(key, (1,), 0, num_tokens))(
            draws.step_keys(keys_B, 0, draws.ORDER)
        )
        return -((plan.order[None] + roll) % num_tokens).astype(jnp.float32)
    if plan.mode == "random":
        return draws.gumbel(draws.step_keys(keys_B, 0, draws.ORDER), num_tokens)
    if plan.mode == "entropy":
        return -draws.entropy(logp_BNK)
    noise = plan.noise[step] * draws.gumbel(draws.step_keys(keys_B, step, draws.NOISE), num_tokens)
    return (draws.entropy(logp_BNK) if plan.mode == "uncertain" else confidence_BN) + noise


def _sureness(plan: Plan, confidence_BN: Array, logp_BNK: Array) -> tuple[Array, Array]:
    """How sure every position is [B,N], and from which level [B] on it is committed beyond the plan's count."""
    sure_BN, level = confidence_BN, jnp.inf  # most modes: never
    if plan.mode in ("threshold", "uncertain"):
        level = jnp.log(plan.threshold)
    if plan.mode == "entropy":
        sure_BN, level = -draws.entropy(logp_BNK), -plan.threshold
    return sure_BN, jnp.full(confidence_BN.shape[:1], level, jnp.float32)
