"""Packing of (rollout, call) pairs into micro-batches (speed_rl spec 5.4)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskrl_jax.rl.pairs import accumulate

VALID = jnp.array([[True, True, False, False], [True, False, False, False], [True, True, True, True]])
PAIRS = [0, 1, 4, 8, 9, 10, 11]  # rollout * 4 + call


def visit(pair, real):
    """Return ((visits of every pair, passes), largest valid pair)."""
    visits = jnp.zeros(12, jnp.int32).at[pair].add(real)
    return (visits, jnp.int32(1)), jnp.where(real, pair, 0).max()


@pytest.mark.parametrize("micro_batch", [1, 3, 7, 12, 50])
def test_every_valid_pair_is_visited_once_in_as_few_passes_as_there_are_pairs(micro_batch):
    (visits, passes), largest = jax.jit(lambda valid: accumulate(visit, valid, micro_batch))(VALID)
    np.testing.assert_array_equal(visits, np.isin(np.arange(12), PAIRS))
    assert int(passes) == -(-len(PAIRS) // micro_batch)
    assert int(largest) == 11


def test_a_pass_is_no_wider_than_there_are_pairs():
    _, widest = accumulate(lambda pair, real: (real.sum(), jnp.int32(len(pair))), VALID, 50)
    assert int(widest) == VALID.size


def test_no_valid_pair_makes_no_pass():
    (visits, passes), largest = accumulate(visit, jnp.zeros((3, 4), bool), 4)
    assert (int(visits.sum()), int(passes), int(largest)) == (0, 0, 0)


def test_one_program_serves_every_number_of_pairs():
    program = jax.jit(lambda valid: accumulate(visit, valid, 3))
    for valid in (VALID, ~VALID, jnp.ones((3, 4), bool)):
        assert int(program(valid)[0][1]) == -(-int(valid.sum()) // 3)
    assert program._cache_size() == 1
