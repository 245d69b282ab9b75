"""The update of MaskFocus: the final image under fresh random masks (specs/maskfocus.md sections 5 and 6).

Deliberately not in the likelihood (published): guidance, temperature and routing of the rollout, its noise, which
tokens were committed when. The behaviour therefore differs from what is scored, without an importance weight.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from maskrl_jax.keys import MASKS, STEPS, sample_keys
from maskrl_jax.rl import critical_steps
from maskrl_jax.rl.advantages import lighten_negative
from maskrl_jax.rl.critical_steps import StepChoice
from maskrl_jax.rl.pairs import accumulate
from maskrl_jax.rl.token_terms import Model, TokenLoss, masked_images, token_terms
from maskrl_jax.sampling.draws import commit_top

Array = jax.Array
REMASKS = ("random_group", "random_batch", "random_per_sample", "trajectory")
MODES = ("sequential", "accumulate")
NORMS = ("step_mean", "token_mean")


@dataclasses.dataclass(frozen=True)
class FocusUpdate:
    """Static parts of an update.

    A batch holds ids and commit_step [B,N], similarity [B,T-1], cond, advantage [B], keep [B] (0: the sample
    enters neither term), index int32 [B] (of the sample among all of the run's, groups are neighbours) and
    round int32 [B] (the same for all: the update's number); for `gradients` also steps int32 [B,K].
    """

    choice: StepChoice
    tokens: TokenLoss
    model: Model
    mask_id: int
    group: int
    seed: int
    micro_batch: int  # images a device scores at a time
    remask: str = "random_group"
    mode: str = "sequential"
    norm: str = "step_mean"
    kl_coefficient: float = 0.01
    negative_weight: float = 1.0  # of advantages below zero, but for the first call's

    def __post_init__(self):
        for name, allowed in (("remask", REMASKS), ("mode", MODES), ("norm", NORMS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} {getattr(self, name)!r} is not one of {', '.join(allowed)}")
        if self.kl_coefficient < 0:
            raise ValueError(f"kl_coefficient {self.kl_coefficient} must be at least 0")
        if not 0 <= self.negative_weight <= 1:
            raise ValueError(f"negative_weight {self.negative_weight} must lie in [0, 1]; 1 is published")

    @property
    def updates(self) -> int:
        """Optimizer updates of a rollout."""
        return self.choice.slots if self.mode == "sequential" else 1

    def steps(self, batch: dict) -> Array:
        """Chosen steps of every sample, int32 [B,K]; needs all rows of the batch."""
        keys_B = self._keys(STEPS, batch, self.choice.scope)
        return critical_steps.choose(self.choice, keys_B, batch["similarity"], self.group)

    def remasked(self, batch: dict, row_M: Array, slot_M: Array) -> tuple[Array, Array]:
        """(masked bool [M,N], timestep int32 [M]) of samples and slots: what of x0 is hidden from the network."""
        step_M = batch["steps"][row_M, slot_M]
        count_M, timestep_M = critical_steps.count_and_timestep(self.choice, step_M)
        if self.remask == "trajectory":
            return batch["commit_step"][row_M].astype(jnp.int32) > step_M[:, None], timestep_M
        keys_B = self._keys(MASKS, batch, self.remask.removeprefix("random_").removeprefix("per_"))
        keys_M = jax.vmap(jax.random.fold_in)(keys_B[row_M], slot_M)
        noise = jax.vmap(lambda key: jax.random.uniform(key, (self.choice.num_tokens,)))(keys_M)
        return commit_top(noise, jnp.ones(noise.shape, bool), count_M), timestep_M

    def advantage(self, advantage_M: Array, step_M: Array) -> Array:
        """Advantages of samples at steps, float32 [M]: those below zero lightened, but not at the first call.

        What is learnt more from successes than from failures makes samples that the sampler had sharpened surer
        still. Where nothing is visible yet, that would cost the choice between layouts.
        """
        return jnp.where(step_M < 0, advantage_M, lighten_negative(advantage_M, self.negative_weight))

    def _keys(self, purpose: int, batch: dict, scope: str) -> Array:
        """Typed keys [B], equal within the scope."""
        index_B = batch["index"] // {"group": self.group, "batch": jnp.iinfo(jnp.int32).max, "sample": 1}[scope]
        return sample_keys(self.seed, purpose, batch["round"][0], index_B)

    def gradients(
        self, params: Any, old: Any, reference: Any, batch: dict, slots: Array, axis: Any
    ) -> tuple[Any, dict, Array]:
        """Gradient of the mean loss of some slots, metrics as (sum, weight), largest |ratio - 1|; all-reduced.

        `old` holds the behaviour parameters, None where they are the current ones. `slots` int32 [S].
        """
        kept_B = batch["keep"]
        count_BS, _ = critical_steps.count_and_timestep(self.choice, batch["steps"])
        samples, tokens = axis.all_reduce((kept_B.sum(), (kept_B[:, None] * count_BS).sum().astype(jnp.float32)))
        valid = jnp.broadcast_to((kept_B > 0)[:, None], (len(kept_B), len(slots)))

        def loss(params, pair, real):
            row, slot = pair // len(slots), slots[pair % len(slots)]
            masked, timestep = self.remasked(batch, row, slot)
            masked &= real[:, None]
            if self.norm == "token_mean":
                weight = jnp.full(row.shape, self.choice.slots / jnp.maximum(tokens, 1.0) / len(slots))
            else:
                weight = 1.0 / jnp.maximum(masked.sum(-1) * samples * len(slots), 1.0)
            weight = masked * (kept_B[row] * weight)[:, None]
            cond = jax.tree.map(lambda c: c[row], batch["cond"])
            advantage = self.advantage(batch["advantage"][row], batch["steps"][row, slot])
            calls = masked_images(batch["ids"][row], masked, self.mask_id, timestep, cond, advantage, weight, weight)
            sums, error, _ = token_terms(self.tokens, self.model, params, old, reference, axis.split(calls), axis)
            total = self.kl_coefficient * sums.penalty - sums.token
            stats = {"loss": total, "kl": sums.kl, "clip": sums.clip, "moved": sums.moved, "entropy": sums.entropy}
            return total, (stats, error)

        def part(pair, real):
            grads, (stats, error) = jax.grad(loss, has_aux=True)(params, pair, real)
            return (grads, stats), error

        (grads, stats), error = accumulate(part, valid, self.micro_batch * axis.size)
        grads, stats = axis.all_reduce((grads, stats))
        metrics = {} if reference is None else {"rl/kl": (stats["kl"], jnp.float32(1))}
        metrics |= {
            "train/loss": (stats["loss"], jnp.float32(1)),
            "rl/clip_frac": stats["clip"],
            "rl/approx_kl": stats["moved"],
            "rl/entropy": stats["entropy"],
        }
        return grads, metrics, axis.largest(error)
