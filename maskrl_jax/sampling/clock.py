"""The integer clock that all policies share: how many tokens are still masked at a tick."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from maskrl_jax.sampling import schedules


@dataclasses.dataclass(frozen=True)
class Clock:
    """Hold the host tables of one decoding clock (speed_rl spec 4.1; our choice).

    A call at tick c sees `masked[c]` masked tokens; a constant stride ticks / T gives the cosine schedule of
    T steps exactly. The tables are numpy, made once in float64, and become constants of a compiled program.

    Args:
      num_tokens: N, image tokens.
      ticks: C, length of the clock; choose it divisible by every step count in use.
      timesteps: what the network is told at a tick, see `schedules.timesteps`.
      noise_scale: Gumbel scale at tick 0; it falls linearly to 0 at tick C.
      calls: T where every rollout has the same, which the timesteps `countdown` need; 0: it is not known.
      compounded: T of Mask-GRPO's official noise instead (specs/speed_rl.md section 8): call k of T has the scale
        times the product of 1 - (i+1)/T over i <= k. 0: linear.
    """

    num_tokens: int
    ticks: int = 960
    timesteps: str = "clock"
    noise_scale: float = 2.0
    compounded: int = 0
    calls: int = 0

    def __post_init__(self):
        if min(self.num_tokens, self.ticks) < 1:
            raise ValueError(f"num_tokens and ticks must be positive; got {self}")
        schedules.timesteps(self.timesteps, np.zeros(1), 1, self.calls)  # raises for what cannot be

    @functools.cached_property
    def masked(self) -> np.ndarray:
        """Tabulate floor(N cos(pi/2 c/C) + 1e-6), int32 [C + 1], before the clip by the previous count."""
        fraction = np.arange(self.ticks + 1, dtype=np.float64) / self.ticks
        count = np.floor(self.num_tokens * np.cos(np.pi / 2 * fraction) + 1e-6).astype(np.int32)
        count[-1] = 0
        return count

    @functools.cached_property
    def timestep(self) -> np.ndarray:
        """Tabulate what the network is told at every tick, int32 or float32 [C + 1], 0 at the end of the clock."""
        return schedules.timesteps(self.timesteps, np.arange(self.ticks + 1), self.ticks, self.calls)

    @functools.cached_property
    def noise(self) -> np.ndarray:
        """Tabulate the Gumbel scale at every tick, float32 [C + 1]: noise_scale (1 - c/C) unless compounded."""
        fraction = np.arange(self.ticks + 1, dtype=np.float64) / self.ticks
        if self.compounded:
            left = np.cumprod(1 - np.arange(1, self.compounded + 1) / self.compounded)
            call = np.minimum((fraction * self.compounded + 1e-9).astype(int), self.compounded - 1)
            return (self.noise_scale * left[call]).astype(np.float32)
        return (self.noise_scale * (1 - fraction)).astype(np.float32)

    def stride(self, num_steps: int) -> int:
        """Give the stride of a T-step schedule; ValueError if T does not divide the clock or exceeds N."""
        if num_steps < 1 or self.ticks % num_steps:
            raise ValueError(f"num_steps {num_steps} does not divide the clock of {self.ticks} ticks")
        if num_steps > self.num_tokens:
            raise ValueError(f"num_steps {num_steps} exceeds the {self.num_tokens} image tokens")
        return self.ticks // num_steps


def next_masked(clock: Clock, tick_next: jax.Array, masked_prev: jax.Array) -> jax.Array:
    """Count the tokens that stay masked once the clock reads `tick_next` (speed_rl spec 4.1).

    Every call commits at least one token and none before the end of the clock commits the last by rounding;
    once nothing is masked the answer stays 0. Ticks beyond the end read as the end.

    Args:
      clock: the tables.
      tick_next: int32 [...], the clock after this call.
      masked_prev: int32 [...], masked tokens before this call.
    Returns:
      int32 [...].
    """
    tick = jnp.minimum(tick_next, clock.ticks)
    count = jnp.minimum(jnp.maximum(jnp.asarray(clock.masked)[tick], 1), masked_prev - 1)
    return jnp.where(tick >= clock.ticks, 0, jnp.maximum(count, 0)).astype(jnp.int32)
