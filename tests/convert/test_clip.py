"""The mapping is strict, and the way back is exact; tests/models/test_clip.py checks the numbers."""

import json
import re

import clip_weights
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskrl_jax.convert import clip as convert
from maskrl_jax.models.clip import OPENAI_B32, AestheticHead, Clip, TextTower

SMALL = clip_weights.SMALL
NORM = "vision_model.encoder.layers.1.layer_norm2.bias"


def state():
    return clip_weights.state(SMALL)


def refused(state, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        convert.params_of(state, SMALL)


def open_clip_of(state):
    """The same weights in the other layout."""
    parts = {"text_model": ("", SMALL.text), "vision_model": ("visual.", SMALL.picture)}
    found = {
        "logit_scale": state["logit_scale"],
        "token_embedding.weight": state["text_model.embeddings.token_embedding.weight"],
        "positional_embedding": state["text_model.embeddings.position_embedding.weight"],
        "text_projection": state["text_projection.weight"].T,
        "visual.proj": state["visual_projection.weight"].T,
        "visual.class_embedding": state["vision_model.embeddings.class_embedding"],
        "visual.conv1.weight": state["vision_model.embeddings.patch_embedding.weight"],
        "visual.positional_embedding": state["vision_model.embeddings.position_embedding.weight"],
    }
    norms = {"ln_final": "text_model.final_layer_norm", "visual.ln_pre": "vision_model.pre_layrnorm"}
    norms["visual.ln_post"] = "vision_model.post_layernorm"
    linears = {"attn.out_proj": "self_attn.out_proj", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    for theirs, (ours, config) in parts.items():
        for index in range(config.depth):
            to, stem = f"{ours}transformer.resblocks.{index}", f"{theirs}.encoder.layers.{index}"
            norms |= {f"{to}.ln_{i}": f"{stem}.layer_norm{i}" for i in (1, 2)}
            norms |= {f"{to}.{a}": f"{stem}.{b}" for a, b in linears.items()}
            for kind in ("weight", "bias"):
                rows = [state[f"{stem}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
                found[f"{to}.attn.in_proj_{kind}"] = np.concatenate(rows)
    return found | {f"{a}.{kind}": state[f"{b}.{kind}"] for a, b in norms.items() for kind in ("weight", "bias")}


def test_parameters_fit_the_model():
    inputs = jnp.zeros((1, 12, 12, 3)), jnp.zeros((1, 9), jnp.int32)
    shapes = jax.eval_shape(Clip(SMALL).init, jax.random.key(0), *inputs)
    found = convert.params_of(state(), SMALL)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), found) == jax.tree.map(lambda x: (x.shape, x.dtype), shapes)


def test_the_way_back_is_exact():
    before = state()
    after = convert.state_of(convert.params_of(before, SMALL), SMALL)
    assert after.keys() == before.keys()
    for name, value in before.items():
        assert after[name].tobytes() == value.tobytes() and after[name].shape == value.shape, name


def test_open_clip_s_layout_gives_the_same_parameters():
    one, two = (convert.params_of(x, SMALL) for x in (state(), open_clip_of(state())))
    jax.tree.map(np.testing.assert_array_equal, one, two)


def test_a_text_encoder_alone():
    text = {k: v for k, v in state().items() if k.startswith("text_")}
    params = convert.text_params_of(text, SMALL.text)
    shapes = jax.eval_shape(TextTower(SMALL.text).init, jax.random.key(0), jnp.zeros((1, 9), jnp.int32))
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, shapes)
    back = convert.text_state_of(params, SMALL.text)
    assert {k: v.tobytes() for k, v in back.items()} == {k: v.tobytes() for k, v in text.items()}
    with pytest.raises(ValueError, match="logit_scale without a place"):
        convert.text_params_of(text | {"logit_scale": np.zeros(())}, SMALL.text)


@pytest.mark.parametrize("layout", [dict, open_clip_of])
def test_every_missing_key_is_named(layout):
    whole = layout(state())
    for name in sorted(whole):
        if name != "visual.conv1.weight":  # which tells the layout
            refused({k: v for k, v in whole.items() if k != name}, f"the state lacks {name}")


def test_keys_left_over_and_wrong_shapes_are_named():
    refused(state() | {"text_model.extra": np.zeros(1)}, "the state holds text_model.extra without a place")
    refused(state() | {NORM: np.zeros(15)}, f"{NORM} has shape [15], not [16]")


def test_constants_of_old_checkpoints_are_passed_over():
    constants = {"text_model.embeddings.position_ids": np.arange(9)[None], "attn_mask": np.zeros((9, 9))}
    convert.params_of(state() | constants, SMALL)


def test_sizes_from_a_published_config():
    written = json.loads(json.dumps(clip_weights.hugging_face(SMALL)))
    assert convert.config_of(written) == SMALL
    assert convert.config_of({"text_config": {}, "vision_config": {}}) == OPENAI_B32
    # Configs of old name 2 as the end token, and pool at the largest id.
    assert convert.text_config_of({"eos_token_id": 2}) == OPENAI_B32.text


def test_the_aesthetic_predictor():
    widths, found = (6, *AestheticHead.widths), {}
    for layer, inputs, outputs in zip(convert.HEAD_LAYERS, widths[:-1], widths[1:], strict=True):
        found |= {f"layers.{layer}.weight": np.ones((outputs, inputs)), f"layers.{layer}.bias": np.ones(outputs)}
    params = convert.aesthetic_params_of(found, 6)
    shapes = jax.eval_shape(AestheticHead().init, jax.random.key(0), jnp.zeros((1, 6)))
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, shapes)
    with pytest.raises(ValueError, match="layers.7.bias"):
        convert.aesthetic_params_of({k: v for k, v in found.items() if k != "layers.7.bias"}, 6)
