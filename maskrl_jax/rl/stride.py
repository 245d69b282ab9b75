"""The stride head's maths: its prior, how its decisions are scored (speed_rl spec 4.4; our choice)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from maskrl_jax.sampling import draws


@dataclasses.dataclass(frozen=True)
class PriorConfig:
    """Describe the head before training: sticky, around `centre` calls.

    Args:
      divisors: step counts T_d among which a decision chooses: the jump is ticks / T_d, max T_d is T_max.
      centre: the likeliest T.
      width: spread of ln T.
      stickiness: eta at the start; without it decisions average out and speed has nothing to select on.
    """

    divisors: tuple[int, ...] = (24, 20, 16, 12, 10, 8, 6, 4, 3, 2, 1)
    centre: float = 16.0
    width: float = 0.4
    stickiness: float = 4.0

    def __post_init__(self):
        if not self.divisors or min(self.divisors) < 1 or len(set(self.divisors)) < len(self.divisors):
            raise ValueError(f"divisors must be distinct positive step counts, got {self.divisors}")
        if self.centre <= 0 or self.width <= 0:
            raise ValueError(f"centre and width must be positive, got {self.centre} and {self.width}")


def prior_bias(prior: PriorConfig) -> tuple[float, ...]:
    """Give the initial bias b_d = -(ln(T_d / centre))^2 / (2 width^2), one float per decision."""
    distance = np.log(np.asarray(prior.divisors, np.float64) / prior.centre)
    return tuple(float(b) for b in -(distance**2) / (2 * prior.width**2))


def jumps(divisors: tuple[int, ...], ticks: int) -> np.ndarray:
    """Give the clock jump of each decision, int32 [D]; ValueError if a T_d does not divide the clock."""
    bad = [d for d in divisors if ticks % d]
    if bad:
        raise ValueError(f"step counts {bad} do not divide the clock of {ticks} ticks")
    return np.array([ticks // d for d in divisors], np.int32)


def decision_logits(net_out_BD, previous_decision_B, eta, first_B) -> jax.Array:
    """Add stickiness: net(s) + eta onehot(d_{k-1}), without it at the first call; [B, D].

    Args:
      net_out_BD: float32 [B, D], head output with its bias.
      previous_decision_B: int32 [B]; unread where `first_B`.
      eta: float32 scalar, learned.
      first_B: bool [B], true at call 0.
    """
    sticky = jax.nn.one_hot(previous_decision_B, net_out_BD.shape[-1], dtype=net_out_BD.dtype)
    return net_out_BD + eta * jnp.where(first_B[:, None], 0.0, sticky)


def decision_logp(logits_BD, decision_B) -> jax.Array:
    """Score decisions: log softmax(logits)[d]; [B]."""
    return jnp.take_along_axis(jax.nn.log_softmax(logits_BD), decision_B[:, None], axis=-1)[:, 0]


def decision_entropy(logits_BD) -> jax.Array:
    """Entropy of the decision in nats; [B]."""
    return draws.entropy(jax.nn.log_softmax(logits_BD))


def threshold_logp(action_B, mean_B, std_B) -> jax.Array:
    """Score the `threshold` action: log Normal(a; mu, sigma); [B].

    The density of a, not of kappa = sigmoid(a): the Jacobian is free of the head, so ratios are the same.
    """
    deviation = (jax.lax.stop_gradient(action_B) - mean_B) / std_B
    return -0.5 * deviation**2 - jnp.log(std_B) - 0.5 * np.log(2 * np.pi)


def threshold_entropy(std_B) -> jax.Array:
    """Entropy of Normal(mu, sigma) in nats; [B]."""
    return jnp.log(std_B) + 0.5 * np.log(2 * np.pi * np.e)
