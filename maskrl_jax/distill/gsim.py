"""Guided score implicit matching: a diffusion chain distilled into one call (MARVAL, arXiv 2511.15190).

specs/marval.md sections 3, 6, 7 and 8. A row is a token with its own noise and time; C channels. Heads of the frozen
teacher and of the auxiliary network that follows the student both predict noise.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from maskrl_jax.distill.diffusion import Process, predicted_start

Array = jax.Array
NORMS = ("huber", "frozen", "squared", "dmd")
WEIGHTS = ("sigma", "x0", "raw", "kl")
SCALES = ("sigma", "one")
FORMS = ("eps", "x0")


@dataclasses.dataclass(frozen=True)
class Gsim:
    """What the student minimises.

    norm: of the gap of the scores y: `huber`, sqrt(|y|^2 + radius^2), as published; `frozen`, its denominator without
      a gradient (biased); `squared`; `dmd`, the gradient of Diff-Instruct, which does not go through the scores.
    kappa: 1 is guided score implicit matching, 0 score implicit matching; with `squared`, SiD with 1 - kappa/2.
    radius: r of the pseudo-Huber norm (published: 1e-5).
    weight: of a time (not published for `huber`): `sigma`; `x0`, sigma^2/alpha; `raw`, 1; `kl`, beta/2, which makes
      the sum over times of `squared` the KL divergence.
    first, last: the times that are drawn, both included.
    guidance: w of eps_null + w (eps - eps_null); 1 is none (published: 1.2).
    over: what a norm is taken over: `token`, or all of an `image`, whose rows then share a time.
    """

    norm: str = "huber"
    kappa: float = 1.0
    radius: float = 1e-5
    weight: str = "sigma"
    first: int = 20
    last: int = 970
    guidance: float = 1.2
    over: str = "token"

    def __post_init__(self):
        for name, known in (("norm", NORMS), ("weight", WEIGHTS), ("over", ("token", "image"))):
            if getattr(self, name) not in known:
                raise ValueError(f"loss.{name} {getattr(self, name)!r} is not one of {', '.join(known)}")
        if self.weight == "kl" and self.norm != "squared":
            raise ValueError("loss.weight kl belongs to loss.norm squared: with it the sum over times is the KL")
        if self.radius <= 0:
            raise ValueError(f"loss.radius {self.radius} must be above 0")
        if not 0 <= self.first <= self.last:
            raise ValueError(f"loss.first {self.first} and last {self.last} must be times in order")


def guided(null: Array, own: Array, scale: float | Array) -> Array:
    """eps_null + w (eps - eps_null); w = 1 is no guidance."""
    return null + scale * (own - null)


def time_weight(settings: Gsim, process: Process, step: Array) -> Array:
    """W_t [...] of times int32 [...]."""
    alpha, sigma = (jnp.asarray(column)[step] for column in (process.alpha, process.sigma))
    if settings.weight == "sigma":
        return sigma
    if settings.weight == "x0":
        return sigma**2 / alpha
    if settings.weight == "raw":
        return jnp.ones_like(sigma)
    return jnp.exp(jnp.asarray(process.log_beta)[step]) / 2


def row_losses(
    settings: Gsim, process: Process, step: Array, noise: Array, own: Array, teacher: Array, start: Array
) -> Array:
    """Loss of every row [...], or [..., 1] for the rows [..., R] of an image; the norm's constant is left out.

    Args:
      step: int32 [...], times; of an image all the same.
      noise: [..., C], the draw inside x_t.
      own, teacher: noise that the auxiliary network, and the guided teacher, predict at x_t, with their gradients to it.
      start: x_0 [..., C] of the student; read by `dmd` alone.
    """
    axes, at = ((-2, -1), (..., slice(0, 1))) if settings.over == "image" else ((-1,), (...,))
    weight, sigma = time_weight(settings, process, step)[at], jnp.asarray(process.sigma)[step][at]
    total = (lambda x: x.sum(axes)[..., None]) if settings.over == "image" else (lambda x: x.sum(axes))
    gap = own - teacher
    if settings.norm == "dmd":
        return weight * total(jax.lax.stop_gradient(-gap) * start)
    length, pull = total(jnp.square(gap)), total(gap * (noise - own))
    if settings.norm == "squared":
        return weight / sigma**2 * (settings.kappa * length + 2 * pull)
    smooth = jnp.sqrt(length + (sigma * settings.radius) ** 2)
    if settings.norm == "frozen":
        return weight / sigma * (settings.kappa / 2 * length + pull) / jax.lax.stop_gradient(smooth)
    return weight / sigma * (settings.kappa * smooth + pull / smooth)


@dataclasses.dataclass(frozen=True)
class OneStep:
    """How one call of a head makes a token of normal noise zeta (not published; ours, section 7).

    form: `eps`: x_0 = (u - sigma eps(u, time)) / alpha; `x0`: the first C outputs are x_0.
    time: t*, what the head is told; with `eps` early enough that sigma / alpha is not large.
    scale: u = sigma zeta, or with `one` zeta.
    """

    form: str = "eps"
    time: int = 755
    scale: str = "sigma"

    def __post_init__(self):
        for name, known in (("form", FORMS), ("scale", SCALES)):
            if getattr(self, name) not in known:
                raise ValueError(f"model.{name} {getattr(self, name)!r} is not one of {', '.join(known)}")
        if self.time < 0 or (self.form == "eps" and self.time > 998):
            raise ValueError(f"model.time {self.time} must be in [0, 998]; at 999 noise cannot be turned into a token")

    def draw(self, process: Process, head: Callable[[Array, Array], Array], zeta: Array) -> Array:
        """Tokens [..., C] of normal noise; head: (state [..., C], timestep []) -> first C outputs."""
        time = jnp.int32(self.time)
        state = zeta * (process.sigma[self.time] if self.scale == "sigma" else 1.0)
        out = head(state, jnp.asarray(process.timestep)[time])
        return out if self.form == "x0" else predicted_start(process, state, jnp.full(state.shape[:-1], time), out)
