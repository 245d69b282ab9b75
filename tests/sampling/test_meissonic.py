"""The published sampler of Meissonic, as settings of the fixed-plan loop: parity with its scheduler and its pipeline."""

import dataclasses
import re

import fixtures
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskrl_jax.convert.meissonic import config_of, params_of, sampler_of
from maskrl_jax.models.meissonic import Meissonic, Prompt
from maskrl_jax.sampling import draws, maskgit, routing, schedules


@pytest.fixture
def frozen(monkeypatch):
    """Put a fixture's noise in the place of ours; "keys" are step numbers then."""

    def freeze(inputs):
        tokens = jnp.asarray(inputs["multinomial_gumbel"])
        uniform = np.maximum(inputs["confidence_uniform"], np.float32(1e-20))
        noise = -np.log(np.maximum(-np.log(uniform), np.float32(1e-20)))
        order = jnp.asarray(np.pad(noise, ((0, len(tokens) - len(noise)), (0, 0), (0, 0))))  # the last step has none

        def draw(steps_B, logp):
            ids = (logp + tokens[steps_B[0]]).argmax(-1).astype(jnp.int32)
            return ids, jnp.take_along_axis(logp, ids[..., None], axis=-1)[..., 0]

        monkeypatch.setattr(draws, "step_keys", lambda keys, step, _: jnp.full(len(keys), step))
        monkeypatch.setattr(draws, "draw_tokens", draw)
        monkeypatch.setattr(draws, "gumbel", lambda steps_B, _: order[steps_B[0]])

    return freeze


def keys(batch):
    return jax.random.split(jax.random.key(0), batch)


def scheduled(folder):
    """Return (config, plan, logits [T,B,N,K], inputs, outputs with flat grids)."""
    config, _, inputs, outputs = fixtures.load(folder)
    logits = np.moveaxis(inputs["logits"].reshape(*inputs["logits"].shape[:3], -1), 2, 3)
    sampler = sampler_of(config, config["steps"], 1.0, config["temperature"], config["enable_entropy_filtering"])
    outputs = {name: x.reshape(*x.shape[:2], -1) if x.ndim == 4 else x for name, x in outputs.items()}
    return config, maskgit.make_plan(sampler, logits.shape[2]), logits, inputs, outputs


@fixtures.every_configuration("meissonic_scheduler")
def test_every_step_is_the_scheduler_s(folder, frozen):
    if not (folder / "inputs.safetensors").exists():
        pytest.skip("counts alone")
    config, plan, logits, inputs, outputs = scheduled(folder)
    batch, tokens = logits.shape[1:3]
    np.testing.assert_array_equal(plan.timestep, outputs["timesteps"])
    np.testing.assert_allclose(plan.noise, outputs["temperatures"], atol=1e-6)
    np.testing.assert_array_equal(np.tile(plan.masked_after[:, None], batch), outputs["masked_after_step"])
    frozen(inputs)
    mask = config["mask_token_id"]

    @jax.jit
    def step(carry, logits):
        """The loop's own step, and what it drew."""
        predict = lambda memory, *_: (logits, memory, jnp.bool_(True))  # noqa: E731
        masked = carry.ids == mask
        drawn, logp = draws.draw_tokens(jnp.full(batch, carry.step), maskgit.tempered(traced, carry.step, logits))
        after = maskgit.call(predict, keys(batch), traced, jnp.full(batch, tokens), mask, carry)
        return after, jnp.where(masked, drawn, carry.ids), jnp.where(after.ids == mask, 0, jnp.exp(logp))

    traced = jax.tree.map(jnp.asarray, plan)
    carry = maskgit.begin(jnp.full((batch, tokens), mask), ())
    for index, now in enumerate(logits):
        carry, predicted, kept = step(carry, now)
        np.testing.assert_array_equal(carry.ids, outputs["prev_sample"][index])
        np.testing.assert_array_equal(predicted, outputs["pred_original_sample"][index])
        np.testing.assert_allclose(kept, outputs["pred_mask_probs"][index], rtol=1e-4, atol=1e-7)


@fixtures.every_configuration("meissonic_scheduler")
def test_counts_are_the_scheduler_s(folder):
    _, _, _, outputs = fixtures.load(folder)
    for name, wanted in outputs.items():
        if found := re.fullmatch(r"masked_after_L(\d+)_T(\d+)_(\w+)", name):
            tokens, steps, schedule = int(found[1]), int(found[2]), found[3]
            np.testing.assert_array_equal(schedules.masked_after(f"float32-{schedule}", tokens, steps), wanted)


@fixtures.every_configuration("meissonic_pipeline")
def test_tokens_are_the_pipeline_s(folder, frozen):
    config, state, inputs, outputs = fixtures.load(folder)
    model = Meissonic(config_of(config["transformer"], config["latent_hw"]))
    params, mask = params_of(state, model.config), config["mask_token_id"]
    assert model.config.mask_id == mask
    micro = np.tile(np.float32([config["micro_conds"]]), (len(inputs["prompt_embeds"]), 1))
    prompt = Prompt(inputs["encoder_hidden_states"], inputs["prompt_embeds"], micro)
    negative = Prompt(inputs["negative_encoder_hidden_states"], inputs["negative_prompt_embeds"], micro)
    steps, batch = config["num_inference_steps"], len(micro)
    plan = maskgit.make_plan(
        sampler_of({}, steps, config["guidance_scale"], config["temperature"]), model.config.num_tokens
    )
    frozen(inputs)
    empty = jnp.full((batch, model.config.num_tokens), mask)

    @jax.jit
    def run(params, prompt, negative):
        logits_fn = lambda ids, timestep, cond: model.apply(params, ids, timestep, cond)  # noqa: E731
        both = jax.tree.map(lambda *x: jnp.concatenate(x), negative, prompt)
        first = logits_fn(jnp.tile(empty, (2, 1)), jnp.full(2 * batch, steps - 1), both)
        return first, maskgit.decode(logits_fn, keys(batch), prompt, negative, plan, empty, mask)

    with jax.default_matmul_precision("highest"):
        first, rollout = run(params, prompt, negative)
    wanted = np.moveaxis(
        outputs["transformer_logits_first_step"].reshape(2 * batch, model.config.codebook_size, -1), 1, 2
    )
    rows = slice(2 * batch - len(wanted), None)
    np.testing.assert_allclose(first[rows], wanted, rtol=0, atol=1e-4 * np.abs(wanted).max())
    after = outputs["latents_after_step"].reshape(steps, batch, -1)
    seen = np.where(np.asarray(rollout.commit_step) <= np.arange(steps)[:, None, None], rollout.ids, mask)
    np.testing.assert_array_equal(seen, after)
    np.testing.assert_array_equal(rollout.ids, outputs["final_codes"].reshape(batch, -1))
    assert (rollout.calls == steps).all()


@fixtures.every_configuration("meissonic_scheduler")
def test_predictions_of_a_routed_rollout_are_the_scheduler_s(folder, frozen):
    """The same loop again as MaskFocus rolls out, where its own counts, without float32's rounding, are the same."""
    if not (folder / "inputs.safetensors").exists():
        pytest.skip("counts alone")
    config, plan, logits, inputs, outputs = scheduled(folder)
    steps, batch, tokens, _ = logits.shape
    settings = sampler_of(config, steps, 1.0, config["temperature"])
    own = routing.RoutingConfig(steps, "off", settings.gumbel, guidance=1.0)
    same = np.array_equal(routing.mask_counts(tokens, steps)[1:], plan.masked_after)
    if not same or plan.filtered or not np.allclose(own.noises, plan.noise):
        pytest.skip("settings that a routed rollout does not have")
    frozen(inputs)
    of_step = jnp.asarray(logits)[::-1]  # by timestep
    made = jax.jit(
        lambda: routing.rollout(
            lambda ids, timestep, _: of_step[timestep[0]],
            keys(batch),
            None,
            None,
            own,
            tokens,
            config["mask_token_id"],
            1,
        )
    )()
    np.testing.assert_array_equal(made.predictions, outputs["pred_original_sample"])
    np.testing.assert_array_equal(made.ids, outputs["prev_sample"][-1])


def test_settings_of_the_published_sampler():
    sampler = sampler_of(
        {"masking_schedule": "linear"}, num_steps=4, guidance=0.0, temperature=1.5, entropy_filtering=True
    )
    assert (sampler.schedule, sampler.guidance, sampler.timesteps) == ("float32-linear", 1.0, "countdown")
    plan = maskgit.make_plan(sampler, 16)
    np.testing.assert_allclose(plan.noise, np.linspace(1.5, 0.01, 4), rtol=1e-6)
    np.testing.assert_array_equal(plan.timestep, [3, 2, 1, 0])
    np.testing.assert_array_equal(plan.masked_after, [12, 8, 4, 0])
    assert plan.filtered and not plan.guide
    assert sampler_of({}).guidance == 9.0 and maskgit.make_plan(sampler_of({}), 4096).noise[0] == 2.0


def test_entropy_filtering_heats_what_is_sure():
    """Of a law (1/4, 3/4) its entropy .562335 nats makes (.402219, .597781) (specs/maskfocus.md section 13)."""
    sampler = dataclasses.replace(sampler_of({}, num_steps=4, entropy_filtering=True), temperature=2.0)
    logits = np.broadcast_to(np.float32(2 * np.log([0.25, 0.75])), (1, 3, 2))  # the temperature comes first
    plan = maskgit.make_plan(sampler, 4)
    found = jax.jit(lambda x: jnp.exp(maskgit.tempered(plan, 0, x)))(logits)
    np.testing.assert_allclose(found, np.broadcast_to([0.402219, 0.597781], (1, 3, 2)), atol=2e-6)
