"""The base generator: its masks, its loss, dropped conditions, and sampling with one program."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from maskrl_jax.data.captions import WORDS
from maskrl_jax.data.dataset import conditioning_of
from maskrl_jax.evaluate.systems import fixed_program, fixed_system
from maskrl_jax.keys import EVALUATE, TRAIN, sample_keys
from maskrl_jax.parallel import Parallel
from maskrl_jax.sampling.maskgit import SamplerConfig, make_plan
from maskrl_jax.tasks import codecs, forms, generators, maskgit
from maskrl_jax.tasks.task import Context
from maskrl_jax.writers import read_metrics

MASK = 16


def masks(count, num_tokens=16):
    keys = sample_keys(0, TRAIN, 0, jnp.arange(count))
    ids = jax.random.randint(jax.random.key(1), (count, num_tokens), 0, MASK)
    inputs, masked = jax.jit(maskgit.mask_tokens, static_argnums=2)(keys, ids, MASK)
    return keys, np.asarray(ids), np.asarray(inputs), np.asarray(masked)


def test_masked_tokens_become_mask_and_no_other_changes():
    _, ids, inputs, masked = masks(64)
    np.testing.assert_array_equal(inputs, np.where(masked, MASK, ids))


def test_the_count_is_the_arccos_law_and_at_least_one():
    keys, _, _, masked = masks(512)
    level = np.array([jax.random.uniform(jax.random.fold_in(key, 0)) for key in keys[:64]], np.float64)
    expected = np.maximum(np.ceil(16 * 2 / np.pi * np.arccos(level)), 1)
    np.testing.assert_allclose(masked.sum(1)[:64], expected, atol=1e-9)
    assert masked.sum(1).min() >= 1


def test_on_average_two_over_pi_of_the_tokens_are_masked():
    # The mean of 2/pi arccos(u); 4096 samples have a standard error of 0.005, the ceiling adds 1/512.
    _, _, _, masked = masks(4096, num_tokens=256)
    assert masked.mean() == pytest.approx(2 / np.pi + 1 / 512, abs=0.015)


def test_every_position_is_masked_equally_often():
    _, _, _, masked = masks(4096)
    np.testing.assert_allclose(masked.mean(0), masked.mean(), atol=0.04)


def test_the_loss_counts_masked_tokens_only():
    logits = jnp.zeros((2, 3, 4)).at[0, 0, 2].set(jnp.log(3.0))  # token 2 has probability 3/6 there
    masked = jnp.array([[True, False, False], [False, True, True]])
    ids = jnp.array([[2, 0, 0], [0, 1, 3]])
    total, weight = maskgit.masked_cross_entropy(logits, ids, masked)
    assert float(weight) == 3
    assert float(total) == pytest.approx(np.log(2) + 2 * np.log(4), rel=1e-6)
    elsewhere = maskgit.masked_cross_entropy(logits, jnp.where(masked, ids, 3 - ids), masked)
    assert float(elsewhere[0]) == float(total)


@pytest.mark.parametrize(("cond_drop", "told"), [(1.0, False), (0.0, True)])
def test_a_dropped_condition_has_no_part_in_the_update(build, cond_drop, told):
    config = tiny.get_config("maskgit")
    config.cond_drop = cond_drop
    task = build(config)
    batch = task.batch(0)
    after = [
        jax.device_get(task.step(task.init(jax.random.key(0)), batch | {"cond": cond})[0].params)
        for cond in (batch["cond"], np.roll(batch["cond"], 1, axis=0))
    ]
    same = jax.tree.leaves(jax.tree.map(np.array_equal, *after))
    assert all(same) is not told


@pytest.mark.parametrize("stage", ["maskgit", "digits"])
def test_phases_name_the_shapes_that_batches_have(trained, stage):
    config = tiny.get_config(stage)
    (update,) = maskgit.phases(config, Parallel("pmap"))
    conditioning = conditioning_of(config.data)
    assert update.args[2]["cond"].shape == (16, *conditioning.null.shape)
    sizes = maskgit.Wiring(config, conditioning).sizes
    assert (sizes.num_tokens, sizes.codebook_size, sizes.mask_id) == (16, 16, MASK)
    assert (sizes.cond_vocab, sizes.cond_length) == {"maskgit": (len(WORDS), 8), "digits": (11, 1)}[stage]


def test_held_out_loss_always_sees_the_same_masks(trained):
    config = tiny.get_config("maskgit")
    wiring = maskgit.Wiring(config, conditioning_of("shapes"))
    parents = trained.parents
    frozen = {"tokenizer": codecs.load(parents["tokenizer"]).params}
    images = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8)
    params, cond = parents["maskgit"].params, jnp.zeros((4, 8), jnp.int32)
    total, weight = wiring.held_out_loss(params, frozen, images, cond)
    _, masked = maskgit.mask_tokens(sample_keys(0, EVALUATE, 0, jnp.arange(4)), jnp.zeros((4, 16), jnp.int32), MASK)
    assert float(weight) == float(masked.sum())
    assert 0.5 * np.log(16) < float(total / weight) < 2 * np.log(16)


@pytest.fixture(scope="module")
def engine(trained):
    context = Context(tiny.get_config("maskgit"), trained.parents, Parallel("sharded", jax.local_devices()[:1]), "", "")
    sizes = forms.model_config(context.config, context.config.parents.tokenizer, conditioning_of("shapes"))
    return generators.engine_of(context, sizes, conditioning_of("shapes").null)


@pytest.fixture(scope="module")
def program(engine):
    return fixed_program(engine)


def generate(engine, program, params, setting, **changes):
    system = fixed_system(engine, program, params, SamplerConfig(num_steps=1, max_steps=8, **changes), "base", "base")
    return system.generate(setting, np.zeros((4, 8), np.int32), np.arange(4, dtype=np.int32), 0)


def test_one_program_samples_with_any_number_of_steps(trained, engine, program):
    params = trained.parents["maskgit"].params
    for steps in (1, 2, 3, 5, 8):
        made = generate(engine, program, params, steps, gumbel=float(steps), guidance=1.0 + steps)
        np.testing.assert_array_equal(made.calls, steps)
        assert made.commit_step.max() == steps - 1
    assert program._jitted._cache_size() == 1


def test_a_decode_moves_nothing_between_host_and_devices(trained, engine, program):
    parallel, params = engine.parallel, engine.parallel.replicate(trained.parents["maskgit"].params)
    plan = make_plan(SamplerConfig(num_steps=4, max_steps=8, guidance=2.0), 16)
    frozen = {"plan": parallel.replicate(plan), "tokenizer": engine.tokenizer}
    batch = {"cond": np.zeros((4, 8), np.int32), "index": np.arange(4, dtype=np.int32), "seed": np.zeros(4, np.int32)}
    batch = parallel.put(batch | {"given": np.full((4, 16), MASK, np.int32)})
    program(params, frozen, batch)
    with jax.transfer_guard("disallow"):
        jax.block_until_ready(program(params, frozen, batch))


def test_a_run_tunes_its_sampler_and_writes_its_report(trained):
    workdir = pathlib.Path(trained.parents["maskgit"].workdir)
    assert {"gumbel", "guidance", "mode"} <= set(json.loads((workdir / "sampler.json").read_text())["sampler"])
    assert (workdir / "report.md").exists() and list((workdir / "figures").iterdir())
    tags = {tag for line in read_metrics(str(workdir)) for tag in line}
    assert {"train/loss", "eval/loss", "eval/graded@4", "eval/strict@2", "eval/fd_judge@4", "eval/diversity@4"} <= tags
