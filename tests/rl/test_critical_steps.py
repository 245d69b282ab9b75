"""Which steps are optimised (maskfocus spec 4; spec 13, oracle 8)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskrl_jax.rl import critical_steps
from maskrl_jax.rl.critical_steps import StepChoice
from maskrl_jax.sampling import routing

BOOK = jnp.array([[1.0, 0], [0, 1], [-1, 0], [3, 4]])
FINAL = jnp.array([[0, 1, 3, 2]])
PREDICTIONS = jnp.array([[[1, 1, 0, 0]], [[0, 0, 3, 0]], [[0, 1, 3, 0]], [[0, 1, 1, 2]], [[0, 1, 3, 2]]], jnp.uint16)


def chosen(similarity, keys=None, group=1, **fields):
    similarity = jnp.asarray(similarity, jnp.float32)
    keys = jax.random.split(jax.random.key(0), len(similarity)) if keys is None else keys
    choice = StepChoice(**{"num_steps": similarity.shape[1] + 1, "num_tokens": 64, "count": 2} | fields)
    return critical_steps.choose(choice, keys, similarity, group).tolist()


def test_similarity_gain_and_choice_by_hand():
    similarity = critical_steps.similarity(BOOK, PREDICTIONS, FINAL)
    np.testing.assert_allclose(similarity, [[0.283473, 0.892857, 0.928571, 0.661438]], atol=1e-6)
    gain = critical_steps.information_gain(similarity)
    np.testing.assert_allclose(gain, [[0.609384, 0.035714, 0.267134]], atol=1e-6)
    assert chosen(similarity) == [[0, 2]]


def test_one_hot_rows_give_the_share_of_equal_tokens():
    similarity = critical_steps.similarity(jnp.eye(4), PREDICTIONS, FINAL)
    np.testing.assert_allclose(similarity, [[0.25, 0.5, 0.75, 0.75]], atol=1e-6)
    assert chosen(similarity) == [[0, 1]]  # of equal gains the earlier


@pytest.mark.parametrize(("offset", "timesteps"), [(0, [4, 2]), (1, [3, 1])])
def test_count_and_timestep_of_a_step(offset, timesteps):
    choice = StepChoice(num_steps=5, num_tokens=64, count=2, timestep_offset=offset)
    counts, found = critical_steps.count_and_timestep(choice, jnp.array([0, 2]))
    assert found.tolist() == timesteps
    assert counts.tolist() == [60, 37]  # floor(64 cos(pi/2 (i+1)/5))


@pytest.mark.parametrize(
    ("timesteps", "found"), [("clock", [63, 47, 15]), ("mask_ratio", [1000, 923.8795, 382.6834]), ("const", [0, 0, 0])]
)
def test_the_loss_keeps_the_timesteps_of_the_rollout(timesteps, found):
    """The first call, and those after steps 0 and 2 of 4."""
    choice = StepChoice(num_steps=4, num_tokens=64, count=2, timesteps=timesteps)
    told = critical_steps.count_and_timestep(choice, jnp.array([-1, 0, 2]))[1]
    np.testing.assert_allclose(told, found, rtol=1e-6)
    np.testing.assert_allclose(told, routing.RoutingConfig(num_steps=4, timesteps=timesteps).timestep[[0, 1, 3]])


def test_scopes_average_before_the_modulus():
    """Two samples that move in opposite directions cancel in a group; alone each has its own steps."""
    up, down = [0.0, 0.0, 0.5, 0.5, 0.6], [0.5, 0.5, 0.0, 0.1, 0.2]
    similarity = [up, down, down, down]
    assert chosen(similarity, group=2, count=1, scope="sample") == [[1]] * 4
    assert chosen(similarity, group=2, count=1, scope="group") == [[3]] * 2 + [[1]] * 2
    assert chosen(similarity, group=2, count=1, scope="batch") == [[1]] * 4


def test_choices_that_read_no_image():
    similarity = np.zeros((2, 19))  # T = 20
    assert chosen(similarity, select="first", count=3) == [[0, 1, 2]] * 2
    assert chosen(similarity, select="first_20", count=2) == [[0, 3]] * 2
    assert chosen(similarity, select="first_20", count=4) == [[0, 1, 2, 3]] * 2
    assert chosen(similarity, select="all") == [list(range(19))] * 2


@pytest.mark.parametrize("offset", [0, 1])
def test_the_first_call_is_optimised_besides(offset):
    similarity = np.linspace(0, 1, 19)[None] ** 2  # gains rise
    assert chosen(similarity, first_call=True, count=2) == [[-1, 16, 17]]
    assert chosen(similarity, first_call=True, select="all") == [[-1, *range(19)]]
    choice = StepChoice(20, 64, 2, first_call=True, timestep_offset=offset)
    counts, timestep = critical_steps.count_and_timestep(choice, jnp.array([-1, 0]))
    assert choice.slots == 3 and counts.tolist() == [64, 63] and timestep.tolist() == [19, 19 - offset]


@pytest.mark.parametrize(("select", "last"), [("random", 18), ("random_early", 7)])
def test_random_choices(select, last):
    """Distinct, rising, each step equally often, the same for the same key."""
    keys = jax.random.split(jax.random.key(1), 4000)
    found = np.array(chosen(np.zeros((4000, 19)), keys, select=select, count=3))
    assert (np.diff(found, axis=1) > 0).all() and found.min() == 0 and found.max() == last
    share = np.bincount(found.ravel(), minlength=last + 1) / len(found) * (last + 1) / 3
    assert np.abs(share - 1).max() < 0.2
    same = jnp.broadcast_to(jax.random.split(jax.random.key(2), 1), (3,))
    found = chosen(np.zeros((3, 19)), same, select=select, count=3)
    assert found[0] == found[1] == found[2]


def test_offset_never_leaves_the_timesteps():
    for select in critical_steps.SELECTS:
        choice = StepChoice(num_steps=24, num_tokens=64, count=2, select=select)
        counts, timestep = critical_steps.count_and_timestep(choice, jnp.arange(choice.candidates))
        assert timestep.min() >= (select == "critical") and counts.min() >= 1


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"select": "best"}, "not one of critical"),
        ({"scope": "world"}, "not one of group"),
        ({"timestep_offset": 2}, "timestep_offset"),
        ({"count": 0}, "do not fit"),
        ({"count": 19}, "leave 18 to choose from"),
        ({"count": 9, "select": "random_early"}, "leave 8"),
        ({"count": 5, "select": "first_20"}, "leave 4"),
    ],
)
def test_choices_that_cannot_be(fields, words):
    with pytest.raises(ValueError, match=words):
        StepChoice(**{"num_steps": 20, "num_tokens": 64, "count": 2} | fields)
