"""Guided score implicit matching: the oracles of specs/marval.md section 15, and the one-step forms."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskrl_jax.distill import gsim
from maskrl_jax.distill.diffusion import Process, make_process
from maskrl_jax.distill.gsim import Gsim, OneStep

PROCESS = make_process()
RAW = Gsim(weight="raw")


def one_level(alpha: float, sigma: float) -> Process:
    """A process of one time."""
    fields = {field.name: np.zeros(1) for field in dataclasses.fields(Process)}
    return Process(
        **fields | {"timestep": np.zeros(1, np.int32), "alpha": np.array([alpha]), "sigma": np.array([sigma])}
    )


def teacher_score(x_R, alpha, sigma):
    """Of the oracles' mixture .4 N(-1.2, .5^2) + .6 N(.9, .7^2), noised, at x [R]."""

    def log_density(x):
        parts = [
            jnp.log(share) - (x - alpha * mean) ** 2 / (2 * var) - 0.5 * jnp.log(var)
            for share, mean, std in ((0.4, -1.2, 0.5), (0.6, 0.9, 0.7))
            for var in [alpha**2 * std**2 + sigma**2]
        ]
        return jnp.logaddexp(*parts)

    return jax.vmap(jax.grad(log_density))(x_R)


def integrated(settings: Gsim, m: float, s: float):
    """Loss of the 1-D student x_0 = m + s zeta under exact scores, by the trapezoid rule; its own scores are frozen."""
    alpha, sigma = 0.8, 0.6
    grid = jnp.linspace(-9.0, 9.0, 1201)
    zeta, eps = (x[..., None] for x in jnp.meshgrid(grid, grid, indexing="ij"))
    density = jnp.exp(-(zeta**2 + eps**2) / 2)[..., 0] / (2 * math.pi) * (grid[1] - grid[0]) ** 2
    held_m, held_s = jax.lax.stop_gradient((m, s))

    start = m + s * zeta
    state = alpha * start + sigma * eps
    own = -(state - alpha * held_m) / (alpha**2 * held_s**2 + sigma**2)
    teacher = teacher_score(state.reshape(-1), alpha, sigma).reshape(state.shape)
    step = jnp.zeros(start.shape[:-1], jnp.int32)
    rows = gsim.row_losses(settings, one_level(alpha, sigma), step, eps, -sigma * own, -sigma * teacher, start)
    return (rows * density).sum()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (Gsim("squared", weight="raw"), (-0.123273, -1.736983)),
        (Gsim("squared", kappa=0.0, weight="raw"), (0.815630, -2.457909)),
        (Gsim(radius=0.3, weight="raw"), (-0.279107, -0.848837)),
        (Gsim(radius=0.3, kappa=0.0, weight="raw"), (0.112517, -1.150290)),
        (Gsim("frozen", radius=0.3, weight="raw"), (-0.279107, -1.351574)),
    ],
)
def test_gradient_of_a_known_divergence(settings, expected):
    with jax.enable_x64(True):
        found = jax.grad(integrated, argnums=(1, 2))(settings, jnp.float64(0.7), jnp.float64(0.6))
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("norm", "expected"), [("squared", 0.699368), ("huber", 0.409497)])
def test_value_of_a_known_divergence(norm, expected):
    """The implicit part has mean 0 under exact scores, so that the whole is the divergence."""
    settings = Gsim(norm, radius=0.3, weight="raw")
    with jax.enable_x64(True):
        whole, implicit = (integrated(dataclasses.replace(settings, kappa=k), 0.7, 0.6) for k in (1.0, 0.0))
        np.testing.assert_allclose(implicit, 0, atol=1e-6)
        np.testing.assert_allclose(whole - (0.3 if norm == "huber" else 0), expected, atol=1e-5)


def test_the_sum_over_times_is_the_divergence():
    """Of normal samples from the same mixture: weight `kl`, squared norm, exact scores (section 15, oracle 2)."""
    grid = np.linspace(-9.0, 9.0, 4001)
    with jax.enable_x64(True):

        def term(step):
            alpha, sigma = (jnp.asarray(column, jnp.float64)[step] for column in (PROCESS.alpha, PROCESS.sigma))

            mean, var = alpha * 0.7, alpha**2 * 0.6**2 + sigma**2
            own, teacher = -(grid - mean) / var, teacher_score(jnp.asarray(grid), alpha, sigma)
            # The draw is what is predicted of it: nothing is implicit.
            noises = (-sigma * score[:, None] for score in (own, own, teacher))
            settings, steps = Gsim("squared", weight="kl"), jnp.full(len(grid), step)
            rows = gsim.row_losses(settings, PROCESS, steps, *noises, start=jnp.zeros((len(grid), 1)))
            density = jnp.exp(-((grid - mean) ** 2) / (2 * var)) / jnp.sqrt(2 * math.pi * var)
            return (rows * density).sum() * (grid[1] - grid[0])

        total = jax.jit(lambda: jax.lax.map(term, jnp.arange(1000)).sum())()
    np.testing.assert_allclose(total, 0.46999, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (RAW, (12.154277, 2.875829, 2.206782, 2.051238)),
        (dataclasses.replace(RAW, norm="squared"), (19.447398, 1.088759, 0.641099, 0.553910)),
        (dataclasses.replace(RAW, norm="squared", kappa=0.0), (-531.878568, -29.777121, -17.533805, -15.149208)),
    ],
)
def test_values_of_a_vector(settings, expected):
    i = np.arange(1.0, 17)
    own, teacher, noise = (jnp.tile(jnp.float32(x), (4, 1)) for x in (np.sin(i), np.cos(i), 0.1 * i - 0.8))
    np.testing.assert_allclose(jnp.linalg.norm(own - teacher, axis=-1), 3.958670, rtol=1e-6)
    step = jnp.array([100, 500, 755, 970])
    found = gsim.row_losses(settings, PROCESS, step, noise, own, teacher, jnp.zeros_like(own))
    np.testing.assert_allclose(found, expected, rtol=2e-5)


def random_rows(count=7, channels=3):
    draw = lambda i: jax.random.normal(jax.random.key(i), (count, channels))  # noqa: E731
    return *(draw(i) for i in range(4)), jnp.arange(100, 100 * (count + 1), 100)


@pytest.mark.parametrize(("kappa", "share"), [(1.0, 0.5), (0.0, 1.0), (-0.4, 1.2)])
def test_squared_norm_is_score_identity_distillation(kappa, share):
    """SiD's bracket in tokens, at any value of its alpha."""
    noise, own, teacher, start, step = random_rows()
    alpha, sigma = (jnp.asarray(x)[step][:, None] for x in (PROCESS.alpha, PROCESS.sigma))
    state = alpha * start + sigma * noise
    own_start, teacher_start = ((state - sigma * x) / alpha for x in (own, teacher))
    gap = teacher_start - own_start
    bracket = (gap * ((teacher_start - start) - share * gap)).sum(-1)
    found = gsim.row_losses(Gsim("squared", kappa, weight="raw"), PROCESS, step, noise, own, teacher, start)
    np.testing.assert_allclose(found, 2 * (alpha**2 / sigma**4)[:, 0] * bracket, rtol=1e-3, atol=1e-3)


def test_equal_scores_have_no_loss():
    noise, own, _, start, step = random_rows()
    loss = lambda own: gsim.row_losses(Gsim(), PROCESS, step, noise, own, own, start).sum()  # noqa: E731
    assert abs(loss(own)) < 1e-4
    np.testing.assert_array_equal(jax.grad(loss)(own), 0)


def test_the_fallback_moves_tokens_towards_the_teacher_s_score():
    noise, own, teacher, start, step = random_rows()
    loss = lambda start: gsim.row_losses(Gsim("dmd"), PROCESS, step, noise, own, teacher, start).sum()  # noqa: E731
    expected = -jnp.asarray(PROCESS.sigma)[step][:, None] * (own - teacher)
    np.testing.assert_allclose(jax.grad(loss)(start), expected, rtol=1e-6)


def test_a_norm_over_an_image_is_one_of_all_its_channels():
    noise, own, teacher, start, _ = (x.reshape(1, 6, 3) if x.ndim > 1 else x for x in random_rows(6))
    step = jnp.full((1, 6), 300)
    image = gsim.row_losses(dataclasses.replace(RAW, over="image"), PROCESS, step, noise, own, teacher, start)
    flat = [x.reshape(1, 18) for x in (noise, own, teacher, start)]
    np.testing.assert_allclose(image[:, 0], gsim.row_losses(RAW, PROCESS, jnp.array([300]), *flat), rtol=1e-5)


def test_time_weights():
    step = jnp.array([100, 755])
    alpha, sigma = PROCESS.alpha[[100, 755]], PROCESS.sigma[[100, 755]]
    found = {name: gsim.time_weight(Gsim("squared", weight=name), PROCESS, step) for name in gsim.WEIGHTS}
    np.testing.assert_allclose(found["sigma"], sigma)
    np.testing.assert_allclose(found["x0"], sigma**2 / alpha, rtol=1e-6)
    np.testing.assert_allclose(found["raw"], 1)
    np.testing.assert_allclose(found["kl"], np.exp(PROCESS.log_beta[[100, 755]]) / 2, rtol=1e-6)


def test_guidance_of_one_is_none():
    null, own = jnp.array([1.0]), jnp.array([3.0])
    assert [float(gsim.guided(null, own, w)[0]) for w in (0.0, 1.0, 1.5)] == [1.0, 3.0, 4.0]


@pytest.mark.parametrize(
    ("mean", "std", "expected"), [(0.0, 1.0, (0.0, 0.34465**2)), (0.5, 0.8, (0.453615, 0.232087**2))]
)
def test_one_step_of_the_exact_noise(mean, std, expected):
    """With exact noise the map is affine in zeta: its mean and slope are the token's mean and deviation."""

    def head(state, timestep):
        alpha, sigma = (jnp.asarray(x)[timestep] for x in (PROCESS.alpha, PROCESS.sigma))
        return sigma * (state - mean * alpha) / (std**2 * alpha**2 + sigma**2)

    tokens = OneStep().draw(PROCESS, head, jnp.array([[0.0], [1.0]]))[:, 0]
    np.testing.assert_allclose((tokens[0], (tokens[1] - tokens[0]) ** 2), expected, atol=2e-5)


def test_other_one_step_forms():
    zeta = jnp.array([[1.0, -2.0]])
    head = lambda state, timestep: state * 2 + timestep  # noqa: E731
    np.testing.assert_allclose(OneStep("x0", 999, "one").draw(PROCESS, head, zeta), 2 * zeta + 999)
    alpha, sigma = PROCESS.alpha[399], PROCESS.sigma[399]
    found = OneStep(time=399, scale="one").draw(PROCESS, lambda state, _: state, zeta)
    np.testing.assert_allclose(found, (1 - sigma) / alpha * zeta, rtol=1e-6)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: Gsim("l1"), "norm"),
        (lambda: Gsim(weight="kl"), "squared"),
        (lambda: Gsim(radius=0.0), "radius"),
        (lambda: Gsim(first=30, last=20), "first"),
        (lambda: OneStep("v"), "form"),
        (lambda: OneStep(time=999), "998"),
    ],
)
def test_bad_settings_are_refused(make, named):
    with pytest.raises(ValueError, match=named):
        make()
