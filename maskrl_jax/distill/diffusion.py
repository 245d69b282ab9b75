"""The Gaussian diffusion of a token that MAR's head runs (arXiv 2406.11838): schedule, loss, respaced sampling.

specs/mar.md sections 5 and 7. Axes: S steps, R rows (tokens), C channels; a row has its own step. Everything is
float32: at the first steps of a chain an error of the predicted noise is multiplied by hundreds.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
NATS_A_BIT = math.log(2.0)
DDPM, DDIM = "ddpm", "ddim"
METHODS = (DDPM, DDIM)


@dataclasses.dataclass(frozen=True, eq=False)
class Process:
    """Constants of S steps, float32 [S]; computed in float64.

    Attributes:
      timestep: int32, what the head is told: the steps' places among all T.
      alpha, sigma: x_t = alpha x_0 + sigma eps.
      log_beta, log_posterior: log variances that v = 1 and v = -1 stand for; the first of the posterior is the second.
      to_start, to_state: weights of x_0 and x_t in the posterior's mean.
      alpha_before, sigma_before: alpha and sigma one step earlier in time; 1 and 0 at the first.
    """

    timestep: np.ndarray
    alpha: np.ndarray
    sigma: np.ndarray
    log_beta: np.ndarray
    log_posterior: np.ndarray
    to_start: np.ndarray
    to_state: np.ndarray
    alpha_before: np.ndarray
    sigma_before: np.ndarray

    def __len__(self) -> int:
        return len(self.timestep)


def cosine_alpha_bar(steps: int) -> np.ndarray:
    """abar float64 [T] of the cosine schedule, every beta at most 0.999."""
    times = (np.arange(steps + 1) / steps + 0.008) / 1.008
    kept = np.cos(times * np.pi / 2) ** 2
    return np.cumprod(1 - np.minimum(1 - kept[1:] / kept[:-1], 0.999))


def respaced(steps: int, kept: int) -> np.ndarray:
    """The `kept` of `steps` places that a chain visits, int32: evenly from the first to the last, as published."""
    if not 2 <= kept <= steps:
        raise ValueError(f"a chain of {kept} steps needs 2 to {steps} of them")
    return np.round(np.arange(kept) * (steps - 1) / (kept - 1)).astype(np.int32)


@functools.lru_cache(maxsize=16)
def make_process(steps: int = 1000, kept: int | None = None) -> Process:
    """The cosine process of `steps`, or of the `kept` of them that a chain visits."""
    if steps < 2:
        raise ValueError(f"a diffusion of {steps} steps needs at least 2")
    timestep = np.arange(steps, dtype=np.int32) if kept is None else respaced(steps, kept)
    abar = cosine_alpha_bar(steps)[timestep]
    before = np.concatenate([[1.0], abar[:-1]])
    beta = 1 - abar / before
    posterior = beta * (1 - before) / (1 - abar)
    posterior[0] = posterior[1]  # 0: its logarithm is not used
    columns = {
        "alpha": np.sqrt(abar),
        "sigma": np.sqrt(1 - abar),
        "log_beta": np.log(beta),
        "log_posterior": np.log(posterior),
        "to_start": beta * np.sqrt(before) / (1 - abar),
        "to_state": (1 - before) * np.sqrt(1 - beta) / (1 - abar),
        "alpha_before": np.sqrt(before),
        "sigma_before": np.sqrt(1 - before),
    }
    return Process(timestep, **{name: column.astype(np.float32) for name, column in columns.items()})


def _at(column: np.ndarray, step: Array) -> Array:
    return jnp.asarray(column)[step][..., None]


def noised(process: Process, start: Array, step: Array, noise: Array) -> Array:
    """x_t [..., C] of x_0 and eps [..., C] at steps int32 [...]."""
    return _at(process.alpha, step) * start + _at(process.sigma, step) * noise


def predicted_start(process: Process, state: Array, step: Array, noise: Array) -> Array:
    """x_0 [..., C] that the predicted noise [..., C] stands for; never clipped."""
    return (state - _at(process.sigma, step) * noise) / _at(process.alpha, step)


def noise_of_velocity(process: Process, state: Array, step: Array, velocity: Array) -> Array:
    """eps [..., C] = sigma_t x_t + alpha_t v of a predicted velocity v = alpha_t eps - sigma_t x_0 (arXiv 2202.00512).

    A head that predicts noise must be right to 1e-4 at late times, for x_0 divides its error by alpha_t (specs/mar.md
    section 8); one that predicts a velocity need not be.
    """
    return _at(process.sigma, step) * state + _at(process.alpha, step) * velocity


def start_of_velocity(process: Process, state: Array, step: Array, velocity: Array) -> Array:
    """x_0 [..., C] = alpha_t x_t - sigma_t v of a predicted velocity, at any time."""
    return _at(process.alpha, step) * state - _at(process.sigma, step) * velocity


def spread_times(key: Array, shape: tuple[int, ...], first: int, last: int) -> Array:
    """Times int32 [M,...] in first..last, uniform, the m-th repetition's from the m-th of M equal spans (our choice)."""
    spans = jnp.arange(shape[0]).reshape(-1, *[1] * (len(shape) - 1))
    share, count = (spans + jax.random.uniform(key, shape)) / shape[0], last + 1 - first
    return first + jnp.minimum((share * count).astype(jnp.int32), count - 1)


def velocity_error(process: Process, step: Array, noise_error: Array) -> Array:
    """Squared error [...] of a velocity, of that of the noise that it stands for: divided by alpha_t^2."""
    return noise_error / jnp.square(jnp.asarray(process.alpha)[step])


def split(out: Array) -> tuple[Array, Array]:
    """Head output [..., 2C] -> (predicted noise, v), each [..., C]."""
    noise, share = jnp.split(out, 2, axis=-1)
    return noise, share


def log_variance(process: Process, step: Array, share: Array) -> Array:
    """log variance [..., C] that v stands for: between the posterior's (-1) and beta (1)."""
    high = (share + 1) / 2
    return high * _at(process.log_beta, step) + (1 - high) * _at(process.log_posterior, step)


def posterior_mean(process: Process, start: Array, state: Array, step: Array) -> Array:
    """Mean of x_{t-1} given x_0 and x_t."""
    return _at(process.to_start, step) * start + _at(process.to_state, step) * state


def row_losses(process: Process, start: Array, step: Array, noise: Array, out: Array) -> tuple[Array, Array]:
    """(squared error of the noise, variational bound in bits), each [...], means over channels.

    Of the bound v alone learns; it is a KL divergence for t > 0 and a discretised likelihood at t = 0.
    """
    state = noised(process, start, step, noise)
    guess, share = split(out)
    error = jnp.square(noise - guess).mean(-1)
    guessed_start = predicted_start(process, state, step, jax.lax.stop_gradient(guess))
    mean = posterior_mean(process, guessed_start, state, step)
    log_var = log_variance(process, step, share)
    true_mean = posterior_mean(process, start, state, step)
    true_log_var = _at(process.log_posterior, step)
    gap = jnp.square(true_mean - mean) * jnp.exp(-log_var)
    divergence = 0.5 * (log_var - true_log_var - 1 + jnp.exp(true_log_var - log_var) + gap)
    likelihood = -_log_bin(start, mean, 0.5 * log_var)
    bound = jnp.where(step[..., None] == 0, likelihood, divergence)
    return error, bound.mean(-1) / NATS_A_BIT


def _log_bin(x: Array, mean: Array, log_scale: Array) -> Array:
    """log probability of the 8-bit bin of x under a normal distribution; the outermost bins are open."""
    below, above = ((x - mean + half) * jnp.exp(-log_scale) for half in (-1 / 255, 1 / 255))
    low, high = _normal_cdf(below), _normal_cdf(above)
    inside = jnp.log(jnp.maximum(high - low, 1e-12))
    first, last = jnp.log(jnp.maximum(high, 1e-12)), jnp.log(jnp.maximum(1 - low, 1e-12))
    return jnp.where(x < -0.999, first, jnp.where(x > 0.999, last, inside))


def _normal_cdf(x: Array) -> Array:
    """The tanh approximation that the published code uses."""
    return 0.5 * (1 + jnp.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def earlier(
    process: Process, method: str, state: Array, step: Array, guess: Array, share: Array, noise: Array
) -> Array:
    """x_{t-1} [..., C]: ancestral (`ddpm`), or without any noise of its own (`ddim`, eta 0).

    `noise` is already scaled by the temperature; it is not used at the first step.
    """
    start = predicted_start(process, state, step, guess)
    if method == DDIM:
        return _at(process.alpha_before, step) * start + _at(process.sigma_before, step) * guess
    mean = posterior_mean(process, start, state, step)
    spread = jnp.exp(0.5 * log_variance(process, step, share))
    return mean + jnp.where(step[..., None] > 0, spread, 0.0) * noise


def run_chain(
    process: Process,
    head: Callable[[Array, Array], tuple[Array, Array]],
    state: Array,
    noise: Callable[[Array], Array],
    temperature: float | Array = 1.0,
    method: str = DDPM,
) -> Array:
    """Run a chain from x_T [..., C] to x_0.

    Args:
      head: (x_t [..., C], timestep int32 []) -> (guided noise, v); one guided call a step.
      noise: place in the chain, int32 [], counting up from 0 -> normal noise [..., C].
    """
    if method not in METHODS:
        raise ValueError(f"sampling method {method!r} is not one of {', '.join(METHODS)}")
    last = len(process) - 1

    def one(state, place):
        step = last - place
        guess, share = head(state, jnp.asarray(process.timestep)[step])
        steps = jnp.full(state.shape[:-1], step)
        return earlier(process, method, state, steps, guess, share, temperature * noise(place)), None

    return jax.lax.scan(one, state, jnp.arange(last + 1))[0]
