import numpy as np
import pytest

from maskrl_jax.data import batches
from maskrl_jax.data.batches import batch_at
from maskrl_jax.data.dataset import open_dataset

ALL = slice(None)


@pytest.fixture(scope="module")
def train(shapes_dir):
    return open_dataset("shapes", "train", shapes_dir, 32)


def test_a_batch_stacks_the_samples_and_numbers_them(train):
    batch = batch_at(train, step=3, batch_size=8, rows=ALL, seed=0)
    assert batch["image"].shape == (8, 32, 32, 3) and batch["cond"].shape == (8, 8)
    assert batch["index"].dtype == np.int32
    np.testing.assert_array_equal(batch["index"], np.arange(24, 32))


@pytest.mark.parametrize("processes", [2, 4])
def test_any_number_of_processes_feeds_the_same_samples(train, processes):
    whole = batch_at(train, 5, 8, ALL, seed=1)
    share = 8 // processes
    parts = [batch_at(train, 5, 8, slice(p * share, (p + 1) * share), seed=1) for p in range(processes)]
    for name, values in whole.items():
        np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), values)


def test_a_batch_is_a_function_of_its_step_alone(train):
    straight = [batch_at(train, step, 8, ALL, seed=2)["image"] for step in range(30)]
    batches._order.cache_clear()  # what a restarted process finds
    np.testing.assert_array_equal(batch_at(train, 29, 8, ALL, seed=2)["image"], straight[29])


def test_every_epoch_shows_each_sample_once_in_a_new_order(train):
    order = batches._order(len(train), 3)
    epochs = [[order[epoch * 96 + i] for i in range(96)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(96)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_seeds_give_different_orders(train):
    a, b = (batch_at(train, 0, 32, ALL, seed)["image"] for seed in (0, 1))
    assert (a != b).any()


def test_sample_numbers_wrap_below_two_to_the_31(train):
    index = batch_at(train, step=2**28, batch_size=8, rows=ALL, seed=0)["index"]
    np.testing.assert_array_equal(index, np.arange(8))
