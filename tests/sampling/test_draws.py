"""Parts of a step: token draws, commits, guidance."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_model

from maskrl_jax.sampling import draws

LAW = np.array([0.0, 0.5, 0.0, 0.3, 0.2, 0.0])  # impossible codes first, in the middle, last


def logp_of(law, batch, num_tokens):
    with np.errstate(divide="ignore"):
        return jnp.broadcast_to(jnp.log(jnp.asarray(law, jnp.float32)), (batch, num_tokens, len(law)))


def test_tokens_follow_their_law_and_bring_their_log_probability():
    keys = jax.random.split(jax.random.key(0), 200)
    ids, confidence = jax.jit(draws.draw_tokens)(keys, logp_of(LAW, 200, 100))
    share = np.bincount(np.ravel(ids), minlength=6) / ids.size
    assert (np.abs(share - LAW) <= 4 * np.sqrt(LAW * (1 - LAW) / ids.size)).all()  # no slack where LAW is 0
    np.testing.assert_allclose(confidence, np.log(LAW[ids]), rtol=1e-6)
    assert (ids.dtype, confidence.dtype) == (jnp.int32, jnp.float32)


def test_positions_and_samples_are_drawn_independently():
    keys = jax.random.split(jax.random.key(1), 400)
    ids = np.asarray(draws.draw_tokens(keys, logp_of([0.5, 0.5], 400, 50))[0])
    for first, second in ((ids[:, :-1], ids[:, 1:]), (ids[:-1], ids[1:])):
        together = (first & second).mean()
        np.testing.assert_allclose(together, 0.25, atol=4 * np.sqrt(0.25 * 0.75 / first.size))


@pytest.mark.parametrize(("uniform", "expected"), [(0.0, 1), (1 - 2**-24, 4)])
def test_ends_of_the_uniform_never_give_an_impossible_code(monkeypatch, uniform, expected):
    keys = jax.random.split(jax.random.key(2), 1)
    monkeypatch.setattr(jax.random, "uniform", lambda key, shape: jnp.full(shape, uniform, jnp.float32))
    assert draws.draw_tokens(keys, logp_of(LAW, 1, 3))[0].tolist() == [[expected] * 3]


def test_unnormalised_log_probabilities_are_drawn_from_in_proportion():
    keys = jax.random.split(jax.random.key(3), 200)
    ids, _ = draws.draw_tokens(keys, logp_of([0.01, 0.03], 200, 100))
    np.testing.assert_allclose(np.mean(ids), 0.75, atol=4 * np.sqrt(0.75 * 0.25 / ids.size))


def test_a_sample_draws_the_same_whatever_is_around_it():
    order = jnp.array([3, 0])
    everyone = [draws.step_keys(jax.random.split(jax.random.key(4), 5), 2, purpose) for purpose in (0, 1)]
    some = [draws.step_keys(jax.random.split(jax.random.key(4), 5)[order], 2, purpose) for purpose in (0, 1)]
    logp = jax.nn.log_softmax(jax.random.normal(jax.random.key(5), (5, 7, 11)))
    ids = draws.draw_tokens(everyone[0], logp)[0]
    np.testing.assert_array_equal(draws.draw_tokens(some[0], logp[order])[0], ids[order])
    np.testing.assert_array_equal(draws.gumbel(some[1], 7), draws.gumbel(everyone[1], 7)[order])


def test_keys_differ_by_sample_step_and_purpose():
    keys = jax.random.split(jax.random.key(6), 2)
    purposes = (draws.TOKENS, draws.NOISE, draws.DECISION, draws.ORDER)
    data = [jax.random.key_data(draws.step_keys(keys, step, p)) for step in (0, 1) for p in purposes]
    assert len({tuple(row) for rows in np.asarray(data).tolist() for row in rows}) == 2 * 4 * 2


def test_gumbel_noise_has_the_mean_and_spread_of_its_law():
    noise = draws.gumbel(jax.random.split(jax.random.key(7), 100), 200)
    np.testing.assert_allclose(noise.mean(), 0.5772, atol=4 * 1.2825 / np.sqrt(20_000))
    np.testing.assert_allclose(noise.std(), np.pi / np.sqrt(6), rtol=0.03)


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (0, [0, 0, 0, 0, 0]),
        (1, [0, 0, 1, 0, 0]),
        (2, [1, 0, 1, 0, 0]),  # positions 0 and 3 tie: the lower index goes first
        (3, [1, 0, 1, 1, 0]),
        (9, [1, 0, 1, 1, 1]),  # position 1 is known, whatever its priority
    ],
)
def test_commit_top_takes_the_exact_count_of_masked_positions(count, expected):
    priority = jnp.array([[0.5, 9.0, 0.7, 0.5, -8.0], [0.0] * 5])
    masked = jnp.array([[True, False, True, True, True], [True] * 5])
    chosen = draws.commit_top(priority, masked, jnp.array([count, 2]))
    assert chosen.tolist() == [[bool(x) for x in expected], [True, True, False, False, False]]


@pytest.mark.parametrize(("scale", "expected"), [(0.0, 1.0), (1.0, 4.0), (2.0, 7.0)])
def test_guidance_extrapolates_from_the_null_condition(scale, expected):
    """u + s (c - u) with c = 4 and u = 1."""

    def logits(ids, timestep, cond):
        return jnp.broadcast_to(cond["class"][:, None, None], (*ids.shape, 3)).astype(jnp.float32)

    fn = draws.guided(logits, {"class": jnp.int32(1)})
    zero = jnp.zeros((2, 3), jnp.int32)
    found = fn(zero, zero[:, 0], {"class": jnp.array([4, 1])}, jnp.array([scale, 5.0]))
    np.testing.assert_allclose(found, np.broadcast_to(np.array([expected, 1.0])[:, None, None], (2, 3, 3)))


def test_guidance_shows_both_branches_the_same_grid_and_timestep():
    model, ids = toy_model.contextual(5), jax.random.randint(jax.random.key(8), (2, 4), 0, 6)
    timestep, cond = jnp.array([7, 9]), jnp.array([1, 2])
    plain, null = model(ids, timestep, cond), model(ids, timestep, jnp.zeros(2, jnp.int32))
    found = draws.guided(model, jnp.int32(0))(ids, timestep, cond, jnp.array([3.0, 0.5]))
    np.testing.assert_allclose(found[0], null[0] + 3 * (plain - null)[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found[1], null[1] + 0.5 * (plain - null)[1], rtol=1e-5, atol=1e-5)


def test_entropy_in_nats():
    logp = jnp.log(jnp.array([[[0.5, 0.5], [0.25, 0.75]]]))
    expected = [np.log(2), -(0.25 * np.log(0.25) + 0.75 * np.log(0.75))]
    np.testing.assert_allclose(draws.entropy(logp), [expected], rtol=1e-6)


def check_commit(rule, kappa, minimum, last, committed, c_star):
    """Confidences .9 .3 .6, and a known token that must not be touched."""
    chosen, log_c = rule(
        jnp.log(jnp.array([[0.9, 0.3, 0.6, 0.99]])),
        masked_BN=jnp.array([[True, True, True, False]]),
        log_kappa_B=jnp.log(jnp.array([kappa])),
        minimum_B=jnp.array([minimum]),
        last_B=jnp.array([last]),
    )
    np.testing.assert_array_equal(chosen, [np.array(committed, bool)])
    np.testing.assert_allclose(np.exp(log_c), [c_star], rtol=1e-6)


@pytest.mark.parametrize(
    "case",
    [
        (0.55, 1, False, [1, 0, 1, 0], 0.55),
        (0.95, 2, False, [1, 0, 1, 0], 0.6),
        (0.55, 3, False, [1, 1, 1, 0], 0.3),
        (0.95, 9, False, [1, 1, 1, 0], 0.3),
        (0.95, 1, True, [1, 1, 1, 0], 0.0),
    ],
)
def test_threshold_commits_the_confident_but_never_too_few(case):
    check_commit(draws.threshold_commit, *case)


@pytest.mark.parametrize(
    "case",
    [
        (0.95, 1, False, [0, 1, 0, 0], 0.95),
        (0.55, 1, False, [1, 1, 1, 0], 0.55),
        (0.85, 1, False, [1, 1, 0, 0], 0.85),
        (0.95, 2, False, [0, 1, 1, 0], 0.95),
        (0.95, 9, False, [1, 1, 1, 0], 0.95),
        (0.95, 1, True, [1, 1, 1, 0], 0.0),
    ],
)
def test_the_frontier_is_committed_whatever_was_drawn_there(case):
    """Priorities 1 3 2; the known token has the highest."""
    rule = functools.partial(draws.frontier_commit, priority_BN=jnp.array([[1.0, 3.0, 2.0, 9.0]]))
    check_commit(rule, *case)
