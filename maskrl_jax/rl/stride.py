"""The stride head's maths: what it sees, how its decisions are scored (speed_rl spec 4.4; our choice)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from maskrl_jax.rl import kl

QUANTILES = tuple(round(0.05 + 0.1 * i, 2) for i in range(10))
NUM_FEATURES = 5 + len(QUANTILES)


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


def features(logp_BNK, masked_BN, tick_B, call_B, *, ticks: int, max_calls: int) -> jax.Array:
    """Describe the state before a call to the head (speed_rl spec 4.4), stop-gradient.

    Columns: masked share, c/C, k/T_max; over the masked positions the mean entropy / ln K, the mean top-1
    log-prob and the 5, 15, ..., 95 % quantiles of the top-1 probability. Where nothing is masked these are 0.

    Args:
      logp_BNK: float32 [B, N, K], guided log-probs, before tokens are drawn.
      masked_BN: bool [B, N].
      tick_B: int32 [B], clock before the call.
      call_B: int32 [B], k, calls made so far.
      ticks: C.
      max_calls: T_max.
    Returns:
      float32 [B, 15].
    """
    top_BN = logp_BNK.max(-1)
    columns = [
        masked_BN.mean(-1, dtype=jnp.float32),
        tick_B / ticks,
        call_B / max_calls,
        _masked_mean(kl.entropy(logp_BNK), masked_BN) / np.log(logp_BNK.shape[-1]),
        _masked_mean(top_BN, masked_BN),
    ]
    table = jnp.stack([c.astype(jnp.float32) for c in columns], axis=-1)
    quantiles = masked_quantiles(jnp.exp(top_BN), masked_BN).astype(jnp.float32)
    return jax.lax.stop_gradient(jnp.concatenate([table, quantiles], axis=-1))


def _masked_mean(x_BN, masked_BN):
    """Average over the masked positions, [B]; 0 where there is none."""
    return jnp.where(masked_BN, x_BN, 0.0).sum(-1) / jnp.maximum(masked_BN.sum(-1), 1)


def masked_quantiles(x_BN, masked_BN, quantiles: tuple[float, ...] = QUANTILES) -> jax.Array:
    """Interpolate quantiles of the masked entries, as numpy.quantile, [B, Q]; 0 in rows without any."""
    count_B1 = masked_BN.sum(-1, keepdims=True)
    ordered = jnp.sort(jnp.where(masked_BN, x_BN, jnp.inf), axis=-1)
    last = jnp.maximum(count_B1 - 1, 0)
    position = jnp.asarray(quantiles, x_BN.dtype)[None] * last
    lower = jnp.floor(position).astype(jnp.int32)
    low = jnp.take_along_axis(ordered, lower, axis=-1)
    high = jnp.take_along_axis(ordered, jnp.minimum(lower + 1, last), axis=-1)
    # An empty row holds inf - inf; the last select discards it.
    return jnp.where(count_B1 > 0, low + (position - lower) * (high - low), 0.0)


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


def decision_logp(logits_BD, decision_B, active_B) -> jax.Array:
    """Score decisions: log softmax(logits)[d], exactly 0 (and without gradient) where not `active_B`; [B]."""
    logp_BD = jax.nn.log_softmax(logits_BD)
    chosen = jnp.take_along_axis(logp_BD, decision_B[:, None], axis=-1)[:, 0]
    return jnp.where(active_B, chosen, 0.0)


def decision_entropy(logits_BD, active_B) -> jax.Array:
    """Entropy of the decision in nats, 0 where not `active_B`; [B]."""
    return jnp.where(active_B, kl.entropy(jax.nn.log_softmax(logits_BD)), 0.0)


def threshold_logp(action_B, mean_B, std_B, active_B) -> jax.Array:
    """Score the `threshold` action: log Normal(a; mu, sigma), 0 where not `active_B`; [B].

    The density of a, not of kappa = sigmoid(a): the Jacobian is free of the head, so ratios are the same.
    """
    deviation = (jax.lax.stop_gradient(action_B) - mean_B) / std_B
    logp = -0.5 * deviation**2 - jnp.log(std_B) - 0.5 * np.log(2 * np.pi)
    return jnp.where(active_B, logp, 0.0)


def threshold_entropy(std_B, active_B) -> jax.Array:
    """Entropy of Normal(mu, sigma) in nats, 0 where not `active_B`; [B]."""
    return jnp.where(active_B, jnp.log(std_B) + 0.5 * np.log(2 * np.pi * np.e), 0.0)


def threshold_commit(logp_BN, masked_BN, log_kappa_B, minimum_B, last_B):
    """Commit what is confident enough (action `threshold`): log pi(y_i) >= log c*, no noise.

    c* = min(kappa, n_min-th largest confidence), so at least n_min positions are committed; all at the last
    call. `hard` with threshold log c* is the exact likelihood of this rule.

    Args:
      logp_BN: float32 [B, N], log pi(y_i) of the drawn codes.
      masked_BN: bool [B, N].
      log_kappa_B: float32 [B], log sigmoid(a).
      minimum_B: int32 [B], n_min >= 1.
      last_B: bool [B], true at call T_max - 1.
    Returns:
      (committed bool [B, N], log c* float32 [B]); log c* = -inf where all is committed by force.
    """
    ordered = jnp.sort(jnp.where(masked_BN, -logp_BN, jnp.inf), axis=-1)
    index = jnp.clip(jnp.minimum(minimum_B, masked_BN.sum(-1)) - 1, 0, None)
    nth_B = -jnp.take_along_axis(ordered, index[:, None], axis=-1)[:, 0]
    log_c_B = jnp.where(last_B, -jnp.inf, jnp.minimum(log_kappa_B, nth_B))
    return masked_BN & (logp_BN >= log_c_B[:, None]), log_c_B
