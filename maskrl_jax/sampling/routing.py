"""Entropy-routed rollouts (MaskFocus, arXiv 2512.18766; specs/maskfocus.md sections 2 and 3).

At every step the low-entropy half of a prompt's group is drawn at a temperature that follows each token's entropy;
the other half is drawn plainly. Published: the idea, the group as scope, the shape of the temperature. From the
official code: its numbers, counts, noise and ties. Our choice: one draw with a temperature map in place of two
samplers (the same law), and the first step, where all samples of a group are alike, never explores.
"""

import dataclasses
from typing import Any

import chex
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from maskrl_jax.sampling import draws, schedules

Array = jax.Array
ROUTINGS = ("on", "off", "all_explore")
MOST_STEPS = 255  # commit steps are uint8


@dataclasses.dataclass(frozen=True)
class RoutingConfig:
    """Static settings of a routed rollout."""

    num_steps: int = 64  # T
    routing: str = "on"  # on; off: no sample explores; all_explore: all do from the second step on
    noise: float = 2.0  # Gumbel scale of the confidence at the first step; falls linearly to 0 at the last
    guidance: float = 5.0  # 1: none
    temperature: float = 1.0  # of both halves, divides the logits first; 1 is published
    amplitude: float = 2.5
    decay: float = 3.0  # nats
    floor: float = 0.7
    timesteps: str = "countdown"  # what the network is told, see `schedules.timesteps`; the official code's

    def __post_init__(self):
        if self.routing not in ROUTINGS:
            raise ValueError(f"routing {self.routing!r} is not one of {', '.join(ROUTINGS)}")
        if not 2 <= self.num_steps <= MOST_STEPS:
            raise ValueError(f"num_steps {self.num_steps} must lie in 2..{MOST_STEPS}, what a commit step can count")
        if self.noise < 0 or min(self.temperature, self.decay, self.floor) <= 0 or self.amplitude < 0:
            raise ValueError(f"temperatures must be positive, noise and amplitude at least 0; got {self}")
        schedules.timesteps(self.timesteps, np.zeros(1), 1, 1)  # raises for an unknown one

    @property
    def timestep(self) -> np.ndarray:
        """Timestep that the network is given at every step, int32 or float32 [T]."""
        return schedules.timesteps(self.timesteps, np.arange(self.num_steps), self.num_steps, self.num_steps)

    @property
    def noises(self) -> np.ndarray:
        """Noise scale of every step, float32 [T]."""
        return (self.noise * (1 - np.arange(self.num_steps) / (self.num_steps - 1))).astype(np.float32)


class Routed(flax.struct.PyTreeNode):
    """What a routed rollout keeps. M(z_k), what is masked before call k: commit_step >= k."""

    ids: Array  # int32 [B,N], x0
    commit_step: Array  # uint8 [B,N]
    predictions: Array  # uint16 [T,B,N], x0-prediction of every step: fresh draws where masked, else what is fixed
    explore: Array  # bool [T,B]
    entropy: Array  # float32 [T,B], mean entropy of the masked tokens, nats


def mask_counts(num_tokens: int, num_steps: int) -> np.ndarray:
    """Masked tokens n_0..n_T, int32 [T+1]: N, then max(1, min(n-1, floor(N cos(pi/2 i/T)))), at last 0.

    More steps than tokens are fine here: some then unmask nothing (specs/maskfocus.md 2.1).
    """
    counts = [num_tokens]
    for step in range(1, num_steps):
        share = np.cos(np.pi / 2 * step / num_steps)
        counts.append(max(1, min(counts[-1] - 1, int(np.floor(num_tokens * share + 1e-6)))))
    return np.asarray([*counts, 0], np.int32)


def exploring(entropy_B: Array, group: int) -> Array:
    """Tell which samples explore, bool [B]: those below the floor(G/2)-th largest entropy of their group.

    Ties exploit; so does a group of one. Samples of a group are neighbours, B = P * G.
    """
    if group == 1:
        return jnp.zeros(entropy_B.shape, bool)
    grouped = entropy_B.reshape(-1, group)
    threshold = jnp.sort(grouped, axis=-1)[:, group - group // 2]
    return (grouped < threshold[:, None]).reshape(-1)


def exploration_temperature(config: RoutingConfig, entropy: Array) -> Array:
    """Temperature of an exploring draw, of entropies in nats; same shape."""
    return draws.entropy_temperature(entropy, config.amplitude, config.decay, config.floor)


def rollout(
    logits_fn: draws.LogitsFn,
    keys_B: Array,
    cond: Any,
    null_cond: Any,
    config: RoutingConfig,
    num_tokens: int,
    mask_id: int,
    group: int,
) -> Routed:
    """Sample B images in T steps; groups of G neighbours are routed among themselves."""
    chex.assert_rank(keys_B, 1)
    batch = keys_B.shape[0]
    left = mask_counts(num_tokens, config.num_steps)[1:]
    steps = (np.arange(config.num_steps, dtype=np.int32), left, config.noises, config.timestep)

    def step(carry, now):
        ids_BN, commit_BN = carry
        index, count, noise, timestep = now
        masked_BN = ids_BN == mask_id
        logits = _logits(logits_fn, ids_BN, jnp.full((batch,), timestep), cond, null_cond, config)
        entropy_BN = draws.entropy(draws.log_probabilities(logits))
        mean_B = jnp.where(masked_BN, entropy_BN, 0.0).sum(-1) / jnp.maximum(masked_BN.sum(-1), 1)
        explore_B = (index > 0) & _route(config, mean_B, group)
        heat_BN = jnp.where(explore_B[:, None], exploration_temperature(config, entropy_BN), 1.0)
        logp = draws.log_probabilities(logits / heat_BN[..., None])
        drawn_BN, confidence_BN = draws.draw_tokens(draws.step_keys(keys_B, index, draws.TOKENS), logp)
        predicted_BN = jnp.where(masked_BN, drawn_BN, ids_BN)
        confidence_BN += noise * draws.gumbel(draws.step_keys(keys_B, index, draws.NOISE), num_tokens)
        commit = draws.commit_top(confidence_BN, masked_BN, masked_BN.sum(-1) - count)
        carry = jnp.where(commit, drawn_BN, ids_BN), jnp.where(commit, index.astype(jnp.uint8), commit_BN)
        return carry, (predicted_BN.astype(jnp.uint16), explore_B, mean_B)

    start = jnp.full((batch, num_tokens), mask_id, jnp.int32), jnp.zeros((batch, num_tokens), jnp.uint8)
    (ids, commit_step), (predictions, explore, entropy) = jax.lax.scan(step, start, steps)
    return Routed(ids=ids, commit_step=commit_step, predictions=predictions, explore=explore, entropy=entropy)


def _logits(logits_fn, ids_BN, timestep_B, cond, null_cond, config):
    """Guided, tempered logits [B,N,K]."""
    if config.guidance == 1.0:
        return logits_fn(ids_BN, timestep_B, cond) / config.temperature
    scale_B = jnp.full(timestep_B.shape, config.guidance, jnp.float32)
    return draws.guided(logits_fn, null_cond)(ids_BN, timestep_B, cond, scale_B) / config.temperature


def _route(config, entropy_B, group):
    if config.routing == "on":
        return exploring(entropy_B, group)
    return jnp.full(entropy_B.shape, config.routing == "all_explore")
