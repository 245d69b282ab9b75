"""The loop over iterations of masked autoregression: parity, counts, layouts, guidance."""

import functools

import fixtures
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskrl_jax.convert.mar import params_of
from maskrl_jax.distill import diffusion
from maskrl_jax.models.mar import Mar
from maskrl_jax.sampling import mar
from maskrl_jax.sampling.mar import MarPlan

# specs/mar.md section 12: tokens of each iteration, of 256.
DRAWN = {
    4: [20, 55, 84, 97],
    8: [5, 15, 24, 31, 39, 45, 48, 49],
    16: [2, 3, 7, 8, 11, 13, 15, 16, 19, 20, 22, 23, 23, 25, 24, 25],
}


def drawn(plan):
    before = (plan.num_tokens, *plan.masked_after)
    return [m - n for m, n in zip(before, before[1:], strict=False)]


@fixtures.every_configuration("mar_ar_schedule")
def test_schedule_is_the_reference_s(folder):
    for name, counts in fixtures.load(folder)[3].items():
        tokens, steps = (int(part[3:]) if part[:3] == "seq" else int(part[4:]) for part in name.split("_")[2:])
        assert (*MarPlan(tokens, steps).masked_after[:-1], 1) == tuple(counts)


@fixtures.every_configuration("mar")
def test_iterations_are_the_reference_s(folder):
    """Every iteration from the reference's tokens: condition, guidance, chain, and what is written where."""
    config, state, inputs, outputs = fixtures.load(folder)
    ar, sizes = config["ar"], fixtures.mar_sizes(config)
    plan = MarPlan(sizes.num_tokens, ar["num_iter"])
    dials_N = plan.dials(ar["cfg"], ar["cfg_schedule"], ar["temperature"])
    model, params = Mar(sizes), jax.tree.map(jnp.asarray, params_of(state, sizes))
    process = diffusion.make_process(1000, int(config["ctor"]["num_sampling_steps"]))
    order, cond = jnp.asarray(np.int32(inputs["orders"])), jnp.asarray(np.int32(inputs["labels"]))
    conds = [cond, jnp.full_like(cond, sizes.cond_vocab - 1)]
    tokens, batch = jnp.zeros((*order.shape, sizes.channels)), len(cond)
    rows = np.arange(batch)[:, None]
    before = (sizes.num_tokens, *plan.masked_after)
    for k, (now, after) in enumerate(zip(before, before[1:], strict=False)):
        places = np.sort(
            np.asarray(order)[:, after:now], axis=1
        )  # the reference's rows: sample by sample, raster order
        width = places.shape[1]

        def by_place(rows_RC, places=places, width=width):
            grid = np.zeros((batch, sizes.num_tokens, sizes.channels), np.float32)
            grid[rows, places] = rows_RC[: batch * width].reshape(batch, width, -1)
            return grid

        first = jnp.asarray(by_place(inputs[f"ar_iter{k}.init_noise"]))
        noise = jnp.asarray(np.stack([by_place(x) for x in inputs[f"ar_iter{k}.step_noise"]]))

        def draw(z, null, dials, places_BR, first=first, noise=noise):
            known, empty = (model.apply(params, x, method="head_condition") for x in (z, null))

            def head(x, timestep):
                outs = (model.apply(params, x, timestep, c, method="denoise") for c in (known, empty))
                (guess, share), (other, _) = (diffusion.split(out) for out in outs)
                return other + dials.guidance * (guess - other), share

            at = lambda x: jnp.take_along_axis(x, places_BR[..., None], axis=1)  # noqa: E731
            return diffusion.run_chain(process, head, at(first), lambda i: at(noise[i]), dials.temperature)

        backbone = lambda *arguments: model.apply(params, *arguments, method="backbone")  # noqa: E731
        shape, dials = (sizes.num_tokens - now, width), dials_N.at(k)
        with jax.default_matmul_precision("highest"):
            step = functools.partial(mar.iterate, backbone, draw, shape=shape, masked=now, after=after, dials=dials)
            found = jax.jit(step)(tokens, order, conds, order)
        wanted = outputs[f"ar_iter{k}.sampled"][: batch * width].reshape(batch, width, -1)
        got = np.asarray(mar.to_raster(found, order))[rows, places]
        np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-4 * np.abs(wanted).max())
        grid = np.array(mar.to_raster(tokens, order))
        grid[rows, places] = wanted
        tokens = mar.to_order(jnp.asarray(grid), order)
    final = outputs["ar_final_latents"]
    laid = np.asarray(mar.to_raster(tokens, order)).reshape(batch, *final.shape[2:], -1).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(laid, final, atol=1e-5 * np.abs(final).max())


@pytest.mark.parametrize(("steps", "counts"), DRAWN.items())
def test_counts(steps, counts):
    assert drawn(MarPlan(256, steps)) == counts


def test_counts_of_many_iterations():
    assert drawn(MarPlan(256, 256)) == [1] * 256
    many = drawn(MarPlan(256, 64))
    assert (many[:13], max(many), many[-3:]) == ([1] * 13, 7, [6] * 3)
    few = drawn(MarPlan(256, 32))
    assert (max(few), few[-1]) == (13, 12)


def test_guidance_grows_with_what_is_drawn():
    scales = MarPlan(256, 4).dials(3.0).guidance
    np.testing.assert_allclose(scales[0], 1 + 2 * 20 / 256)
    np.testing.assert_allclose(scales[-1], 1 + 2 * 255 / 256)
    np.testing.assert_array_equal(MarPlan(256, 4).dials(3.0, "constant").guidance, 3.0)
    with pytest.raises(ValueError, match="cosine"):
        MarPlan(256, 4).dials(3.0, "cosine")


def test_the_first_tokens_keep_their_noise():
    """Of 16 iterations over 64 tokens three see fewer than 3 tokens, and of 8 two."""
    np.testing.assert_allclose(MarPlan(64, 16).dials(temperature=0.3, full_noise=3).temperature, [1] * 3 + [0.3] * 13)
    np.testing.assert_allclose(MarPlan(64, 8).dials(temperature=0.3, full_noise=3).temperature, [1] * 2 + [0.3] * 6)
    np.testing.assert_allclose(MarPlan(64, 8).dials(temperature=0.3).temperature, 0.3)
    np.testing.assert_allclose(MarPlan(64, 8).dials().temperature, 1)


@pytest.mark.parametrize("bucket", [1, 8, 32])
def test_segments_hold_every_iteration_once_and_all_that_is_visible(bucket):
    plan = MarPlan(256, 64, bucket=bucket)
    segments = plan.segments()
    assert [m for s in segments for m in s.masked] == [256, *plan.masked_after[:-1]]
    assert [m for s in segments for m in s.after] == list(plan.masked_after)
    for segment in segments:
        assert segment.rows % bucket == 0
        assert all(0 <= segment.rows - (256 - m) < bucket for m in segment.masked)
        assert segment.width == max(m - n for m, n in zip(segment.masked, segment.after, strict=True))
    if bucket == 32:
        assert len(segments) <= 9


NULL = -1
CHANNELS = 2


def fake_backbone(tokens, order, cond, masked):
    """z: sum of what is visible, how much that is, and the condition."""
    length, rows = order.shape[1], tokens.shape[1]
    seen = jnp.arange(length - rows, length) >= masked
    total = jnp.where(seen[None, :, None], tokens, 0).sum((1, 2))
    parts = jnp.stack([total, jnp.broadcast_to(seen.sum() * 1.0, total.shape), cond * 1.0], axis=-1)
    return jnp.broadcast_to(parts[:, None], (*order.shape, 3))


def fake_draw(z, null, dials, keys):
    own = jax.vmap(jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, 0), (CHANNELS,))))(keys)
    guidance = 0.0 if null is None else dials.guidance * (z[..., 2:] - null[..., 2:])
    return own + z[..., 1:2] + guidance + 0.01 * z[..., :1]


@functools.partial(jax.jit, static_argnums=(1, 2))
def made(keys, plan, guidance=1.0, first=0):
    cond = first + jnp.arange(len(keys), dtype=jnp.int32)
    conds = [cond] if guidance == 1 else [cond, jnp.full_like(cond, NULL)]
    return mar.generate(fake_backbone, fake_draw, keys, conds, plan.dials(guidance), plan, CHANNELS)


def keys(count=3, seed=0):
    return jax.random.split(jax.random.key(seed), count)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("bucket", [2, 4, 16])
def test_buckets_change_nothing(bucket, guidance):
    exact, padded = (made(keys(), MarPlan(16, 6, b), guidance) for b in (1, bucket))
    np.testing.assert_allclose(padded.tokens, exact.tokens, rtol=1e-5)
    np.testing.assert_array_equal(padded.commit_step, exact.commit_step)


def test_every_token_is_drawn_once_and_kept():
    plan = MarPlan(16, 6)
    found = made(keys(), plan)
    for steps, tokens in zip(np.asarray(found.commit_step), np.asarray(found.tokens), strict=True):
        assert np.bincount(steps).tolist() == drawn(plan)
        seen = 16 - np.array([16, *plan.masked_after[:-1]])
        # The fake adds how much was visible: a token that was drawn again would have another number.
        rest = tokens - seen[steps][:, None]
        small = np.minimum(rest % 1, 1)
        assert np.all(rest >= 0) and np.all(small <= 1)
        first = tokens[steps == 0]
        assert np.all((first >= 0) & (first < 1))


def test_a_sample_depends_on_its_own_key_alone():
    plan = MarPlan(16, 4)
    several, alone = made(keys(), plan, 2.0), made(keys()[1:2], plan, 2.0, 1)
    np.testing.assert_allclose(alone.tokens[0], several.tokens[1], rtol=1e-6)
    other = made(keys(seed=1), plan, 2.0)
    assert np.abs(other.tokens - several.tokens).max() > 1e-3


def test_orders_are_uniform_permutations():
    order = np.asarray(mar.orders(keys(4000), 4))
    np.testing.assert_array_equal(np.sort(order, axis=1), np.tile(np.arange(4), (4000, 1)))
    for place in range(4):
        np.testing.assert_allclose(np.bincount(order[:, place]) / 4000, 0.25, atol=0.03)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"num_steps": 17}, "num_steps 17"),
        ({"num_steps": 0}, "num_steps 0"),
        ({"bucket": 0}, "bucket 0"),
    ],
)
def test_bad_plans_are_refused(settings, named):
    with pytest.raises(ValueError, match=named):
        MarPlan(**{"num_tokens": 16, "num_steps": 4} | settings)
