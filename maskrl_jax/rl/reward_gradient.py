"""Direct back-propagation of a reward through K iterations of masked autoregression (MARVAL-RL, arXiv 2511.15190).

specs/marval.md section 10: truncation, checkpointing and detached contexts are our choice. Axes: B batch, L tokens,
C channels.
"""

import dataclasses

import jax
import jax.numpy as jnp

from maskrl_jax.sampling import mar
from maskrl_jax.sampling.mar import Dials, MarPlan

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Truncation:
    """Which paths from a reward to the parameters are kept.

    iterations: J, the last so many iterations have gradients; 0 for all, which is exact.
    detach_context: no gradient through what an iteration sees of those before it: every token keeps its direct path,
      the chain of iterations has none (biased).
    """

    iterations: int = 0
    detach_context: bool = False

    def __post_init__(self):
        if self.iterations < 0:
            raise ValueError(f"truncation.iterations {self.iterations} must be at least 0")

    def first(self, num_steps: int) -> int:
        """The first iteration with a gradient."""
        if self.iterations > num_steps:
            raise ValueError(f"truncation.iterations {self.iterations} exceeds the {num_steps} iterations of a rollout")
        return num_steps - self.iterations if self.iterations else 0


def rollout(
    backbone: mar.Backbone,
    draw: mar.Draw,
    keys_B: Array,
    conds: list[Array],
    dials_N: Dials,
    plan: MarPlan,
    channels: int,
    truncation: Truncation,
) -> Array:
    """Tokens [B,L,C] in raster order, differentiable in the parameters of `backbone` and `draw`.

    The draws are those of `sampling.mar.generate`. What an iteration computes is computed again on the way back: of
    each, the tokens alone are kept.
    """
    order_BL, keys_BL = mar.randomness(keys_B, plan.num_tokens)
    tokens_BLC = jnp.zeros((*order_BL.shape, channels))
    first, place_L1 = truncation.first(plan.num_steps), jnp.arange(plan.num_tokens)[:, None]

    def iteration(tokens, shape, masked, after, k):
        return mar.iterate(backbone, draw, tokens, order_BL, conds, keys_BL, shape, masked, after, dials_N.at(k))

    def detached(tokens, shape, masked, after, k):
        drawn = iteration(jax.lax.stop_gradient(tokens), shape, masked, after, k)
        return jnp.where(((place_L1 >= after) & (place_L1 < masked))[None], drawn, tokens)

    kept = jax.checkpoint(detached if truncation.detach_context else iteration, static_argnums=(1,))
    for segment in plan.segments():
        for part in segment.split(first):
            tokens_BLC = mar.run(part, kept, tokens_BLC)
            if part.first < first:
                tokens_BLC = jax.lax.stop_gradient(tokens_BLC)
    return mar.to_raster(tokens_BLC, order_BL)
