"""What is saved comes back exactly, under any strategy; what is not ours is refused in one line."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_task

from maskrl_jax import state as train_state
from maskrl_jax.checkpoint import Checkpoints, load_arrays, load_params
from maskrl_jax.errors import UserError
from maskrl_jax.parallel import Parallel

TX = train_state.make_optimizer(train_state.OptimizerConfig())


def fresh(parallel, seed=0, width=256):
    return parallel.init(lambda key: toy_task.init_state(key, TX, width), jax.random.key(seed))


@contextlib.contextmanager
def opened(workdir, strategy="pmap", devices=8):
    parallel = Parallel(strategy, jax.devices()[:devices])
    with contextlib.closing(Checkpoints(str(workdir), parallel, keep=2)) as checkpoints:
        yield checkpoints, parallel


@pytest.mark.parametrize("saved", [("pmap", 8), ("sharded", 8)])
@pytest.mark.parametrize("restored", [("pmap", 1), ("sharded", 4)])
def test_strategies_and_device_counts_interchange(tmp_path, saved, restored):
    with opened(tmp_path, *saved) as (checkpoints, parallel):
        state = fresh(parallel)
        expected = jax.device_get(state)
        checkpoints.save(5, state)
    with opened(tmp_path, *restored) as (checkpoints, parallel):
        assert checkpoints.latest() == 5
        target = fresh(parallel, seed=1)
        placed = jax.tree.map(lambda x: x.sharding, target)
        found = checkpoints.restore(target)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(found), expected)
    assert jax.tree.map(lambda x: x.sharding, found) == placed


def test_the_newest_are_kept_and_saving_twice_is_no_error(tmp_path):
    with opened(tmp_path) as (checkpoints, parallel):
        state = fresh(parallel)
        for step in (2, 4, 4, 6):
            checkpoints.save(step, state)
        assert checkpoints.latest() == 6
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["4", "6"]


def test_a_parent_is_read_as_its_moving_average(tmp_path):
    with opened(tmp_path) as (checkpoints, parallel):
        state = fresh(parallel)
        state = state.replace(ema=jax.tree.map(lambda x: 2 * x, state.ema))
        checkpoints.save(1, state)
    params, extra = load_params(str(tmp_path))
    jax.tree.map(np.testing.assert_array_equal, params, jax.device_get(state.ema))
    assert isinstance(params["w"], np.ndarray) and extra == {"seen": 0}
    np.testing.assert_array_equal(load_arrays(str(tmp_path), ("params",))["params"]["w"], params["w"] / 2)


def test_a_parent_without_extra_state_has_an_empty_one(tmp_path):
    with opened(tmp_path) as (checkpoints, parallel):
        checkpoints.save(1, parallel.init(lambda key: train_state.create({"w": jnp.ones(2)}, TX), jax.random.key(0)))
    assert load_params(str(tmp_path))[1] == {}


def test_missing_checkpoints_are_named(tmp_path):
    with pytest.raises(UserError, match="no checkpoint under"):
        load_params(str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match="no complete checkpoint under"):
        load_params(str(tmp_path))
    with opened(tmp_path) as (checkpoints, parallel), pytest.raises(UserError, match="no checkpoint"):
        checkpoints.restore(fresh(parallel))


def test_a_checkpoint_of_another_model_is_named(tmp_path):
    with opened(tmp_path) as (checkpoints, parallel):
        checkpoints.save(1, fresh(parallel, width=8))
    with (
        opened(tmp_path) as (checkpoints, parallel),
        pytest.raises(UserError, match="does not fit this config"),
    ):
        checkpoints.restore(fresh(parallel, width=16))


def test_a_foreign_checkpoint_is_named(tmp_path):
    with opened(tmp_path) as (checkpoints, _):
        checkpoints.save(1, {"weights": jnp.ones(3)})
    with pytest.raises(UserError, match="not one of a stage"):
        load_params(str(tmp_path))


def test_what_a_kill_left_behind_is_not_a_checkpoint(tmp_path):
    with opened(tmp_path) as (checkpoints, parallel):
        checkpoints.save(1, fresh(parallel))
    (tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp").mkdir()
    with opened(tmp_path) as (checkpoints, parallel):
        assert checkpoints.latest() == 1
        checkpoints.save(2, fresh(parallel))
    with opened(tmp_path) as (checkpoints, _):
        assert checkpoints.latest() == 2
