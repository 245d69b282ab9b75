"""The policy gradient of stage `marval_rl`, for rewards that have no gradient (specs/marval.md section 10; ours)."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from maskrl_jax.keys import ROLLOUT, sample_keys
from maskrl_jax.rl import action_noise, advantages, surrogate
from maskrl_jax.rl.action_noise import ActionNoise
from maskrl_jax.sampling import mar
from maskrl_jax.sampling.mar import Dials, MarPlan
from maskrl_jax.tasks import marval
from maskrl_jax.tasks.continuous import row_noise
from maskrl_jax.tasks.marval_gallery import one_step_draw

Array = jax.Array
ACTION = 1  # what a token's key is folded with for the noise of its action


@dataclasses.dataclass(frozen=True, eq=False)
class Policy:
    """Rollouts with noise, and the objective that they give.

    Attributes:
      score: (frozen, tokens [B,L,C] in raster order, target) -> (reward [B], scores by name).
      seed: of the run; noise comes from it, the update's number and the sample's.
      dials: of the plan's iterations, as when the student is measured.
    """

    settings: ActionNoise
    marval: marval.Wiring
    plan: MarPlan
    score: Callable[[Any, Array, Array], tuple[Array, dict[str, Array]]]
    seed: int
    dials: Dials

    def rollout(self, params: Any, frozen: Any, batch: dict, axis: Any) -> dict:
        """Sample with noise added to every token, and score; per-sample outputs."""
        keys_B, c = sample_keys(self.seed, ROLLOUT, batch["round"][0], batch["index"]), self.marval.base.sizes
        mean = one_step_draw(self.marval, params)

        def act(z, null, dials, keys_BR):
            noise = row_noise(keys_BR, ACTION, c.channels)
            return mean(z, null, dials, keys_BR) + self.settings.deviation * noise

        made = mar.generate(
            self.marval.network.backbone(params),
            act,
            keys_B,
            [batch["cond"]],
            self.dials,
            self.plan,
            c.channels,
        )
        return {"tokens": made.tokens} | self.score(frozen, made.tokens, batch["target"])[1]

    def means(self, params: Any, seen: tuple, masked: Array, temperature: Array) -> Array:
        """What the student draws without noise for every token [B,L,C], as it sees the grid with `masked` tokens left.

        seen: (tokens [B,L,C] in generation order, order, keys of every token, condition).
        """
        tokens, order_BL, keys_BL, cond = seen
        z = self.marval.network.backbone(params)(tokens, order_BL, cond, masked)
        zeta = temperature * row_noise(keys_BL, 0, self.marval.base.sizes.channels)
        return self.marval.tokens(params, self.marval.network.condition(params, z), zeta)

    def objective(self, params: Any, frozen: Any, batch: dict) -> tuple[Array, tuple[dict, Array]]:
        """Minus the clipped objective, and the divergence from the student as it was, summed over rollouts.

        Iteration by iteration, each computed again on the way back.
        """
        settings, plan = self.settings, self.plan
        keys_B = sample_keys(self.seed, ROLLOUT, batch["round"][0], batch["index"])
        order_BL, keys_BL = mar.randomness(keys_B, plan.num_tokens)
        seen = (mar.to_order(batch["tokens"], order_BL), order_BL, keys_BL, batch["cond"])
        noise, place_L = row_noise(keys_BL, ACTION, self.marval.base.sizes.channels), jnp.arange(plan.num_tokens)
        before, after = jnp.array((plan.num_tokens, *plan.masked_after[:-1])), jnp.array(plan.masked_after)
        count = settings.iterations or plan.num_steps
        shuffled = jax.random.permutation(batch["choice"], plan.num_steps)[:count]

        low, high = settings.clip_range

        @jax.checkpoint
        def iteration(params, k):
            now = (seen, before[k], self.dials.at(k).temperature)
            mean = self.means(params, *now)
            reference = self.means(frozen["student"], *now) if settings.kl else mean
            drawn = jnp.broadcast_to((place_L >= after[k]) & (place_L < before[k]), order_BL.shape).astype(jnp.float32)
            terms = (*action_noise.log_densities(settings, mean, seen[0], noise), batch["advantage"][:, None], drawn)
            clipped, _ = surrogate.clip_fraction(*terms, low=low, high=high)
            return {
                "rl/objective": surrogate.clipped_surrogate(*terms, low=low, high=high),
                "rl/kl": (drawn * action_noise.divergence(settings, mean, reference)).sum(),
                "rl/approximate_kl": surrogate.approximate_kl(*terms[:2], drawn)[0],
                "rl/clip_fraction": clipped,
            }

        def add(total, k):
            return jax.tree.map(jnp.add, total, iteration(params, k)), None

        shapes = jax.eval_shape(iteration, params, shuffled[0])
        zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        sums, _ = jax.lax.scan(add, zero, shuffled)
        # A mean over the tokens of a rollout, whichever of its iterations were looked at.
        sums = {name: x * plan.num_steps / count / plan.num_tokens for name, x in sums.items()}
        return settings.kl * sums["rl/kl"] - sums["rl/objective"], (sums, jnp.float32(len(keys_B)))

    def scored(self, batch: dict) -> dict:
        """Advantages of a batch of scored rollouts, within their groups."""
        reward_PG = batch["quality"].reshape(-1, self.settings.group)
        advantage = advantages.group_advantage(reward_PG, jnp.ones_like(reward_PG))
        return batch | {"advantage": advantage.reshape(-1)}
