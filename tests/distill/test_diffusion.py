"""The diffusion of a token: parity with the reference, and the oracles of specs/mar.md section 12."""

import fixtures
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskrl_jax.distill import diffusion
from maskrl_jax.distill.diffusion import make_process

PROCESS = make_process()
COLUMNS = {
    "sqrt_alphas_cumprod": "alpha",
    "sqrt_one_minus_alphas_cumprod": "sigma",
    "posterior_log_variance_clipped": "log_posterior",
    "posterior_mean_coef1": "to_start",
    "posterior_mean_coef2": "to_state",
}


@fixtures.every_configuration("mar_diffusion")
def test_tables_are_the_reference_s(folder):
    outputs = fixtures.load(folder)[3]
    for steps in sorted({int(name.split(".")[0].removeprefix("steps")) for name in outputs}):
        table = {name.split(".")[1]: x for name, x in outputs.items() if name.startswith(f"steps{steps}.")}
        found = make_process(1000, None if steps == 1000 else steps)
        assert len(found) == steps
        for theirs, ours in COLUMNS.items():
            np.testing.assert_allclose(getattr(found, ours), table[theirs], rtol=1e-6, atol=1e-12)
        np.testing.assert_allclose(np.exp(found.log_beta), table["betas"], rtol=1e-5)
        np.testing.assert_allclose(found.alpha_before**2, table["alphas_cumprod_prev"], rtol=1e-6, atol=1e-12)
        if "timestep_map" in table:
            np.testing.assert_array_equal(found.timestep, table["timestep_map"])


@fixtures.every_configuration("mar")
def test_losses_are_the_reference_s(folder):
    config, _, inputs, outputs = fixtures.load(folder)
    start = jnp.tile(outputs["tokens"].reshape(-1, config["token_dim"]), (config["ctor"]["diffusion_batch_mul"], 1))
    step, noise = np.int32(inputs["loss_t"]), inputs["loss_noise"]
    np.testing.assert_allclose(diffusion.noised(PROCESS, start, step, noise), outputs["x_t"], atol=1e-6)
    error, bound = diffusion.row_losses(PROCESS, start, step, noise, outputs["net_out"])
    np.testing.assert_allclose(error, outputs["mse_per_sample"], rtol=1e-5)
    np.testing.assert_allclose(bound, outputs["vb_per_sample"], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(error + bound, outputs["loss_per_sample"], rtol=1e-4, atol=1e-4)


@fixtures.every_configuration("mar")
def test_steps_are_the_reference_s(folder):
    config, state, inputs, outputs = fixtures.load(folder)
    process, step = make_process(1000, int(config["ctor"]["num_sampling_steps"])), np.int32(inputs["step_t"])
    head = fixtures.mar_head(config, state, inputs["step_cond"])
    guess, share = diffusion.split(head(inputs["step_x"], process.timestep[step]))
    start = diffusion.predicted_start(process, inputs["step_x"], step, guess)
    scale = lambda name: 1e-4 * np.abs(outputs[name]).max()  # noqa: E731 - of the output, as the issue has it
    np.testing.assert_allclose(start, outputs["step_pred_x0"], rtol=0, atol=scale("step_pred_x0"))
    mean = diffusion.posterior_mean(process, start, inputs["step_x"], step)
    np.testing.assert_allclose(mean, outputs["step_mean"], rtol=0, atol=scale("step_mean"))
    log_variance = diffusion.log_variance(process, step, share)
    np.testing.assert_allclose(log_variance, outputs["step_log_variance"], rtol=0, atol=scale("step_log_variance"))
    sample = diffusion.earlier(process, "ddpm", inputs["step_x"], step, guess, share, 0.7 * inputs["step_noise"])
    np.testing.assert_allclose(sample, outputs["step_sample_temp0_7"], rtol=0, atol=scale("step_sample_temp0_7"))


@fixtures.every_configuration("mar")
@pytest.mark.parametrize("kind", ["chain", "chain_cfg"])
def test_chains_are_the_reference_s(folder, kind):
    config, state, inputs, outputs = fixtures.load(folder)
    process = make_process(1000, int(config["ctor"]["num_sampling_steps"]))
    cond, rows = inputs[f"{kind}_cond"], None
    if kind == "chain":
        head, null = fixtures.mar_head(config, state, cond), None
        first, noise = inputs["chain_noise"][0], inputs["chain_noise"][1:]
    else:
        first = inputs["chain_cfg_init_noise"]
        rows = len(first)
        head, null = fixtures.mar_head(config, state, cond[:rows]), fixtures.mar_head(config, state, cond[rows:])
        noise = inputs["chain_cfg_step_noise"][:, :rows]

    def guided(x, timestep):
        guess, share = diffusion.split(head(x, timestep))
        if null is None:
            return guess, share
        empty, _ = diffusion.split(null(x, timestep))
        return empty + config[kind]["cfg"] * (guess - empty), share

    noise = jnp.asarray(noise)
    with jax.default_matmul_precision("highest"):
        run = jax.jit(
            lambda x: diffusion.run_chain(process, guided, x, lambda i: noise[i], config[kind]["temperature"])
        )
        found = run(first)
    wanted = outputs[f"{kind}_sample"][:rows]
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4 * np.abs(wanted).max())


def test_alpha_bar():
    expected = {0: 9.999587e-1, 100: 9.715757e-1, 250: 8.458880e-1, 500: 4.922852e-1, 755: 1.377636e-1}
    expected |= {900: 2.361611e-2, 970: 2.041204e-3, 998: 2.428767e-6, 999: 2.428767e-9}
    abar = diffusion.cosine_alpha_bar(1000)
    np.testing.assert_allclose([abar[i] for i in expected], list(expected.values()), rtol=1e-6)
    np.testing.assert_allclose(np.exp(PROCESS.log_beta[[0, 998, 999]]), [4.128422e-5, 0.749999, 0.999], rtol=2e-6)
    beta = np.exp(make_process(1000, 100).log_beta[[0, 98, 99]])
    np.testing.assert_allclose(beta, [4.128422e-5, 0.749939, 0.999990], rtol=2e-6)


def test_a_chain_visits_the_published_places():
    places = diffusion.respaced(1000, 100)
    np.testing.assert_array_equal(places[:7], [0, 10, 20, 30, 40, 50, 61])
    np.testing.assert_array_equal(places[-2:], [989, 999])


def test_loss_of_a_head_that_has_learnt_nothing():
    """Zeros out: the bound's expectation by time, in bits, for unit-normal tokens."""
    start, noise = (jax.random.normal(jax.random.key(i), (4, 20_000, 4)) for i in range(2))
    step = jnp.broadcast_to(jnp.array([1, 500, 998, 999])[:, None], start.shape[:2])
    error, bound = diffusion.row_losses(PROCESS, start, step, noise, jnp.zeros((*start.shape[:2], 8)))
    np.testing.assert_allclose(error.mean(), 1, atol=0.01)
    np.testing.assert_allclose(bound.mean(1), [0.5990, 0.004505, 2.1640, 720.63], rtol=0.02)
    _, first = diffusion.row_losses(PROCESS, start, jnp.zeros_like(step), noise, jnp.zeros((*start.shape[:2], 8)))
    np.testing.assert_allclose(first.mean(), 1.472, rtol=0.02)


def test_the_bound_does_not_train_the_noise():
    start, noise, out = (jax.random.normal(jax.random.key(i), (5, n)) for i, n in enumerate((3, 3, 6)))
    grad = jax.grad(lambda out: diffusion.row_losses(PROCESS, start, jnp.arange(5), noise, out)[1].sum())(out)
    np.testing.assert_array_equal(grad[:, :3], 0)
    assert np.abs(grad[1:, 3:]).min() > 0


@pytest.mark.parametrize(
    ("temperature", "share", "deviation"),
    [(1.0, -1, 0.77928), (1.0, 0, 0.79031), (1.0, 1, 0.80220), (0.95, -1, 0.74032), (0.95, 1, 0.76209)],
)
def test_a_chain_of_the_exact_noise_draws_the_data(temperature, share, deviation):
    """Everything is linear: variance follows from the response to the start and to each step's noise."""
    process = make_process(1000, 100)

    def head(x, timestep):
        alpha, sigma = (jnp.asarray(column)[timestep] for column in (PROCESS.alpha, PROCESS.sigma))
        return sigma * (x - 0.5 * alpha) / (0.64 * alpha**2 + sigma**2), jnp.full_like(x, share)

    unit = jnp.eye(
        101
    )  # row i: noise 1 at place i - 1 of the chain, row 0: at its start; column 0 of a row is its value
    columns = jnp.concatenate([unit, jnp.zeros((1, 101))])[..., None]
    ends = diffusion.run_chain(process, head, columns[:, 0], lambda place: columns[:, 1:][:, place], temperature)[:, 0]
    np.testing.assert_allclose(ends[-1], 0.5, atol=1e-4)
    np.testing.assert_allclose(np.sqrt(((ends[:-1] - ends[-1]) ** 2).sum()), deviation, atol=2e-4)


def test_ddim_of_the_exact_noise_keeps_the_data():
    """The deterministic chain maps the prior's quantiles onto the data's, the more steps the better."""

    def head(x, timestep):
        alpha, sigma = (jnp.asarray(column)[timestep] for column in (PROCESS.alpha, PROCESS.sigma))
        return sigma * (x - 0.5 * alpha) / (0.64 * alpha**2 + sigma**2), jnp.zeros_like(x)

    start = jnp.array([[0.0], [1.0]])
    ends = diffusion.run_chain(make_process(1000, 250), head, start, lambda _: jnp.zeros_like(start), method="ddim")
    np.testing.assert_allclose(ends[:, 0], [0.5, 1.3], atol=0.01)


@pytest.mark.parametrize("kept", [1, 1001])
def test_a_chain_of_impossible_length_is_refused(kept):
    with pytest.raises(ValueError, match=f"{kept} steps"):
        make_process(1000, kept)


def test_an_unknown_method_is_refused():
    with pytest.raises(ValueError, match="euler"):
        diffusion.run_chain(make_process(1000, 5), None, jnp.zeros((1, 1)), None, method="euler")
