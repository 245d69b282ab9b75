"""Both strategies, any number of devices: the same parameters, the same samples."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_task

from maskrl_jax import parallel as parallel_module
from maskrl_jax import state as train_state
from maskrl_jax.axis import mean_gradients
from maskrl_jax.errors import UserError
from maskrl_jax.parallel import Parallel

SETUPS = [(strategy, devices) for strategy in parallel_module.STRATEGIES for devices in (1, 8)]
TX = train_state.make_optimizer(train_state.OptimizerConfig(learning_rate=0.01, eps=1e-3))


def sample(state, frozen, batch, axis):
    """Draw per-sample numbers as a rollout does: keys from the sample index, no word about devices."""
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(7), i))(batch["index"])
    noise = jax.vmap(lambda key: jax.random.uniform(key, (3,)))(keys)
    features = axis.split(batch["x"] @ state.params["w"])
    return {"ids": (noise * 100).astype(jnp.int32), "features": features + frozen["shift"]}


def trained(strategy, devices, steps=4):
    """Return (parameters, outputs of `map`) after a few updates."""
    parallel = Parallel(strategy, jax.devices()[:devices])
    state = parallel.init(lambda key: toy_task.init_state(key, TX, 256), jax.random.key(0))
    frozen = parallel.replicate({"shift": np.float32(0.5)})
    chex.clear_trace_counter()
    update = parallel.update(chex.assert_max_traces(toy_task.make_update(TX), n=1))
    rollout = parallel.map(chex.assert_max_traces(sample, n=1))
    for step in range(steps):
        batch = toy_task.make_batch(step, parallel.rows(16), 16)
        with jax.transfer_guard("disallow" if step else "allow"):
            outputs = rollout(state, frozen, {"x": batch["x"], "index": np.arange(16, dtype=np.int32)})
            state, metrics = update(state, frozen, batch | {"features": outputs["features"]})
    return jax.device_get(state.params), parallel.gather(outputs), jax.device_get(metrics)


@pytest.fixture(scope="module")
def reference():
    return trained("pmap", 1)


@pytest.mark.parametrize(("strategy", "devices"), SETUPS[1:])
def test_devices_and_strategy_do_not_matter(reference, strategy, devices):
    params, outputs, metrics = trained(strategy, devices)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), params, reference[0])
    np.testing.assert_array_equal(outputs["ids"], reference[1]["ids"])
    np.testing.assert_allclose(outputs["features"], reference[1]["features"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(metrics["train/loss"], reference[2]["train/loss"], rtol=1e-5)


@pytest.mark.parametrize("strategy", parallel_module.STRATEGIES)
def test_mean_gradients_divide_by_the_weight_of_all_devices(strategy):
    parallel = Parallel(strategy)

    def update(state, frozen, batch, axis):
        return mean_gradients((batch["w"] * batch["g"]).sum(), batch["w"].sum(), axis), {}

    weight = np.array([0, 0, 0, 0, 0, 0, 1, 3], np.float32)
    mean, _ = parallel.update(update)(parallel.replicate(jnp.zeros(())), {}, {"w": weight, "g": np.arange(8.0)})
    assert float(mean) == (6 + 21) / 4


def test_mean_gradients_of_no_weight_are_zero():
    assert float(mean_gradients(jnp.zeros(()), jnp.zeros(()), Parallel("sharded")._axis)) == 0


def test_axis_size_counts_the_shards_a_function_sees():
    sizes = {}
    for strategy in parallel_module.STRATEGIES:
        parallel = Parallel(strategy)

        def look(state, frozen, batch, axis, strategy=strategy):
            sizes[strategy] = (axis.size, batch.shape[0])
            return batch

        parallel.map(look)(parallel.replicate(jnp.zeros(())), {}, np.zeros(16))
    assert sizes == {"pmap": (1, 2), "sharded": (8, 16)}


@pytest.mark.parametrize(("strategy", "devices"), SETUPS)
def test_rows_come_back_in_order(strategy, devices):
    parallel = Parallel(strategy, jax.devices()[:devices])
    rows = {"a": np.arange(16), "b": np.arange(32.0).reshape(16, 2)}
    jax.tree.map(np.testing.assert_array_equal, parallel.get(parallel.put(rows)), rows)
    assert parallel.rows(16) == slice(0, 16)


def test_sharded_splits_large_arrays_and_keeps_small_ones_whole():
    parallel = Parallel("sharded")
    state = parallel.init(lambda key: toy_task.init_state(key, TX, 256), jax.random.key(0))
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.shape == (256, 256)]
    for leaf in (state.params["w"], state.ema["w"], *moments):
        assert leaf.addressable_shards[0].data.size == leaf.size // 8
    assert len(moments) == 2
    assert state.params["b"].addressable_shards[0].data.size == 256


@pytest.mark.parametrize("strategy", parallel_module.STRATEGIES)
def test_init_owns_its_buffers_so_that_donation_spares_constants(strategy):
    parallel = Parallel(strategy)
    frozen = parallel.replicate({"w": np.ones((256, 256), np.float32)})
    state = parallel.init(lambda key: {"w": frozen["w"]}, jax.random.key(0))
    parallel.update(lambda s, f, b, axis: (jax.tree.map(lambda x: x + 1, s), {}))(state, frozen, np.zeros(8))
    assert float(np.asarray(frozen["w"]).sum()) == 256 * 256


@pytest.mark.parametrize(("strategy", "devices"), SETUPS)
def test_programs_lower_for_abstract_arguments(strategy, devices):
    parallel = Parallel(strategy, jax.devices()[:devices])
    state = jax.eval_shape(lambda key: toy_task.init_state(key, TX, 256), jax.random.key(0))
    batch = parallel.abstract_batch(toy_task.make_batch(0, parallel.rows(16), 16))
    args = (parallel.abstract(state), {}, batch)
    update = parallel.update(toy_task.make_update(TX))
    assert update.lower(*args).compile().cost_analysis()["flops"] > 0
    assert "dot_general" in str(update.jaxpr(*args))


@pytest.mark.parametrize("strategy", parallel_module.STRATEGIES)
def test_a_batch_that_does_not_divide_is_named(strategy):
    parallel = Parallel(strategy)
    with pytest.raises(UserError, match="12 does not divide by 8 devices"):
        parallel.rows(12)
    with pytest.raises(UserError, match="does not divide by 8 devices"):
        parallel.put(np.zeros(12))


def test_an_unknown_strategy_is_named():
    with pytest.raises(UserError, match="did you mean 'pmap'"):
        Parallel("pmpa")


@pytest.mark.parametrize("strategy", parallel_module.STRATEGIES)
@pytest.mark.parametrize(
    ("at_once", "group", "part"), [(None, 1, 6), (9, 1, 6), (4, 1, 3), (1, 1, 1), (4, 2, 2), (1, 3, 3)]
)
def test_rows_in_parts_are_those_of_all(strategy, at_once, group, part):
    parallel, seen = Parallel(strategy), []

    def program(state, frozen, batch, axis):
        def double(rows):
            seen.append(len(rows["x"]) // axis.size)
            return {"y": 2 * rows["x"], "first": jnp.repeat(rows["x"][::group, :1], group, axis=0)}

        return axis.in_parts(double, batch, at_once, group)

    x = np.arange(96, dtype=np.float32).reshape(48, 2)
    made = parallel.gather(parallel.map(program)(parallel.replicate(jnp.zeros(())), {}, {"x": x}))
    assert set(seen) == {part}
    np.testing.assert_array_equal(made["y"], 2 * x)
    np.testing.assert_array_equal(made["first"], np.repeat(x[::group, :1], group, axis=0))
