"""Whole runs of published samplers with their frozen noise: Google's parallel decoding (B) and Halton order (C).

Sampler A is in test_shortcut.py, where its steps come from two networks.
"""

import dataclasses
import functools

import fixtures
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_model

from maskrl_jax.convert import google_maskgit as convert_google
from maskrl_jax.convert import halton as convert_halton
from maskrl_jax.models.google_maskgit import GoogleMaskGIT
from maskrl_jax.models.halton import HaltonMaskGIT
from maskrl_jax.sampling import draws, maskgit, schedules
from maskrl_jax.sampling.maskgit import GIVEN, SamplerConfig, make_plan


def keys_of(batch):
    return jax.random.split(jax.random.key(0), batch)


def freeze(monkeypatch, drawn, order=None):
    """Put frozen noise [S,B,N,K] and [S,B,N] in the place of ours; "keys" are step numbers then."""
    drawn = jnp.asarray(drawn)

    def draw(steps_B, logp):
        ids = (logp + drawn[steps_B[0]]).argmax(-1).astype(jnp.int32)
        return ids, jnp.take_along_axis(logp, ids[..., None], axis=-1)[..., 0]

    monkeypatch.setattr(draws, "step_keys", lambda keys, step, _: jnp.full(len(keys), step))
    monkeypatch.setattr(draws, "draw_tokens", draw)
    if order is not None:
        monkeypatch.setattr(draws, "gumbel", lambda steps_B, _: jnp.asarray(order)[steps_B[0]])


def google_plan(config, num_tokens):
    steps = config["num_iter"]
    sampler = SamplerConfig(
        num_steps=steps,
        max_steps=steps,
        schedule=f"shares-{config['mask_scheduling_method']}",
        gumbel=config["choice_temperature"],
        noise_ends="ahead",
    )
    return make_plan(sampler, num_tokens)


@fixtures.every_configuration("gmaskgit_decode")
def test_parallel_decoding_is_the_original_s(folder, monkeypatch):
    """The original keeps every step's tokens before it masks some again: what we have if the step is the last one."""
    config, state, inputs, outputs = fixtures.load(folder)
    sizes = fixtures.google_sizes(config)
    model, params = GoogleMaskGIT(sizes), convert_google.params_of(state, sizes)
    given, cond = fixtures.google_inputs(inputs["input_ids"], sizes)
    plan, first = google_plan(config, sizes.num_tokens), config["start_iter"]
    freeze(monkeypatch, inputs["sample_gumbel"][:, :, 1:], inputs["confidence_gumbel"][:, :, 1:])

    @jax.jit
    def decode(plan):
        logits = lambda ids, _, cond: model.apply(params, ids, cond)  # noqa: E731
        keys_B = keys_of(len(given))
        return maskgit.decode(
            logits, keys_B, jnp.asarray(cond), None, plan, jnp.asarray(given), sizes.mask_id, first_step=first
        )

    known = given != sizes.mask_id
    with jax.default_matmul_precision("highest"):
        whole = decode(plan)
    np.testing.assert_array_equal(np.asarray(whole.commit_step) == GIVEN, known)
    for step in range(config["num_iter"]):
        wanted = outputs["final_seqs"][:, step, 1:]
        if step < first:
            np.testing.assert_array_equal(fixtures.google_inputs(outputs["final_seqs"][:, step], sizes)[0], given)
            continue
        last = plan.left.copy()
        last[step] = 0
        with jax.default_matmul_precision("highest"):
            rollout = decode(plan.replace(left=last))
        np.testing.assert_array_equal(rollout.ids, wanted, f"step {step}")
        if step < config["num_iter"] - 1:
            masked = (np.asarray(whole.commit_step) > step) & ~known
            np.testing.assert_array_equal(masked, outputs["masking"][step][:, 1:], f"step {step}")


def halton_sampler(config):
    return SamplerConfig(
        mode="halton",
        num_steps=config["steps"],
        max_steps=config["steps"],
        schedule="halton",
        guidance=1 + config["w"],
        factors=(config["sm_temp_min"], config["sm_temp_max"]),
        factor_power=config["temp_pow"],
        factor_warmup=config["temp_warmup"],
        randomize=False,
    )


@fixtures.every_configuration("halton_sampler")
def test_halton_sampling_is_the_official_one_s(folder, monkeypatch):
    """The official sampler may draw MASK and lets it stand: a sampler's MASK of its own, K + 1, leaves it so."""
    config, state, inputs, outputs = fixtures.load(folder)
    sizes = fixtures.halton_sizes(config["ctor"])
    model, params = HaltonMaskGIT(sizes), convert_halton.params_of(state, sizes)
    codes, cond = sizes.codebook_size, jnp.asarray(np.int32(inputs["labels"]))
    batch, steps = len(cond), config["steps"]
    freeze(monkeypatch, inputs["categorical_gumbel"])
    plan = make_plan(halton_sampler(config), sizes.num_tokens)

    def logits(ids, _, cond):
        features = model.apply(params, jnp.minimum(ids, codes), cond, method="features")
        return model.apply(params, features, method="entries")

    def predict(kept, step, ids, _):
        guided = draws.guided(logits, jnp.int32(sizes.num_classes))
        found = guided(ids, jnp.zeros(batch, jnp.int32), cond, jnp.full(batch, jnp.asarray(plan.guidance)[step]))
        return found, kept.at[step].set(found), jnp.bool_(True)

    given, kept = jnp.full((batch, sizes.num_tokens), codes + 1), jnp.zeros(outputs["probs"].shape)
    with jax.default_matmul_precision("highest"):
        run = jax.jit(lambda: maskgit.fill(predict, kept, keys_of(batch), plan, given, codes + 1))
        rollout, kept = run()
    np.testing.assert_array_equal(np.minimum(rollout.ids, codes - 1), outputs["final_code"].reshape(batch, -1))
    written = np.asarray(rollout.commit_step)[None] == np.arange(steps)[:, None, None]
    np.testing.assert_array_equal(written, outputs["new_mask"].reshape(written.shape))
    probs = jax.nn.softmax(kept / plan.temperature[:, None, None, None])
    fixtures.close(probs, outputs["probs"], config, "probs")
    drawn = (np.log(outputs["probs"]) + inputs["categorical_gumbel"]).argmax(-1)
    np.testing.assert_array_equal(drawn, outputs["pred_codes"].reshape(drawn.shape))


def google(**changes):
    base = {"num_steps": 8, "max_steps": 8, "schedule": "shares-cosine", "noise_ends": "ahead"}
    return SamplerConfig(**(base | changes))


@functools.partial(jax.jit, static_argnames="first")
def decoded(plan, given, first=0):
    model = toy_model.undecided(4)
    return maskgit.decode(model, keys_of(len(given)), jnp.zeros(len(given), jnp.int32), None, plan, given, 4, first)


def written_out(logits_of, settings, given, first, drawn, order):
    """Sampler B as specs/maskgit.md section 4 has it: [S,B,N], every step's tokens before some are masked again."""
    method, steps, scale, mask = settings
    ids, start_B, kept = given, (given == mask).sum(-1), []
    for step in range(first, steps):
        masked = ids == mask
        logp = np.asarray(jax.nn.log_softmax(logits_of(ids, step)))
        ids = np.where(masked, (logp + drawn[step]).argmax(-1), ids)
        kept.append(ids)
        ratio = (step + 1) / steps
        left_B = np.floor(start_B * schedules.share_left(method, ratio, start_B))
        left_B = np.maximum(np.minimum(left_B, masked.sum(-1) - 1), 1).astype(int)
        confidence = np.take_along_axis(logp, ids[..., None], -1)[..., 0] + scale * (1 - ratio) * order[step]
        confidence = np.pad(np.where(masked, confidence, np.inf), ((0, 0), (0, 1)), constant_values=np.inf)  # class
        cut_B = np.take_along_axis(np.sort(confidence, -1), left_B[:, None], -1)
        ids = np.where((confidence < cut_B)[:, :-1], mask, ids)
    return kept


@pytest.mark.parametrize("method", ["cosine", "uniform", "pow2", "pow0.5", "log", "exp"])
def test_known_tokens_and_a_later_first_step_follow_the_rule_as_written(method, monkeypatch):
    """Rows of 16, 9, 2, 1 and no masked tokens, from step 2 of 6."""
    rng, steps, first = np.random.default_rng(3), 6, 2
    given = np.int32(rng.integers(0, 4, (5, 16)))
    for row, masked in zip(given, (16, 9, 2, 1, 0), strict=True):
        row[rng.permutation(16)[:masked]] = 4
    drawn, order = np.float32(rng.gumbel(size=(steps, 5, 16, 4))), np.float32(rng.gumbel(size=(steps, 5, 16)))
    freeze(monkeypatch, drawn, order)
    plan = make_plan(google(num_steps=steps, max_steps=steps, schedule=f"shares-{method}"), 16)
    model, cond = toy_model.contextual(4), jnp.arange(5)
    at = jax.jit(lambda ids, step: model(ids, jnp.full(5, jnp.asarray(plan.timestep)[step]), cond))
    run = jax.jit(lambda plan: maskgit.decode(model, keys_of(5), cond, None, plan, jnp.asarray(given), 4, first).ids)
    wanted = written_out(at, (method, steps, 4.5, 4), given, first, drawn, order)
    for step in range(first, steps):
        last = plan.left.copy()
        last[step] = 0
        np.testing.assert_array_equal(run(plan.replace(left=last)), wanted[step - first], f"step {step}")


def test_shares_count_from_what_was_masked_at_the_start():
    """Cosine in 4 steps: floor of 16 and of 7 times .924, .707, .383."""
    given = jnp.full((2, 16), 4).at[1, 7:].set(0)
    rollout = decoded(make_plan(google(num_steps=4), 16), given)
    steps = np.asarray(rollout.commit_step)
    left = [[(row[row != GIVEN] > s).sum() for s in range(4)] for row in steps]
    assert left == [[14, 11, 6, 0], [6, 4, 2, 0]]


def test_the_last_token_waits_for_the_last_step():
    """One masked token is drawn anew at all eight steps, and kept at the last one."""
    given = jnp.zeros((2, 16), jnp.int32).at[0, 3].set(4)
    rollout = decoded(make_plan(google(), 16), given)
    assert rollout.commit_step[0, 3] == 7
    assert rollout.calls.tolist() == [8, 0]


def test_a_later_first_step_leaves_out_those_before():
    given = jnp.full((1, 16), 4)
    plan = make_plan(google(num_steps=4), 16)
    steps = np.asarray(decoded(plan, given, first=2).commit_step)
    assert [(steps == s).sum() for s in range(4)] == [0, 0, 10, 6]


def test_noise_of_sampler_b_is_that_of_the_step_to_come():
    plan = make_plan(google(num_steps=4, max_steps=5, gumbel=8.0), 16)
    np.testing.assert_allclose(plan.noise, [6, 4, 2, 0, 0])
    assert plan.left.shape == (5, 17)


def test_factors_of_sampler_c_sharpen_the_draw():
    config = halton_sampler(
        {"steps": 4, "w": 0.0, "sm_temp_min": 1.0, "sm_temp_max": 2.5, "temp_pow": 2, "temp_warmup": 1}
    )
    plan = make_plan(dataclasses.replace(config, temperature=0.5, max_steps=6), 16)
    np.testing.assert_allclose(1 / plan.temperature, [1, 4.5, 8, 12.5, 12.5, 12.5])  # (1, 1.5, 2, 2.5)^2 / 0.5
    order = np.argsort(np.asarray(decoded(plan, jnp.full((1, 16), 4)).commit_step)[0], kind="stable")
    counts = -np.diff(plan.masked_after[:4], prepend=16)
    np.testing.assert_array_equal(counts, [2, 3, 3, 8])  # 16 times 1 - 2/pi arccos(1/4, 1/2, 3/4, 1): 2.6, 5.3, 8.6
    halton = np.split(schedules.halton_order(4), np.cumsum(counts)[:-1])
    assert [sorted(part) for part in np.split(order, np.cumsum(counts)[:-1])] == [sorted(part) for part in halton]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"factors": (1.0,)}, r"factors \(1.0,\) on the logits must be two positive numbers"),
        ({"factors": (0.0, 1.0)}, "must be two positive numbers"),
        ({"factor_warmup": -1}, "factor_warmup -1 are at least 0"),
        ({"factor_power": -0.5}, "factor_power -0.5 and"),
        ({"noise_ends": "before"}, "'before' is not one of after, at, ahead"),
    ],
)
def test_impossible_settings_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        SamplerConfig(**wrong)


def test_unknown_shares_are_refused():
    with pytest.raises(ValueError, match="'powder' of shares is not one of cosine, uniform, pow<exponent>, log, exp"):
        make_plan(google(schedule="shares-powder"), 16)
