"""Policy gradient for tokens that one call draws, where a reward has no gradient (specs/marval.md section 10; ours).

What a student draws has no density given what it sees. Given its noise zeta as well it is mu, and an action is mu plus
normal noise of a small deviation, which has one. Axes: [..., C] tokens.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class ActionNoise:
    """The policy and its loss.

    deviation: sigma_a of the noise that is added to a token; samples are drawn without it when training is over.
    group: G rollouts of a prompt, whose rewards are compared.
    clip: of the likelihood ratio, 1 +- clip; 0 clips nothing.
    kl: weight of the divergence from the student as it was.
    iterations: S of a rollout's iterations that an update looks at, drawn anew for each; 0 for all.
    updates: of each batch of rollouts.
    """

    deviation: float = 0.1
    group: int = 8
    clip: float = 0.2
    kl: float = 0.01
    iterations: int = 0
    updates: int = 1

    @property
    def clip_range(self) -> tuple[float, float]:
        """How far below and above 1 a ratio counts."""
        return (self.clip, self.clip) if self.clip else (1.0, math.inf)

    def __post_init__(self):
        if self.deviation <= 0:
            raise ValueError(f"policy.deviation {self.deviation} must be above 0")
        if not 0 <= self.clip < 1 or self.kl < 0:
            raise ValueError(f"policy.clip {self.clip} must be in [0, 1) and kl {self.kl} at least 0")
        if self.group < 2 or self.updates < 1 or self.iterations < 0:
            raise ValueError("policy.group must be at least 2, updates at least 1 and iterations at least 0")


def log_densities(settings: ActionNoise, mean: Array, action: Array, noise: Array) -> tuple[Array, Array]:
    """(now, when they were drawn as mean + deviation * noise) log densities [...] of actions, but for one constant."""
    now = -jnp.square(action - mean).sum(-1) / (2 * settings.deviation**2)
    return now, -jnp.square(noise).sum(-1) / 2


def divergence(settings: ActionNoise, mean: Array, reference: Array) -> Array:
    """KL divergence of the actions' law from that about another mean, nats; [...]."""
    return jnp.square(mean - jax.lax.stop_gradient(reference)).sum(-1) / (2 * settings.deviation**2)
