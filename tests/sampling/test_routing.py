"""Entropy-routed rollouts (maskfocus spec 13, oracles 1-7 and 13)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_model
from scipy import stats

from maskrl_jax.keys import ROLLOUT, sample_keys
from maskrl_jax.sampling import draws, routing

CODES, TOKENS, GROUP, ROWS = 4, 9, 4, 8
MASK = CODES
COND = jnp.repeat(jnp.arange(2), GROUP)


@functools.partial(jax.jit, static_argnames=("config",))
def roll(config, round=0, index=None, cond=COND):
    index = jnp.arange(len(cond)) if index is None else index
    keys = sample_keys(0, ROLLOUT, round, index)
    model = toy_model.contextual(CODES)
    return routing.rollout(model, keys, cond, jnp.int32(7), config, TOKENS, MASK, GROUP)


@pytest.mark.parametrize(
    ("num_tokens", "num_steps", "head", "tail"),
    [
        (
            4096,
            64,
            [4096, 4094, 4091, 4084, 4076, 4065, 4051, 4035, 4017, 3996, 3973, 3947, 3919, 3889],
            [501, 401, 301, 200, 100, 0],
        ),
        (256, 16, [256, 254, 251, 244, 236, 225, 212, 197, 181, 162, 142, 120, 97, 74, 49, 25, 0], []),
        (64, 8, [64, 62, 59, 53, 45, 35, 24, 12, 0], []),
        (16, 32, list(range(16, 0, -1)) + [1] * 16, [1, 0]),
    ],
)
def test_mask_counts(num_tokens, num_steps, head, tail):
    counts = routing.mask_counts(num_tokens, num_steps).tolist()
    assert len(counts) == num_steps + 1 and counts[: len(head)] == head and counts[len(counts) - len(tail) :] == tail


def test_mask_counts_of_the_published_scale():
    counts = routing.mask_counts(4096, 64)
    assert counts[[20, 25, 32]].tolist() == [3612, 3348, 2896] and counts[1:].sum() == 164797


def test_noise_and_timesteps():
    config = routing.RoutingConfig(num_steps=64)
    np.testing.assert_allclose(
        config.noises[[0, 1, 12, 25, 62, 63]], [2, 1.968254, 1.619048, 1.206349, 0.031746, 0], atol=1e-6
    )
    assert config.timestep[[0, 63]].tolist() == [63, 0]
    few = {
        name: routing.RoutingConfig(num_steps=4, timesteps=name).timestep for name in ("countdown", "clock", "const")
    }
    assert {name: x.tolist() for name, x in few.items()} == {
        "countdown": [3, 2, 1, 0],
        "clock": [63, 47, 31, 15],
        "const": [0, 0, 0, 0],
    }
    with pytest.raises(ValueError, match="timesteps 'sundial'"):
        routing.RoutingConfig(timesteps="sundial")


def test_exploration_temperature():
    entropy = jnp.array([0, 1, 2, 3, 5, 6.360791, 9.010913])
    found = routing.exploration_temperature(routing.RoutingConfig(), entropy)
    np.testing.assert_allclose(found, [3.2, 2.491328, 1.983543, 1.619699, 1.172189, 1, 0.824016], atol=1e-5)


@pytest.mark.parametrize(
    ("logits", "entropy", "heat", "probabilities"),
    [
        ((0, np.log(3)), 0.562335, 2.772687, (0.402219, 0.597781)),
        ((0, 0, 2), 0.665573, 2.702574, (0.244140, 0.244140, 0.511720)),
    ],
)
def test_tempered_law_and_its_draws(logits, entropy, heat, probabilities):
    """The single draw of a routed rollout, where every sample explores, follows the tempered law."""
    logits = jnp.asarray(logits, jnp.float32)
    h = draws.entropy(jax.nn.log_softmax(logits))
    found = routing.exploration_temperature(routing.RoutingConfig(), h)
    np.testing.assert_allclose([h, found], [entropy, heat], atol=2e-6)
    np.testing.assert_allclose(jax.nn.softmax(logits / found), probabilities, atol=2e-6)
    rows, tokens, codes = 64, 64, len(logits)
    config = routing.RoutingConfig(num_steps=2, routing="all_explore", guidance=1.0)

    @jax.jit
    def second_predictions():
        keys = sample_keys(0, ROLLOUT, 0, jnp.arange(rows))
        model = lambda ids, t, c: jnp.broadcast_to(logits, (*ids.shape, codes))  # noqa: E731
        made = routing.rollout(model, keys, jnp.zeros(rows, jnp.int32), jnp.int32(0), config, tokens, codes, 2)
        return made.predictions[1], made.commit_step

    predictions, commit = (np.asarray(x) for x in second_predictions())
    drawn = np.bincount(predictions[commit == 1].astype(int), minlength=codes)
    assert drawn.sum() == rows * routing.mask_counts(tokens, 2)[1]
    assert stats.chisquare(drawn, drawn.sum() * np.asarray(probabilities)).pvalue > 1e-3


def test_guided_logits():
    branches = jnp.array([[0.0, 1.0, 2.0], [0.0, 1.0, 0.0]])
    guided = draws.guided(lambda ids, t, c: branches[c][:, None], jnp.int32(1))
    found = guided(jnp.zeros((1, 1), jnp.int32), jnp.zeros(1, jnp.int32), jnp.zeros(1, jnp.int32), jnp.full(1, 5.0))
    np.testing.assert_allclose(found[0, 0], [0, 1, 10])


@pytest.mark.parametrize(
    ("entropy", "exploit"),
    [
        ((3, 1, 2, 2), (1, 0, 1, 1)),
        ((5, 5, 5, 5), (1, 1, 1, 1)),
        ((1, 2), (0, 1)),
        ((1, 2, 3), (0, 0, 1)),
        ((1, 2, 3, 4, 5), (0, 0, 0, 1, 1)),
        ((1,), (1,)),
    ],
)
def test_low_entropy_half_explores(entropy, exploit):
    found = routing.exploring(jnp.asarray(entropy, jnp.float32), len(entropy))
    assert (~found).astype(int).tolist() == list(exploit)


def test_routing_stays_within_the_group():
    entropy = jnp.array([4.0, 3, 2, 1, 8, 7, 6, 5])
    assert (~routing.exploring(entropy, 4)).astype(int).tolist() == [1, 1, 0, 0] * 2
    assert (~routing.exploring(entropy, 8)).astype(int).tolist() == [0] * 4 + [1] * 4


@pytest.mark.parametrize("steps", [5, 14])
def test_states_of_a_rollout(steps):
    """Exact counts, nothing is masked anew, no MASK in a prediction, the last prediction is the image."""
    config = routing.RoutingConfig(num_steps=steps, guidance=1.5)
    made = jax.device_get(roll(config))
    counts = routing.mask_counts(TOKENS, steps)
    assert (made.predictions < CODES).all() and (made.predictions[-1] == made.ids).all()
    for step in range(steps):
        masked = made.commit_step >= step
        assert (masked.sum(-1) == counts[step]).all()
        assert (made.predictions[step][~masked] == made.ids[~masked]).all()
    assert made.explore.any() and not made.explore[0].any() and not made.explore.all()


def test_predictions_are_drawn_from_the_states_that_the_commit_steps_tell():
    """M(z_k) = {commit step >= k}: the network, shown these states again, draws the recorded predictions again."""
    config = routing.RoutingConfig(num_steps=5, routing="off", guidance=1.0)
    made, model = roll(config), toy_model.contextual(CODES)
    for step in range(5):
        masked = made.commit_step >= step
        state = jnp.where(masked, MASK, made.ids)
        logp = jax.nn.log_softmax(model(state, jnp.full(ROWS, config.timestep[step]), COND))
        keys = draws.step_keys(sample_keys(0, ROLLOUT, 0, jnp.arange(ROWS)), step, draws.TOKENS)
        drawn, _ = draws.draw_tokens(keys, logp)
        np.testing.assert_array_equal(made.predictions[step], jnp.where(masked, drawn, made.ids))


def test_confidence_noise_is_standard_gumbel():
    """-log(-log u): -3.829765 at u = 1e-20, and mean 0.577216, sd 1.282550 over many draws."""
    assert -np.log(-np.log(1e-20)) == pytest.approx(-3.829765, abs=1e-6)
    noise = np.asarray(draws.gumbel(jax.random.split(jax.random.key(0), 64), 4096))
    assert noise.mean() == pytest.approx(0.577216, abs=0.01) and noise.std() == pytest.approx(1.282550, abs=0.01)


def test_each_routing():
    shares = {}
    for kind in routing.ROUTINGS:
        explore = np.asarray(roll(routing.RoutingConfig(num_steps=5, routing=kind, guidance=1.5)).explore)
        assert not explore[0].any()
        shares[kind] = explore[1:].mean()
    assert shares["off"] == 0 and shares["all_explore"] == 1 and 0 < shares["on"] <= 0.5


def test_no_two_samples_share_noise():
    """Neither two iterations, nor two prompts or samples of one condition; the same index is the same sample."""
    config = routing.RoutingConfig(num_steps=2, routing="off", guidance=1.0)
    cond = jnp.zeros(ROWS, jnp.int32)
    first, again = (np.asarray(roll(config, round, None, cond).predictions[0]) for round in (0, 1))
    drawn = {row.tobytes() for row in np.concatenate([first, again])}
    assert len(drawn) == 2 * ROWS
    shifted = np.asarray(roll(config, 0, jnp.arange(GROUP, GROUP + ROWS), cond).predictions[0])
    np.testing.assert_array_equal(shifted[:GROUP], first[GROUP:])


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"routing": "some"}, "not one of on"),
        ({"num_steps": 1}, "must lie in 2"),
        ({"num_steps": 256}, "must lie in 2"),
        ({"temperature": 0.0}, "positive"),
        ({"noise": -1.0}, "at least 0"),
    ],
)
def test_settings_that_cannot_be(fields, words):
    with pytest.raises(ValueError, match=words):
        routing.RoutingConfig(**fields)
