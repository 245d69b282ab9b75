"""Meissonic's transformer: parity with the reference, parameter counts, and what it may depend on."""

import dataclasses
import functools
import math

import fixtures
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskrl_jax.convert.meissonic import config_of, params_of
from maskrl_jax.models import mmdit
from maskrl_jax.models.layers import sinusoid
from maskrl_jax.models.meissonic import Meissonic, MeissonicConfig, Prompt

SMALL = MeissonicConfig(
    grid=(4, 6), codebook_size=6, vocab_size=9, depth=2, single_depth=2, heads=2, head_width=8, text_width=5,
    rope_axes=(2, 4, 2),
)  # fmt: skip
# The taps that are whole modules' outputs.
TAPS = {
    "cond_embed_out": ("condition", "said"),
    "embed_out": ("token_out",),
    "text_tokens_in": ("text_norm",),
    "down_block_out": ("down",),
    "image_tokens_in": ("in_out",),
    "temb": ("condition",),
    "project_from_hidden_out": ("out",),
}


def prompt(seed=0, batch=2, config=SMALL, length=3):
    states, pooled = jax.random.split(jax.random.key(seed))
    return Prompt(
        jax.random.normal(states, (batch, length, config.text_width)),
        jax.random.normal(pooled, (batch, config.width)),
        jnp.tile(jnp.array([[1024.0, 1024.0, 0.0, 0.0, 6.0]]), (batch, 1)),
    )


def reference(folder):
    """Return (model, params, arguments, expected outputs)."""
    config, state, inputs, outputs = fixtures.load(folder)
    ids = np.int32(inputs["hidden_states"])
    model = Meissonic(config_of(config["ctor"], ids.shape[1:]))
    cond = Prompt(inputs["encoder_hidden_states"], inputs["pooled_projections"], inputs["micro_conds"])
    timestep = np.broadcast_to(inputs["timestep"], len(ids))
    return model, params_of(state, model.config), (ids.reshape(len(ids), -1), timestep, cond), outputs


def close(found, wanted, timestep):
    """At timestep t an angle is 1000 t times a frequency, of which the reference's exp rounds one in 128 otherwise."""
    tolerance = max(5e-5, 4e-6 * np.max(timestep))
    np.testing.assert_allclose(found, wanted, rtol=0, atol=tolerance * np.abs(wanted).max())


@fixtures.every_configuration("meissonic_transformer")
def test_logits_are_the_reference_s(folder):
    model, params, arguments, outputs = reference(folder)
    with jax.default_matmul_precision("highest"):
        found = jax.jit(model.apply)(params, *arguments)
    wanted = outputs["logits"].reshape(*outputs["logits"].shape[:2], -1).swapaxes(1, 2)
    close(found, wanted, arguments[1])


def looped(block, sizes, params, x, *rest):
    """Blocks one by one, where the model scans."""
    for index in range(len(jax.tree.leaves(params)[0])):
        x, _ = block(sizes).apply({"params": jax.tree.map(lambda p: p[index], params)}, x, *rest)  # noqa: B023
    return x


def stages(model, params, ids, timestep, cond):
    """The reference's taps."""
    c, b = model.config, model.config.blocks
    keep = lambda module, method: method == "__call__"  # noqa: E731
    features, kept = model.apply(
        params, ids, timestep, cond, capture_intermediates=keep, mutable=["intermediates"], method="features"
    )
    found = {
        name: functools.reduce(lambda tree, part: tree.get(part, {}), path, kept["intermediates"])
        for name, path in TAPS.items()
    }
    found = {name: x["__call__"][0] for name, x in found.items() if x}
    turns = mmdit.rotations(c.rope_axes, c.inner_grid, cond.states.shape[1])
    rest = found["temb"], turns
    streams = found["text_tokens_in"], found["image_tokens_in"].astype(jnp.float32)
    text, image = looped(mmdit.DualBlock, b, params["params"]["dual_blocks"], streams, *rest)
    x = jnp.concatenate([text, image], axis=1)
    x = looped(mmdit.SingleBlock, b, params["params"]["single_blocks"], x, *rest)
    cos, sin = (x.repeat(2, axis=1) for x in turns)
    blocks = {"dual_text": text, "dual_image": image, "single_out": x, "rope_cos": cos, "rope_sin": sin}
    return {"down_block_out": found["embed_out"]} | found | blocks | {"up_block_out": features}


@fixtures.every_configuration("meissonic_transformer")
def test_every_stage_is_the_reference_s(folder):
    model, params, arguments, outputs = reference(folder)
    with jax.default_matmul_precision("highest"):
        found = jax.jit(functools.partial(stages, model))(params, *arguments)
    assert found.keys() == outputs.keys() - {"logits"}
    for name, x in found.items():
        wanted = outputs[name]
        if wanted.ndim == 4:
            wanted = wanted.transpose(0, 2, 3, 1)
        close(np.reshape(x, wanted.shape), wanted, arguments[1])


@fixtures.every_configuration("meissonic_transformer")
def test_places_are_the_reference_s(folder):
    config, _, inputs, _ = fixtures.load(folder)
    c = config_of(config["ctor"], inputs["hidden_states"].shape[1:])
    rows, columns = np.indices(c.inner_grid).reshape(2, -1)
    np.testing.assert_array_equal(inputs["img_ids"], np.stack([0 * rows, rows, columns], axis=-1))
    np.testing.assert_array_equal(inputs["txt_ids"], np.zeros_like(inputs["txt_ids"]))
    assert c.mask_id == config["mask_token_id"]
