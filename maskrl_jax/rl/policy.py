"""Who decides how many calls a rollout makes: the three policies and the head (specs/speed_rl.md section 4)."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from maskrl_jax.models.stride_head import StrideHead, ThresholdHead
from maskrl_jax.rl import stride
from maskrl_jax.sampling import adaptive, observation
from maskrl_jax.sampling.clock import Clock

Array = jax.Array
POLICIES = ("adaptive", "fixed", "budget")


@dataclasses.dataclass(frozen=True)
class Policy:
    """How many calls a rollout makes and who decides (specs/speed_rl.md section 4)."""

    kind: str = "adaptive"
    action: str = "stride"  # adaptive: "stride" | "threshold"
    order: str = "confident"  # threshold: what is committed at least, the surest draws or the most "uncertain" places
    kappa: float = 0.88  # threshold: confidence at which the head starts
    kappa_std: float = 1.0  # threshold: spread of its logit
    ticks: int = 960
    max_calls: int = 16  # T_max
    noise: float = 2.0  # Gumbel scale at the start of the clock
    noise_schedule: str = "linear"  # of the Gumbel scale over the clock, or "compounded" (fixed: Mask-GRPO's)
    divisors: tuple[int, ...] = (16, 12, 10, 8, 6, 5, 4, 3, 2, 1)
    centre: float = 8.0
    width: float = 0.4
    stickiness: float = 4.0
    opening: int = 0  # first calls whose decisions start at the smallest stride and do not stick
    target_calls: int = 4  # fixed: T of every rollout
    step_set: tuple[int, ...] = (4, 6, 8, 12)  # budget: T of a group's rollouts, in equal shares
    levels: int = 4  # budget: mask levels scored per rollout
    temperature: float = 1.0
    guidance: float = 1.0
    guidance_schedule: str = "constant"
    timesteps: str = "clock"  # what the network is told, see `sampling.schedules.timesteps`

    def __post_init__(self):
        if self.kind not in POLICIES:
            raise ValueError(f"policy.kind {self.kind!r} is not one of {', '.join(POLICIES)}")
        object.__setattr__(self, "divisors", tuple(self.divisors))
        object.__setattr__(self, "step_set", tuple(self.step_set))
        if self.temperature <= 0 or self.noise < 0 or self.levels < 1:
            raise ValueError(
                f"policy.temperature {self.temperature} must be above 0, noise {self.noise} at least 0, "
                f"levels {self.levels} at least 1"
            )
        if self.noise_schedule not in ("linear", "compounded"):
            raise ValueError(f"policy.noise_schedule {self.noise_schedule!r} is not one of linear, compounded")
        if self.noise_schedule == "compounded" and self.kind != "fixed":
            raise ValueError("a compounded noise schedule needs one number of calls: policy.kind=fixed")
        if not 0 < self.kappa < 1 or self.kappa_std <= 0:
            raise ValueError(f"policy.kappa {self.kappa} must lie in (0, 1), kappa_std {self.kappa_std} above 0")
        if not 0 <= self.opening < self.max_calls:
            raise ValueError(f"policy.opening {self.opening} must lie in 0..{self.max_calls - 1} (max_calls - 1)")
        if self.kind == "adaptive" and self.action == "stride" and max(self.divisors) != self.max_calls:
            raise ValueError(
                f"the largest of policy.divisors ({max(self.divisors)}) must be max_calls ({self.max_calls}): "
                "it is the smallest stride, and bounds the number of calls"
            )

    @property
    def usual_setting(self) -> float:
        """What a rollout is asked for: dial 0 of a head, else the (fewest) steps that the policy is trained with."""
        return {"adaptive": 0.0, "fixed": self.target_calls, "budget": min(self.step_set)}[self.kind]

    def steps(self) -> tuple[int, ...]:
        """Step counts whose strides must fit the clock."""
        adaptive = self.divisors if self.action == "stride" else (self.max_calls,)
        return {"adaptive": adaptive, "fixed": (self.target_calls,), "budget": self.step_set}[self.kind]

    def sampler(self, num_tokens: int, *, keep_predictions: bool = False) -> adaptive.AdaptiveConfig:
        """The clocked sampler of these settings; ValueError where a T does not fit clock or grid."""
        compounded = self.target_calls if self.noise_schedule == "compounded" else 0
        clock = Clock(
            num_tokens,
            ticks=self.ticks,
            timesteps=self.timesteps,
            noise_scale=self.noise,
            compounded=compounded,
            calls=self.target_calls if self.kind == "fixed" else 0,
        )
        for steps in self.steps():
            clock.stride(steps)
        if max(self.steps()) > self.max_calls:
            raise ValueError(f"a policy of {max(self.steps())} calls exceeds max_calls {self.max_calls}")
        return adaptive.AdaptiveConfig(
            clock=clock,
            max_calls=self.max_calls,
            action=self.action if self.kind == "adaptive" else "stride",
            order=self.order,
            temperature=self.temperature,
            guidance=self.guidance,
            guidance_schedule=self.guidance_schedule,
            keep_predictions=keep_predictions,
        )


@dataclasses.dataclass(frozen=True)
class Head:
    """The head that decides, as functions of its parameters."""

    policy: Policy

    def module(self) -> StrideHead | ThresholdHead:
        """Linen module of the policy's action."""
        if self.policy.action == "threshold":
            return ThresholdHead(mean=math.log(self.policy.kappa / (1 - self.policy.kappa)), std=self.policy.kappa_std)
        policy = self.policy
        prior = stride.PriorConfig(policy.divisors, policy.centre, policy.width, policy.stickiness)
        bias = stride.prior_bias(prior)
        slowest = stride.prior_bias(dataclasses.replace(prior, centre=float(policy.max_calls)))
        opening = tuple(s - b for s, b in zip(slowest, bias, strict=True)) if policy.opening else ()
        return StrideHead(bias=bias, stickiness=prior.stickiness, opening=opening)

    def init(self, key: Array) -> Any:
        return self.module().init(key, jnp.zeros((1, observation.NUM_FEATURES)))

    def decide(self, params: Any, dial_B: Array):
        """Decision function of a rollout; a positive dial float32 [B] asks for fewer calls, 0 for the policy's."""
        policy, module = self.policy, self.module()

        def strides(state: adaptive.State) -> adaptive.Decision:
            bias_D = -jnp.log(jnp.asarray(policy.divisors, jnp.float32))
            logits = self.logits(params, state.features, state.previous, state.call)
            logits = logits + dial_B[:, None] * bias_D[None]
            index = jax.vmap(jax.random.categorical)(state.keys, logits).astype(jnp.int32)
            jump = jnp.asarray(stride.jumps(policy.divisors, policy.ticks))[index]
            return adaptive.Decision(index, jnp.zeros(index.shape), jump)

        def thresholds(state: adaptive.State) -> adaptive.Decision:
            mean, std = module.apply(params, state.features)
            noise = jax.vmap(lambda key: jax.random.normal(key, ()))(state.keys)
            zero = jnp.zeros(mean.shape, jnp.int32)
            jump = zero + policy.ticks // policy.max_calls
            return adaptive.Decision(zero, mean + std * noise - dial_B, jump)

        return thresholds if policy.action == "threshold" else strides

    def logits(self, params: Any, features: Array, previous: Array, call: Array) -> Array:
        """Logits [M,D] of the strides; decisions stick from the second call after the opening on."""
        out, opening, eta = self.module().apply(params, features)
        out += jnp.where(call[:, None] < self.policy.opening, opening, 0.0)
        return stride.decision_logits(out, previous, eta, call <= self.policy.opening)

    def score(self, params: Any, features: Array, previous: Array, decision: Array, action: Array, call: Array):
        """(log-prob [M], entropy [M]) of recorded decisions."""
        if self.policy.action == "threshold":
            mean, std = self.module().apply(params, features)
            return stride.threshold_logp(action, mean, std), stride.threshold_entropy(std)
        logits = self.logits(params, features, previous, call)
        return stride.decision_logp(logits, decision), stride.decision_entropy(logits)
