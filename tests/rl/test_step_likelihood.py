"""Likelihoods of one call: hand-made values and the bias table (speed_rl spec 3; spec 9, oracle 9)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskrl_jax.rl.step_likelihood import KINDS, log_order_weight, position_likelihood

LOGP = jnp.log(jnp.array([[0.7, 0.2, 0.1], [0.5, 0.3, 0.2], [0.6, 0.3, 0.1]]))
IDS = jnp.array([0, 1, 3])
COMMITTED, REMASKED = jnp.array([True, False, False]), jnp.array([False, True, False])


def score(kind, logp=LOGP, threshold=0.4, tau=0.0):
    return position_likelihood(
        kind,
        logp,
        LOGP,
        IDS,
        COMMITTED,
        REMASKED,
        jnp.full(3, np.log(threshold), jnp.float32),
        jnp.full(3, tau),
    )


@pytest.mark.parametrize(
    ("kind", "remasked", "weight"),
    [("all", 0.3, 1.0), ("kept", 1.0, 0.0), ("hard", 0.3 + 0.2, 1.0), ("transition", 0.3 + 0.2, 1.0)],
)
def test_values_at_zero_noise(kind, remasked, weight):
    logp, logp_old, weights = jax.jit(functools.partial(score, kind))()
    np.testing.assert_allclose(logp, [np.log(0.7), np.log(remasked), 0.0], atol=1e-6)
    np.testing.assert_array_equal(logp, logp_old)
    np.testing.assert_array_equal(weights, [1.0, weight, 0.0])


def test_transition_weighs_codes_by_the_gumbel_law():
    probability = np.array([0.5, 0.3, 0.2])
    weight = np.exp(-np.exp(-(np.log(0.4) - np.log(probability)) / 2.0))
    np.testing.assert_allclose(score("transition", tau=2.0)[0][1], np.log((probability * weight).sum()), rtol=1e-5)


def test_hard_reads_no_noise_scale():
    np.testing.assert_array_equal(score("hard", tau=2.0)[0], score("transition", tau=0.0)[0])


def test_small_noise_tends_to_the_indicator():
    np.testing.assert_allclose(score("transition", tau=1e-3)[0], score("transition", tau=0.0)[0], atol=1e-6)


def test_order_weight_is_the_chance_to_rank_below_z_star():
    noise = jax.random.gumbel(jax.random.key(0), (100_000,))
    chance = (np.log(0.3) + 1.5 * noise < np.log(0.4)).mean()
    weight = log_order_weight(jnp.log(jnp.array([[0.3, 0.7]])), jnp.log(jnp.array([0.4])), jnp.array([1.5]))
    np.testing.assert_allclose(np.exp(weight[0, 0]), chance, atol=0.005)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tau", [0.0, 1e-6, 2.0])
@pytest.mark.parametrize("threshold", [0.0, 1e-30, 0.4, np.inf])
def test_gradients_stay_finite_at_the_extremes(kind, tau, threshold):
    """Padding rows carry infinite thresholds, the last call tau = 0."""
    with np.errstate(divide="ignore"):
        value, gradient = jax.value_and_grad(lambda x: score(kind, x, threshold, tau)[0].sum())(LOGP)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


def test_log_q_is_clamped():
    np.testing.assert_allclose(score("transition", threshold=1e-30)[0][1], -60.0, rtol=1e-6)


def test_only_scored_positions_get_gradient_and_the_old_policy_none():
    gradient = jax.grad(lambda x: score("transition", x)[0].sum())(LOGP)
    np.testing.assert_array_equal(gradient[2], np.zeros(3))
    assert np.abs(gradient[:2]).max() > 0

    def old(x):
        return position_likelihood("transition", LOGP, x, IDS, COMMITTED, REMASKED, jnp.zeros(3), jnp.ones(3))[1].sum()

    np.testing.assert_array_equal(jax.grad(old)(LOGP), np.zeros((3, 3)))


def test_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="transition"):
        score("joint")


TRIALS, POSITIONS, CODES = 10_000, 64, 16


@functools.cache
def table_draws():
    """Draw logits [64, 16], and the codes and Gumbel noise of 10,000 calls, shared by all settings."""
    rng = np.random.default_rng(0)
    logits = (1.5 * rng.normal(size=(POSITIONS, CODES))).astype(np.float32)
    cumulative = np.cumsum(np.exp(logits) / np.exp(logits).sum(-1, keepdims=True), -1)[:, :-1]
    ids = (rng.random((TRIALS, POSITIONS, 1)) > cumulative).sum(-1)
    return logits, ids.astype(np.int32), rng.gumbel(size=(TRIALS, POSITIONS)).astype(np.float32)


@jax.jit
def entropy_projections(logits, ids, noise, kept, tau):
    """Project scores on the unit gradient of the entropy, [4 likelihoods, calls]; unbiased = mean 0."""
    uphill = jax.grad(lambda x: -(jax.nn.softmax(x) * jax.nn.log_softmax(x)).sum())(logits)
    old = jax.nn.log_softmax(logits)
    confidence = old[jnp.arange(POSITIONS)[None], ids]
    noisy = confidence + tau * noise
    z_star = jnp.take_along_axis(jnp.sort(noisy, -1), jnp.full((len(ids), 1), POSITIONS - kept), -1)
    committed = noisy >= z_star
    lowest = jnp.where(committed, confidence, jnp.inf).min(-1, keepdims=True)

    def totals(x):
        def tiled(logp):
            return jnp.tile(logp, (len(ids), 1))

        masks = ids.ravel(), committed.ravel(), ~committed.ravel()
        scores = [
            position_likelihood(
                kind,
                tiled(jax.nn.log_softmax(x)),
                tiled(old),
                *masks,
                jnp.repeat(lowest if kind == "hard" else z_star, POSITIONS),
                jnp.full(ids.size, tau),
            )[0]
            for kind in KINDS
        ]
        return jnp.stack(scores).reshape(len(KINDS), len(ids), POSITIONS).sum(-1)

    return jax.jvp(totals, (logits,), (uphill / jnp.linalg.norm(uphill),))[1]


@functools.cache
def means_and_errors(kept, tau):
    """Give the mean projection of each likelihood and its standard error."""
    logits, ids, noise = table_draws()
    chunks = [slice(start, start + 500) for start in range(0, TRIALS, 500)]
    projections = np.concatenate(
        [entropy_projections(logits, ids[c], noise[c], kept, np.float32(tau)) for c in chunks], axis=1
    )
    error = projections.std(1) / np.sqrt(TRIALS)
    return {kind: (projections[row].mean(), error[row]) for row, kind in enumerate(KINDS)}


@pytest.mark.parametrize(("kept", "tau"), [(4, 0.0), (16, 0.0), (16, 0.5), (16, 2.0), (32, 2.0)])
def test_transition_and_all_are_unbiased(kept, tau):
    for kind in ("transition", "all"):
        mean, error = means_and_errors(kept, tau)[kind]
        assert abs(mean) < 4 * error, (kind, mean, error)


@pytest.mark.parametrize("tau", [0.0, 0.5, 2.0])
def test_kept_sharpens(tau):
    assert means_and_errors(16, tau)["kept"][0] < -0.2


def test_hard_is_exact_without_noise_and_wrong_with_it():
    mean, error = means_and_errors(16, 0.0)["hard"]
    assert abs(mean) < 4 * error
    assert means_and_errors(16, 2.0)["hard"][0] > 0.5
