"""What devices say to each other in compiled programs: one message per optimizer step, none in a rollout."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from maskrl_jax import parallel as parallel_module
from maskrl_jax import runner
from maskrl_jax.models import mmdit
from maskrl_jax.models.mar import Mar, MarConfig
from maskrl_jax.parallel import Parallel
from maskrl_jax.sampling import draws
from maskrl_jax.tasks.continuous import Network

DEVICES = 2
MESSAGE = re.compile(r" = (.*?) (all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute)(?:-start)?\(")
# What a stage must know of the whole batch before its first gradient: three numbers at most.
TOTALS = {"speed_rl", "mask_grpo", "maskfocus"}


@functools.cache
def messages(stage, strategy):
    """Phase name -> [(shapes, kind)] of the collectives in its compiled text, a loop's body once."""
    parallel, found = Parallel(strategy, jax.devices()[:DEVICES]), {}
    for phase in runner.phases(tiny.get_config(stage), parallel):
        state, frozen, batch = phase.args
        compiled = (parallel.update if phase.kind == "update" else parallel.map)(phase.fn)
        args = (parallel.abstract(state), parallel.abstract(frozen), parallel.abstract_batch(batch))
        found[phase.name] = MESSAGE.findall(compiled.lower(*args).compile().as_text())
    return found


def numbers(shapes):
    """How many numbers a message carries."""
    sizes = [[int(x) for x in dims.split(",") if x] for dims in re.findall(r"\w+\[([\d,]*)\]", shapes)]
    return sum(functools.reduce(int.__mul__, dims, 1) for dims in sizes)


@pytest.mark.parametrize("stage", ["tokenizer", "maskgit", "shortcut", "speed_rl", "maskfocus"])
def test_replicas_sum_once_in_an_optimizer_step_and_never_in_a_rollout(stage):
    found = messages(stage, "pmap")
    assert not found.get("rollout")
    config = tiny.get_config(stage)
    weights = sum(x.size for x in jax.tree.leaves(trained_by(config)))
    kinds = [kind for _, kind in found["update"]]
    sizes = sorted(numbers(shapes) for shapes, _ in found["update"])
    assert kinds == ["all-reduce"] * (1 + (stage in TOTALS))
    assert sizes[-1] >= weights  # the gradients, with what is logged
    assert sizes[:-1] <= [4]


def trained_by(config):
    """Shapes of what a stage trains."""
    phases = runner.phases(config, Parallel("pmap", jax.devices()[:1]))
    return phases[-1].args[0].params


def test_split_parameters_are_gathered_and_their_gradients_summed(monkeypatch):
    """Sharded maskgit: no message but those; the three that are split are gathered for both directions at most."""
    monkeypatch.setattr(parallel_module, "FSDP_MIN_SIZE", 512)
    messages.cache_clear()
    found = messages("maskgit", "sharded")["update"]
    messages.cache_clear()
    assert {kind for _, kind in found} == {"all-gather", "all-reduce"}
    split = [x for x in jax.tree.leaves(trained_by(tiny.get_config("maskgit"))) if x.size >= 512]
    gathered = sum(kind == "all-gather" for _, kind in found)
    assert len(split) <= gathered <= 2 * len(split)


def test_a_stack_of_blocks_gathers_weights_and_leaves_rows_where_they_are(monkeypatch):
    """Left to the compiler, these blocks have their rows gathered and their channels sent around."""
    monkeypatch.setattr(parallel_module, "FSDP_MIN_SIZE", 512)
    parallel, rows = Parallel("sharded", jax.devices()[:DEVICES]), jax.ShapeDtypeStruct((8, 7, 64), jnp.float32)
    sizes, turns = mmdit.BlockSizes(4, 16, True, "float32"), mmdit.rotations((4, 6, 6), (2, 2), 3)
    blocks = mmdit.stack(mmdit.SingleBlock, sizes, 3)

    def update(params, frozen, batch, axis):
        grads = jax.grad(lambda p: jnp.square(blocks.apply(p, batch, batch[:, 0], turns)[0]).sum())(params)
        return jax.tree.map(lambda p, g: p - g, params, grads), {}

    params = jax.eval_shape(lambda x: blocks.init(jax.random.key(0), x, x[:, 0], turns), rows)
    args = (parallel.abstract(params), {}, parallel.abstract_batch(rows))
    found = MESSAGE.findall(parallel.update(update).lower(*args).compile().as_text())
    split = [x.shape[1:] for x in jax.tree.leaves(params) if x.size >= 512]
    gathered = [shapes for shapes, kind in found if kind == "all-gather"]
    assert {kind for _, kind in found} == {"all-gather", "all-reduce"}
    assert len(gathered) == 2 * len(split)  # forward and, again, backward
    assert max(map(numbers, gathered)) == max(math.prod(shape) for shape in split)  # of one block at a time


def test_the_head_of_mar_is_gathered_and_leaves_rows_where_they_are(monkeypatch):
    """Left to the compiler, its rows are split by features at hundreds of chips, and do not fit."""
    monkeypatch.setattr(parallel_module, "FSDP_MIN_SIZE", 512)
    parallel, rows = Parallel("sharded", jax.devices()[:DEVICES]), jax.ShapeDtypeStruct((8, 4, 2), jnp.float32)
    sizes = MarConfig(num_tokens=4, channels=2, cond_vocab=3, width=16, heads=2, depth=1, head_width=32, head_depth=2)
    network = Network(Mar(sizes))

    def update(params, frozen, batch, axis):
        def loss(params):
            known = network.condition(params, jnp.tile(batch, (1, 1, 8)))
            return jnp.square(network.outputs(params, batch, jnp.int32(3), known)).sum()

        return jax.tree.map(lambda p, g: p - g, params, jax.grad(loss)(params)), {}

    order, cond = jnp.tile(jnp.arange(4), (8, 1)), jnp.zeros(8, jnp.int32)
    params = jax.eval_shape(lambda x: network.model.init(jax.random.key(0), x, order, cond), rows)
    args = (parallel.abstract(params), {}, parallel.abstract_batch(rows))
    found = MESSAGE.findall(parallel.update(update).lower(*args).compile().as_text())
    split = [x for x in jax.tree.leaves(params["params"]["denoiser"]) if x.size >= 512]
    gathered = [shapes for shapes, kind in found if kind == "all-gather"]
    assert {kind for _, kind in found} == {"all-gather", "all-reduce"}
    assert len(split) <= len(gathered) <= 2 * len(split)
    assert max(map(numbers, gathered)) == max(x.size for x in split)


def test_guidance_moves_no_rows():
    parallel, rows = Parallel("sharded", jax.devices()[:DEVICES]), jax.ShapeDtypeStruct((8, 16), jnp.int32)

    def scored(params, frozen, batch, axis):
        cond = batch[:, 0]
        network = lambda ids, timestep, cond: jax.nn.one_hot(ids + cond[:, None] + timestep[:, None], 32)  # noqa: E731
        return draws.guided(network, np.int32(1))(batch, cond, cond, jnp.full(cond.shape, 2.0))

    lowered = parallel.map(scored).lower({}, {}, parallel.abstract_batch(rows))
    assert not MESSAGE.findall(lowered.compile().as_text())


def test_a_sharded_rollout_asks_at_every_call_whether_all_are_done():
    """A loop that ends on data: one bit of all devices a call, which replicas need not send."""
    assert ("pred[]", "all-reduce") in messages("speed_rl", "sharded")["rollout"]
