"""Text to image with DiMOO: the reference's tokens under its own noise, and what keys, prompts and padding may change."""

import functools

import chex
import fixtures
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_dimoo import (
    EMPTY,
    LAYOUT,
    PROMPTS,
    STEPS,
    K,
    N,
    bound,
    conditions,
    even,
    freeze,
    keys,
    light,
    plain,
    small,
    weights,
)

from maskrl_jax.convert.dimoo import config_of, params_of
from maskrl_jax.convert.shortcut import dimoo_params_of
from maskrl_jax.models.dimoo import Dimoo
from maskrl_jax.models.dimoo_shortcut import DimooShortcut
from maskrl_jax.sampling import dimoo, draws, maskgit, refresh, schedules, shortcut
from maskrl_jax.sampling.dimoo import CacheConfig, make_plan


@pytest.fixture(autouse=True, scope="module")
def exact():
    with jax.default_matmul_precision("highest"):
        yield


def frozen_noise(inputs, outputs, steps, num_tokens, codes):
    """The reference's noise as tables [T,N,K] and [T,N], and which tokens were masked before each step [T+1,N].

    It was drawn for masked tokens alone, in raster order.
    """
    drawn, order = np.zeros((steps, num_tokens, codes), np.float32), np.zeros((steps, num_tokens), np.float32)
    masked = np.ones((steps + 1, num_tokens), bool)
    for step in range(steps):
        for table, name in ((drawn, "sample"), (order, "conf")):
            uniform = inputs.get(f"step{step:02}.{name}_uniform")
            if uniform is not None:  # none is drawn at temperature 0
                table[step, masked[step]] = -np.log(-np.log(uniform[0] + np.float32(1e-20)) + np.float32(1e-20))
        masked[step + 1] = masked[step]
        masked[step + 1, masked[step]] = outputs[f"step{step:02}.stay_masked"][0]
    return drawn, order, masked


def referred(folder):
    """Return (description, layout, base, conditions, inputs, outputs, plan, move or None)."""
    described, state, inputs, outputs = fixtures.load(folder)
    if not state:
        pytest.skip("a configuration of counts alone")
    layout, made = fixtures.dimoo_layout(described), described["model"]
    own = {name.removeprefix("model_lm."): x for name, x in state.items() if name.startswith("model_lm.")}
    config = config_of(made, codebook_size=layout.codebook_size)
    assert config.code_offset == layout.code_offset
    base, move = bound(Dimoo(config), params_of(own, config)), None
    if described["shortcut"]:
        sizes = fixtures.dimoo_shortcut_sizes(made, described["shortcut"])
        rest = {name.removeprefix("shortcut."): x for name, x in state.items() if name.startswith("shortcut.")}
        move = bound(DimooShortcut(sizes), dimoo_params_of(rest, sizes))
    prompt = inputs["prompt_ids"][0, : described["code_start"] - 2].tolist()
    both = conditions([prompt], inputs["uncon_ids"][0].tolist())
    plan = make_plan(layout.num_tokens, described["timesteps"], described["cfg_scale"], described["temperature"])
    return described, layout, base, both, inputs, outputs, plan, move


@fixtures.every_configuration("dimoo_generate")
def test_tokens_are_the_reference_s(folder, monkeypatch):
    described, layout, base, (cond, null), inputs, outputs, plan, move = referred(folder)
    steps, codes = described["timesteps"], layout.codebook_size
    np.testing.assert_array_equal(plan.masked_after, outputs["n_masked_after_step"])
    drawn, order, masked = frozen_noise(inputs, outputs, steps, layout.num_tokens, codes)
    freeze(monkeypatch, drawn, order)
    given, full = jnp.full((1, layout.num_tokens), codes), np.ones(steps, bool)
    if described["cache"]:
        config = CacheConfig(**{name: described["cache"][name] for name in CacheConfig.__dataclass_fields__})
        asks = config.full_steps(steps), config.cache_ratio
        run = functools.partial(dimoo.decode_cached, base, layout, keys(0), cond, null, plan, *asks)
        rollout = jax.jit(run)(given)
    elif move:
        full = np.isin(np.arange(steps), refresh.even_steps(steps, described["budget"]))
        parts = dimoo.parts(base, layout, null, move, not described["no_prompt"])
        asks, most = refresh.scheduled(np.flatnonzero(full), steps), shortcut.most_controls(plan, layout.num_tokens)
        run = functools.partial(shortcut.decode, parts, keys(0), cond, null, plan, asks, mask_id=codes, most=most)
        rollout, memory = jax.jit(lambda g: run(given_BN=g))(given)
        np.testing.assert_array_equal(memory.full, full)
    else:
        run = functools.partial(maskgit.decode, dimoo.logits_fn(base, layout), keys(0), cond, null, plan)
        rollout = jax.jit(lambda g: run(g, codes))(given)
        assert rollout.calls.tolist() == [steps]
    np.testing.assert_array_equal(rollout.ids, outputs["vq_ids_minus_offset"])
    np.testing.assert_array_equal(np.asarray(rollout.commit_step) > np.arange(-1, steps)[:, None], masked)
    flags = outputs["full_model_calls"].reshape(steps, -1)  # one of each branch; partial passes are the backbone's too
    np.testing.assert_array_equal(flags, np.tile(full[:, None], (1, flags.shape[1])))


@fixtures.every_configuration("dimoo_generate")
def test_guided_logits_of_full_steps_are_the_reference_s(folder):
    described, layout, base, (cond, null), inputs, outputs, plan, move = referred(folder)
    if described["cache"]:
        pytest.skip("logits of partial passes depend on the passes before")
    steps, codes = described["timesteps"], layout.codebook_size
    full = refresh.even_steps(steps, described["budget"]) if move else range(steps)
    masked = frozen_noise(inputs, outputs, steps, layout.num_tokens, codes)[2]
    found = [np.where(masked[step], codes, outputs["vq_ids_minus_offset"][0]) for step in full]
    cond = jax.tree.map(lambda x: jnp.tile(x, (len(found), 1)), cond)
    fn = draws.guided(dimoo.logits_fn(base, layout), null)
    scale = jnp.full(len(found), plan.guidance[0])
    logits = jax.jit(lambda ids: fn(ids, jnp.zeros(len(found)), cond, scale))(jnp.asarray(found))
    for row, step in enumerate(full):
        expected = outputs[f"step{step:02}.guided_logits"][0]
        np.testing.assert_allclose(logits[row][masked[step]], expected, rtol=0, atol=1e-4 * np.abs(expected).max())


@fixtures.every_configuration("dimoo_generate")
def test_counts_of_real_sizes_are_the_reference_s(folder):
    outputs = fixtures.load(folder)[3]
    for name in [name for name in outputs if name.startswith("keep_masked_")]:
        num_tokens, steps = (int(part[1:]) for part in name.split("_")[-2:])
        np.testing.assert_array_equal(schedules.floored_cosine(num_tokens, steps), outputs[name])


@pytest.mark.parametrize(
    ("num_tokens", "steps", "first", "last"),
    [
        (4096, 64, [2, 3, 7, 8, 11, 14, 16, 18, 21, 23, 26], [100, 100, 101, 100, 100]),
        (4096, 32, [5, 15, 25, 34, 44, 54], [196, 198, 200, 201, 200]),
        (4096, 16, [20, 59, 98, 135, 172, 207, 239, 270, 298, 323, 345, 363, 378, 390, 398, 401], []),
        (16, 12, [1, 0, 1, 1], [1, 2, 2, 2]),  # 16 cos(pi/2 2/12) = 15.5: the second step reveals nothing
        (16, 6, [1, 2, 2, 4, 3, 4], []),  # two thirds of the way 16 / 2 is rounded below 8
    ],
)
def test_revealed_counts_of_the_specification(num_tokens, steps, first, last):
    left = schedules.floored_cosine(num_tokens, steps)
    found = (-np.diff(left, prepend=num_tokens)).tolist()
    assert found[: len(first)] == first and found[len(found) - len(last) :] == last
    assert left[-1] == 0 and left.dtype == np.int32


def test_places_for_controls_at_the_published_size():
    assert shortcut.most_controls(make_plan(4096), 4096) == 101


def test_a_step_may_reveal_nothing():
    plan = make_plan(16, 12, cfg_scale=0)
    table = jax.random.normal(jax.random.key(1), (2, 16, 5))
    found = maskgit.decode(lambda *_: table, keys(0, 1), 0, 0, plan, jnp.full((2, 16), 5), 5)
    counts = [np.bincount(row, minlength=12).tolist() for row in np.asarray(found.commit_step)]
    assert counts == [[1, 0, 1, 1, 1, 1, 2, 2, 1, 2, 2, 2]] * 2


def test_confidence_does_not_know_the_temperature(monkeypatch):
    """Probabilities of the first code: .711 and .731 as they are, .948 and .881 at temperature 1/2."""
    freeze(monkeypatch, np.zeros((2, 2, 4)), np.zeros((2, 2)))
    table, plan = jnp.asarray([[[2.0, 0, 0, 0], [1, 0, -9, -9]]]), make_plan(2, 2, cfg_scale=0, temperature=0.5)
    commits = [
        maskgit.decode(lambda *_: table, keys(0), 0, 0, p, jnp.full((1, 2), 4), 4).commit_step.tolist()
        for p in (plan, plan.replace(plain_confidence=False))
    ]
    assert commits == [[[1, 0]], [[0, 1]]]


def test_given_tokens_stay_and_the_rest_is_filled():
    given = EMPTY.at[:, 2:7].set(3)
    rollout = plain(make_plan(N, STEPS), *conditions(), keys(0, 1), given)
    assert (rollout.ids[:, 2:7] == 3).all() and (rollout.ids < K).all()
    assert (rollout.commit_step[:, 2:7] == maskgit.GIVEN).all()


def test_at_temperature_0_keys_do_not_matter():
    plan = make_plan(N, STEPS, temperature=0)
    first, second = (plain(plan, *conditions(), keys(*index)) for index in ((0, 1), (2, 3)))
    chex.assert_trees_all_equal(first, second)
    assert (plain(make_plan(N, STEPS), *conditions(), keys(0, 1)).ids != first.ids).any()


@pytest.mark.parametrize("way", ["plain", "shortcut"])
def test_batches_equal_single_samples_however_padded(way):
    plan = make_plan(N, STEPS)
    run = plain if way == "plain" else lambda plan, *args: light(plan, even(3), *args)[0]
    whole = run(plan, *conditions(), keys(0, 1))
    assert (whole.ids[0] != whole.ids[1]).any()
    for row in (0, 1):
        alone = run(plan, *conditions(PROMPTS[row : row + 1], multiple=16), keys(row))
        np.testing.assert_array_equal(alone.ids[0], whole.ids[row])


@pytest.mark.parametrize("cfg_scale", [0.0, 4.0])
def test_a_shortcut_that_never_runs_is_the_plain_sampler(cfg_scale):
    plan = make_plan(N, STEPS, cfg_scale)
    rollout, _ = light(plan, even(STEPS), *conditions(), keys(0, 1))
    chex.assert_trees_all_equal(rollout, plain(plan, *conditions(), keys(0, 1)))
    other = light(plan, even(2), *conditions(), keys(0, 1))[0]
    assert (other.calls == 2).all() and (other.ids != rollout.ids).any()


def test_a_kept_first_step_is_the_computed_one():
    plan, (cond, null) = make_plan(N, STEPS), conditions()

    @jax.jit
    def computed(params):
        parts = dimoo.parts(small(params)[0], LAYOUT, null, small(params)[1])
        return shortcut.empty_features(parts, cond, null, plan, N, K)

    first = computed(weights())
    kept = light(plan, even(3), cond, null, keys(0, 1), first=first)[0]
    chex.assert_trees_all_equal(kept.replace(calls=kept.calls + 1), light(plan, even(3), cond, null, keys(0, 1))[0])


@pytest.mark.parametrize(("prompt_controls", "prompt"), [(True, [1, 2, 3]), (False, [])])
def test_controls_are_the_prompt_and_what_was_revealed(prompt_controls, prompt):
    """Grid tokens 1 and 6 of codes 5 and 2 lie behind prompt, BOA and BOI by 1 and, one newline later, 7."""
    cond, null = conditions(PROMPTS[:1], multiple=4)
    seen = {}

    def move(f, told, places, valid, share, padding, positions):
        seen.update(told=told, places=places, valid=valid, padding=padding)
        return f + 1.0

    parts = dimoo.parts(small()[0], LAYOUT, null, move, prompt_controls)
    revealed = ([1, 6, 0], [5, 2, K], [True, True, False])
    controls = shortcut.Controls(*(jnp.asarray([x, x]) for x in revealed))
    features = jnp.zeros((2, 4 + LAYOUT.length, 16), jnp.bfloat16)
    both = draws.with_null(cond, null)
    assert parts.advance(features, controls, jnp.ones(2), both).dtype == jnp.bfloat16
    assert np.isfinite(seen["told"]).all()
    assert seen["padding"].sum(1).tolist() == [1, 2]
    for row, (ids, length) in enumerate((([*prompt, 15, 12], 3), ([15, 12], 2))):
        valid = np.asarray(seen["valid"][row])
        embedded = small()[0](jnp.asarray(ids), method="embedded")
        np.testing.assert_array_equal(np.asarray(seen["told"][row])[valid], embedded)
        expected = [*range(len(ids) - 2), length + 2 + 1, length + 2 + 7]
        assert np.asarray(seen["places"][row])[valid].tolist() == expected


def test_drift_reads_the_image_tokens_alone():
    """A network that moves nothing but the newlines never asks for a full step."""
    plan, (cond, null) = make_plan(N, STEPS), conditions()
    length = cond.ids.shape[1] + LAYOUT.length
    image = (np.arange(length) < N)[None, :, None]

    @jax.jit
    def calls(moved):
        parts = dimoo.parts(small()[0], LAYOUT, null, lambda f, *_: f + moved)
        asks, most = refresh.adaptive(1e-3, STEPS, STEPS, STEPS), shortcut.most_controls(plan, N)
        return shortcut.decode(parts, keys(0, 1), cond, null, plan, asks, EMPTY, K, most=most)[0].calls

    assert calls(~image).tolist() == [1, 1]
    assert calls(image).tolist() == [STEPS // 2] * 2


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_a_config_alone_gives_the_published_plan(temperature):
    """As a config file writes it; 1e-6 stands for the temperature 0."""
    written = {
        "num_steps": 12,
        "max_steps": 12,
        "schedule": "floored-cosine",
        "gumbel": temperature,
        "last_gumbel": temperature,
        "temperature": temperature or 1e-6,
        "plain_confidence": True,
        "guidance": 5.0,
    }
    plan = maskgit.make_plan(maskgit.SamplerConfig(**written), 16)
    chex.assert_trees_all_equal(plan, make_plan(16, 12, cfg_scale=4.0, temperature=temperature))
    np.testing.assert_array_equal(plan.masked_after, schedules.floored_cosine(16, 12))
    np.testing.assert_array_equal(plan.noise, np.full(12, temperature, np.float32))
    np.testing.assert_array_equal(plan.guidance, np.full(12, 5, np.float32))
    np.testing.assert_array_equal(plan.temperature, np.full(12, temperature or 1e-6, np.float32))
    assert (plan.least, plan.plain_confidence, plan.guide) == (0, True, True)


def test_impossible_plans_are_refused():
    with pytest.raises(ValueError, match="^temperature -1 must be at least 0$"):
        make_plan(16, 4, temperature=-1)
    with pytest.raises(ValueError, match="^num_steps 17 must lie in 1..16"):
        make_plan(16, 17)
