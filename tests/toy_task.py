"""A stage that trains in a second: linear regression on made-up numbers, wired as the real stages are."""

import time

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from maskrl_jax import state as train_state
from maskrl_jax.axis import mean_gradients
from maskrl_jax.phase import Phase
from maskrl_jax.tasks.task import Task

WIDTH = 256  # [256, 256] is just large enough to be split over devices


def get_config(argument=""):
    """Return a config; the argument "child" gives one with the plain stage as parent."""
    config = ConfigDict()
    config.task = "toy"
    config.name = "toy"
    config.seed = 0
    config.num_steps = 6
    config.batch_size = 16
    config.log_every = 2
    config.eval_every = 0
    config.save_every = 2
    config.keep = 2
    config.profile_at = 0
    config.parallel = "pmap"
    config.max_bad_steps = 3
    # A large eps: Adam turns the rounding of a gradient near zero into a full step, on any two machines.
    config.optimizer = {"learning_rate": 0.01, "eps": 1e-3}
    config.data = {"name": "made_up", "bad_from": -1, "slow": 0.0}
    config.model = {"width": WIDTH}
    config.parents = ConfigDict({"base": get_config()} if argument == "child" else {})
    config.init = ConfigDict({"base": ""} if argument == "child" else {})
    return config


def init_state(key, tx, width):
    """Return a state with one matrix and one bias."""
    params = {"w": jax.random.normal(key, (WIDTH, width)) / 16, "b": jnp.zeros((width,))}
    return train_state.create(params, tx, {"seen": jnp.zeros(())})


def loss(params, batch):
    """Return the summed squared error of a linear map and its weight."""
    prediction = jnp.tanh(batch["x"] @ params["w"] + params["b"][None])
    error = prediction.mean(-1) - batch["y"]
    return (error**2).sum(), jnp.float32(error.size)


def make_update(tx):
    """Return the pure update of the contract."""

    def update(state, frozen, batch, axis):
        (total, weight), grads = jax.value_and_grad(loss, has_aux=True)(state.params, batch)
        grads = mean_gradients(grads, weight, axis)
        extra = {"seen": state.extra["seen"] + axis.all_reduce(weight)}
        state, info = train_state.apply_gradients(state, grads, tx, ema_decay=0.9, extra=extra)
        return state, info | {"train/loss": axis.all_reduce((total, weight))}

    return update


def make_batch(step, rows, batch_size, bad_from=-1):
    """Return rows of the global batch of a step; NaN from step `bad_from` on."""
    rng = np.random.default_rng(step)
    x = rng.normal(size=(batch_size, WIDTH)).astype(np.float32)
    y = rng.normal(size=batch_size).astype(np.float32)
    if 0 <= bad_from <= step:
        y = y * np.nan
    return {"x": x[rows], "y": y[rows]}


def phases(config, parallel):
    """A program for the command line's dry run; what a dry run says of programs has tests of its own."""
    batch = {"x": jax.ShapeDtypeStruct((config.batch_size,), jnp.float32)}
    return [Phase("rollout", lambda params, frozen, batch, axis: {"y": batch["x"] + 1}, ({}, {}, batch), kind="map")]


def build(context):
    """Build the task."""
    config, parallel = context.config, context.parallel
    tx = train_state.make_optimizer(train_state.optimizer_of(config.optimizer, config.num_steps))
    rows = parallel.rows(config.batch_size)
    update = parallel.update(make_update(tx))

    def step(state, batch):
        return update(state, {}, batch)

    def batch(number):
        time.sleep(config.data.slow)
        return make_batch(number, rows, config.batch_size, config.data.bad_from)

    def evaluate(state, number):
        norm = float(np.sqrt((np.asarray(jax.device_get(state.params["b"])) ** 2).sum()))
        return {"eval/bias_norm": norm}, {"samples/grid": np.full((4, 4, 3), number, np.uint8)}

    def report(state):
        with open(f"{context.workdir}/report.md", "w") as file:
            file.write(f"parents: {sorted(context.parents)}\n")

    return Task(
        init=lambda key: parallel.init(lambda k: init_state(k, tx, config.model.width), key),
        batch=batch,
        step=step,
        evaluate=evaluate,
        report=report,
    )
