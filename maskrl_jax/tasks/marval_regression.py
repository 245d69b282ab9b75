"""How a student of stage `marval` may begin: it regresses what its teacher's chain makes of the same noise.

Our choice (published: the student begins as a copy of the teacher); the recipe is that of knowledge distillation of a
deterministic sampler (arXiv 2101.02388), a token at a time.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from maskrl_jax import state as train_state
from maskrl_jax.axis import mean_gradients
from maskrl_jax.distill import diffusion
from maskrl_jax.tasks import continuous

Array = jax.Array
REGRESSION = 8  # what a sample's key is folded with


@dataclasses.dataclass(frozen=True)
class Regression:
    """updates: before anything else, 0 for none; chain_steps: of the teacher's DDIM chain, guided as the loss is.

    radius: r of what is minimised, sqrt(|x - g|^2 + r^2) of a token; a squared distance learns more slowly here.
    """

    updates: int = 0
    chain_steps: int = 16
    radius: float = 0.01

    def __post_init__(self):
        if self.updates < 0:
            raise ValueError(f"regression.updates {self.updates} must be at least 0")
        if not 2 <= self.chain_steps <= continuous.DIFFUSION_STEPS:
            raise ValueError(f"regression.chain_steps {self.chain_steps} must be in [2, {continuous.DIFFUSION_STEPS}]")
        if self.radius <= 0:
            raise ValueError(f"regression.radius {self.radius} must be above 0")


class Regressor:
    """The update; `marval` is the stage's wiring."""

    def __init__(self, settings: Regression, optimizer: train_state.OptimizerConfig, marval: Any):
        self.settings, self.optimizer, self.marval = settings, optimizer, marval
        self.tx = train_state.make_optimizer(optimizer)
        self.process = diffusion.make_process(continuous.DIFFUSION_STEPS, settings.chain_steps)

    def ends(self, teacher: Any, z: Array, zeta: Array) -> Array:
        """Tokens [M,B,L,C] that the teacher's chain makes of noise of that shape; z [2,B,L,D], the null's second."""
        known = self.marval.network.condition(teacher, z)[:, None]
        head = continuous.guided_head(self.marval.network, teacher, known, self.marval.gsim.guidance)
        still = lambda place: jnp.zeros_like(zeta)  # noqa: E731 - a chain without noise of its own
        return jax.lax.stop_gradient(diffusion.run_chain(self.process, head, zeta, still, method=diffusion.DDIM))

    def update(self, state: Any, frozen: Any, batch: dict, axis: Any) -> tuple[Any, dict]:
        """A step of the student alone, with the optimizer that `state.extra["regression"]` is the state of."""
        marval = self.marval
        ready = marval.prepared(frozen, batch)
        zeta, _, _ = marval.draws(ready["keys"], REGRESSION)
        ends = self.ends(frozen["teacher"], ready["teacher"], zeta)

        def loss(params):
            z = marval.conditions(params, marval.settings.student, ready)
            tokens = marval.tokens(params, marval.network.condition(params, z)[None], zeta)
            square = jnp.where(ready["counted"], jnp.square(tokens - ends).sum(-1), 0)
            each = jnp.sqrt(square + self.settings.radius**2) - self.settings.radius
            return each.sum(), square.sum()

        (total, square), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
        grads = mean_gradients(grads, ready["weight"], axis)
        own = state.replace(opt_state=state.extra["regression"])
        own, info = train_state.apply_gradients(own, grads, self.tx, ema_decay=self.optimizer.ema_decay)
        sums = {"train/regression": (total, ready["weight"]), "train/regression_square": (square, ready["weight"])}
        metrics = {name: axis.all_reduce(pair) for name, pair in sums.items()}
        metrics |= {f"train/{name}": (value, jnp.float32(1)) for name, value in info.items()}
        extra = state.extra | {"regression": own.opt_state}
        return own.replace(opt_state=state.opt_state, extra=extra), metrics
