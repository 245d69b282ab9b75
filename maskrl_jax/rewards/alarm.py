"""The reward-hacking alarm: the trained reward rises while what is held out falls, or pictures drift (our choice)."""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp

Array = jax.Array
OPENING = 5  # updates whose mean is what pictures looked like at the start


@dataclasses.dataclass(frozen=True)
class AlarmConfig:
    """Static settings. Averages forget by `fast` and `slow` an update; their difference is the trend."""

    fast: float = 0.8
    slow: float = 0.95
    trend: float = 1.0  # of both sides, in standard deviations of a batch; noise alone gives 0.3
    drift: float = 0.5  # relative change of a picture statistic since the opening

    def __post_init__(self):
        if not 0 < self.fast < self.slow < 1:
            raise ValueError(f"alarm.fast {self.fast} and slow {self.slow} must rise within (0, 1)")
        if min(self.trend, self.drift) <= 0:
            raise ValueError(f"alarm.trend {self.trend} and drift {self.drift} must be above 0")


class AlarmState(flax.struct.PyTreeNode):
    """Running means of M numbers: trained reward, held-out reward, then the picture statistics. float32."""

    count: Array  # int32 []
    fast: Array  # [M]
    slow: Array  # [M]
    square: Array  # [M], of deviations from the fast mean
    opening: Array  # [M]


def create(statistics: int) -> AlarmState:
    """Empty memory for this many picture statistics."""
    zeros = [jnp.zeros((2 + statistics,), jnp.float32) for _ in range(4)]  # each its own buffer
    return AlarmState(jnp.zeros((), jnp.int32), *zeros)


def watch(config: AlarmConfig, state: AlarmState, values_M: Array) -> tuple[AlarmState, dict[str, Array]]:
    """Take the numbers of an update: the new memory, and {"held_out", "pictures"} as 0 or 1.

    held_out: the trained reward rises and the held-out one falls, both by more than `trend` standard deviations
    of a batch. pictures: the trained reward is above its opening mean and a statistic has moved by `drift`.
    Values that are not finite leave the memory as it was.
    """
    usable = jnp.isfinite(values_M).all()
    values_M = jnp.where(usable, values_M, state.slow)
    count = state.count + usable
    first = state.count == 0

    def mean(old, new, decay):
        # Before a full window the plain mean of what there was.
        weight = jnp.maximum(1 - decay, 1 / jnp.maximum(count, 1))
        return jnp.where(first, new, old + weight * (new - old))

    deviation = jnp.where(first, 0.0, (values_M - state.fast) ** 2)
    new = AlarmState(
        count=count,
        fast=mean(state.fast, values_M, config.fast),
        slow=mean(state.slow, values_M, config.slow),
        square=mean(state.square, deviation, config.slow),
        opening=jnp.where(
            count <= OPENING, state.opening + (values_M - state.opening) / jnp.maximum(count, 1), state.opening
        ),
    )
    trend = (new.fast - new.slow) / jnp.maximum(jnp.sqrt(new.square), 1e-6)
    settled = count > 2 * OPENING
    moved = jnp.abs(new.fast - new.opening)[2:] > config.drift * jnp.abs(new.opening[2:])
    alarms = {
        "held_out": settled & (trend[0] > config.trend) & (trend[1] < -config.trend),
        "pictures": settled & (new.fast[0] > new.opening[0]) & moved.any(),
    }
    new = jax.tree.map(lambda a, b: jnp.where(usable, a, b), new, state)
    return new, {name: (fired & usable).astype(jnp.float32) for name, fired in alarms.items()}
