"""MAR's network: parity with the reference, parameter counts, and what it may depend on."""

import dataclasses
import functools

import fixtures
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskrl_jax import program
from maskrl_jax.convert.mar import params_of, state_of
from maskrl_jax.models.mar import Mar, MarConfig
from maskrl_jax.sampling import mar
from maskrl_jax.sampling.mar import MarPlan, to_order, to_raster

SMALL = MarConfig(
    num_tokens=9, channels=2, cond_vocab=4, buffer=4, width=8, depth=2, heads=2, head_width=8, head_depth=2,
    pooled_width=8, conv_stem=True, relative_bias=True, local_mixing=True,
)  # fmt: skip
ORDER = jnp.array([[3, 1, 4, 0, 5, 2, 6, 8, 7], [8, 7, 6, 5, 4, 3, 2, 1, 0]])
COND = jnp.array([1, 3])
# specs/mar.md section 12: total and head.
PUBLISHED = {
    "base": (dict(width=768, depth=12, heads=12, head_width=1024, head_depth=6), 207_924_768, 35_749_920),
    "large": (dict(width=1024, depth=16, heads=16, head_width=1280, head_depth=8), 478_326_304, 72_230_432),
    "huge": (dict(width=1280, depth=20, heads=16, head_width=1536, head_depth=12), 942_403_104, 151_206_944),
    "small head": (dict(width=1024, depth=16, heads=16, head_width=1024, head_depth=3), 426_357_792, 20_261_920),
}


@functools.cache
def small():
    model = Mar(SMALL)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((2, 9, 2)), ORDER, COND)
    leaves, tree = jax.tree.flatten(params)
    moved = [x + 0.1 * jax.random.normal(jax.random.key(i), x.shape) for i, x in enumerate(leaves)]
    return model, jax.tree.unflatten(tree, moved)


@functools.cache
def compiled(masked=None):
    """The backbone with a static count, or with one that it is told."""
    model, _ = small()

    def run(params, tokens, order, cond, count):
        return model.apply(params, tokens, order, cond, count if masked is None else masked, method="backbone")

    return jax.jit(run)


def backbone(tokens, masked, order=ORDER, cond=COND):
    static = masked if isinstance(masked, int) else None
    with jax.default_matmul_precision("highest"):
        return compiled(static)(small()[1], tokens, order, cond, masked)


@fixtures.every_configuration("mar")
def test_backbone_is_the_reference_s(folder):
    config, state, inputs, outputs = fixtures.load(folder)
    sizes = fixtures.mar_sizes(config)
    order, cond = np.int32(inputs["orders"]), np.int32(inputs["labels"])
    tokens = to_order(jnp.asarray(outputs["tokens"]), order)[:, config["n_masked"] :]
    apply = jax.jit(functools.partial(Mar(sizes).apply, method="backbone"), static_argnums=4)
    params = fixtures.round_trip(params_of, state_of, state, sizes)
    with jax.default_matmul_precision("highest"):
        z = to_raster(apply(params, tokens, order, cond, config["n_masked"]), order)
    np.testing.assert_allclose(
        z, outputs["z"], rtol=0, atol=5 * config["fp32_vs_fp64"]["z"]["max_abs_err_fp32_vs_fp64"]
    )


@fixtures.every_configuration("mar")
def test_head_is_the_reference_s(folder):
    config, state, inputs, outputs = fixtures.load(folder)
    z = np.tile(outputs["z"].reshape(-1, outputs["z"].shape[-1]), (config["ctor"]["diffusion_batch_mul"], 1))
    with jax.default_matmul_precision("highest"):
        out = fixtures.mar_head(config, state, z)(outputs["x_t"], np.int32(inputs["loss_t"]))
    np.testing.assert_allclose(out, outputs["net_out"], rtol=0, atol=1e-4 * np.abs(outputs["net_out"]).max())


@pytest.mark.parametrize(("sizes", "total", "head"), PUBLISHED.values(), ids=list(PUBLISHED))
def test_published_sizes(sizes, total, head):
    model = Mar(MarConfig(num_tokens=256, channels=16, cond_vocab=1001, **sizes))
    arguments = jnp.zeros((1, 256, 16)), jnp.arange(256)[None], jnp.zeros(1, jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), *arguments)["params"]
    count = lambda tree: sum(x.size for x in jax.tree.leaves(tree))  # noqa: E731
    assert (count(params), count(params["denoiser"])) == (total, head)
    blocks = 12 * sizes["width"] ** 2 + 13 * sizes["width"]
    assert count(params["encoder_blocks"]) == count(params["decoder_blocks"]) == sizes["depth"] * blocks


def test_a_masked_token_is_not_seen():
    tokens = jax.random.normal(jax.random.key(1), (2, 9, 2))
    found = backbone(tokens, 5)
    np.testing.assert_array_equal(found, backbone(tokens.at[:, :5].set(7.0), 5))
    assert np.abs(found - backbone(tokens.at[:, 5].set(7.0), 5)).max() > 1e-2


def test_layouts_agree():
    """Exact slices, padding of one count for all and of a count for each sample are the same network."""
    tokens = jax.random.normal(jax.random.key(1), (2, 9, 2))
    exact = backbone(tokens[:, 5:], 5)
    for rows in (4, 6, 9):
        np.testing.assert_allclose(backbone(tokens[:, 9 - rows :], jnp.int32(5)), exact, atol=1e-5)
    several = backbone(tokens[:, 2:], jnp.array([5, 7]))
    np.testing.assert_allclose(several[0], exact[0], atol=1e-5)
    np.testing.assert_allclose(several[1], backbone(tokens[:, 7:], 7)[1], atol=1e-5)


def test_nothing_visible_needs_no_tokens():
    np.testing.assert_allclose(
        backbone(jnp.zeros((2, 0, 2)), 9), backbone(jnp.ones((2, 9, 2)), jnp.int32(9)), atol=1e-5
    )


def test_the_order_of_equal_sets_changes_nothing():
    """Condition of a grid place depends on what is visible where, not on the order within the visible or the masked."""
    tokens = jax.random.normal(jax.random.key(1), (2, 9, 2))
    shuffle = jnp.array([2, 4, 0, 1, 3, 8, 5, 7, 6])  # the first five among themselves, the last four too
    found = to_raster(backbone(tokens[:, 5:], 5), ORDER)
    other = to_raster(backbone(tokens[:, shuffle][:, 5:], 5, order=ORDER[:, shuffle]), ORDER[:, shuffle])
    np.testing.assert_allclose(found, other, atol=1e-5)


def test_raster_and_generation_order_are_inverse():
    x = jnp.arange(36.0).reshape(2, 9, 2)
    np.testing.assert_array_equal(to_raster(to_order(x, ORDER), ORDER), x)
    np.testing.assert_array_equal(to_order(x, ORDER)[0, 0], x[0, 3])


def test_a_caption_fills_the_buffer_evenly():
    config = dataclasses.replace(SMALL, cond_length=2, pooled_width=0)
    model, cond = Mar(config), jnp.array([[1, 2], [3, 3]])
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((2, 9, 2)), ORDER, cond)
    run = jax.jit(lambda cond: model.apply(params, jnp.zeros((2, 9, 2)), ORDER, cond, 0, method="backbone"))
    z, swapped = run(cond), run(cond[:, ::-1])
    assert np.abs(z - swapped)[0].max() > 1e-4  # places tell the words apart
    np.testing.assert_array_equal(z[1], swapped[1])


def test_dropout_acts_in_training_alone():
    model, params = small()
    tokens = jnp.ones((2, 9, 2))

    @functools.partial(jax.jit, static_argnums=1)
    def dropped(key, train):
        return model.apply(params, tokens, ORDER, COND, 5, train, method="backbone", rngs={"dropout": key})

    run = lambda seed, train: dropped(jax.random.key(seed), train)  # noqa: E731

    np.testing.assert_array_equal(run(0, False), run(1, False))
    np.testing.assert_array_equal(run(0, True), run(0, True))
    assert np.abs(run(0, True) - run(1, True)).max() > 1e-2
    assert np.abs(run(0, True) - run(0, False)).max() > 1e-2


@pytest.mark.parametrize("change", [{"remat": True}, {"unroll": 2}])
def test_how_blocks_are_looped_changes_nothing(change):
    model, params = small()
    other = Mar(dataclasses.replace(SMALL, **change))
    tokens = jnp.ones((2, 9, 2))

    def total(params, model):
        z = model.apply(params, tokens, ORDER, COND, jnp.int32(5), method="backbone")
        known = model.apply(params, z, method="head_condition")
        return z.sum() + (model.apply(params, tokens, jnp.int32(3), known, method="denoise") ** 2).sum()

    grads = (jax.jit(jax.grad(functools.partial(total, model=m)))(params) for m in (model, other))
    for one, two in zip(*map(jax.tree.leaves, grads), strict=True):
        np.testing.assert_allclose(one, two, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "named"),
    [({"width": 9}, "heads"), ({"cond_length": 3}, "buffer 4"), ({"dropout": 1.0}, "dropout"), ({"depth": 0}, "depth")],
)
def test_bad_sizes_are_refused(change, named):
    with pytest.raises(ValueError, match=named):
        dataclasses.replace(SMALL, **change)


def needed(model: Mar, params, plan: MarPlan) -> float:
    """Operations of the backbone over a plan with exact slices in every iteration, as traced."""

    def once(masked):
        shapes = jnp.zeros((1, plan.num_tokens - masked, model.config.channels)), jnp.arange(plan.num_tokens)[None]
        run = lambda p, *rest: model.apply(p, *rest, masked, method="backbone")  # noqa: E731
        return program.operations(jax.make_jaxpr(run)(params, *shapes, jnp.zeros(1, jnp.int32)).jaxpr, 1)

    return sum(once(masked) for masked in (plan.num_tokens, *plan.masked_after[:-1]))


@pytest.mark.parametrize(("tokens", "buffer", "width", "steps", "bucket"), [(64, 8, 128, 8, 1), (256, 64, 128, 32, 32)])
def test_the_encoder_s_cost_follows_what_is_visible(tokens, buffer, width, steps, bucket):
    """Of a whole generation without its head: at most a tenth beyond what the schedule needs."""
    sizes = MarConfig(tokens, 8, 4, buffer=buffer, width=width, depth=2, heads=4, head_width=8, head_depth=1, unroll=2)
    model, plan = Mar(sizes), MarPlan(tokens, steps, bucket)
    shapes = jnp.zeros((1, tokens, 8)), jnp.arange(tokens)[None], jnp.zeros(1, jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), *shapes)

    def generate(params, keys_B, cond):
        backbone = functools.partial(model.apply, params, method="backbone")
        draw = lambda z, null, dials, keys: z[..., : sizes.channels]  # noqa: E731
        return mar.generate(backbone, draw, keys_B, [cond], plan.dials(), plan, sizes.channels).tokens

    arguments = params, jax.random.split(jax.random.key(0), 1), jnp.zeros(1, jnp.int32)
    if bucket == 1:  # without a loop, the compiler's own count is that of all iterations
        found = jax.jit(generate).lower(*arguments).compile().cost_analysis()["flops"]
    else:
        found = program.operations(jax.make_jaxpr(generate)(*arguments).jaxpr, 1)
    assert 0.9 < found / needed(model, params, plan) <= 1.1
