"""A published Meissonic in, a tuned one out; tests/models/test_meissonic.py checks the numbers that it computes."""

import json

import fixtures
import jax
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from maskrl_jax.convert import diffusers_folder, meissonic, vq_model
from maskrl_jax.models.meissonic import Meissonic, Prompt

SETTINGS = {
    "num_layers": 1,
    "num_single_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 5,
    "pooled_projection_dim": 16,
    "axes_dims_rope": [2, 4, 2],
    "vocab_size": 9,
    "codebook_size": 6,
    "downsample": True,
    "upsample": True,
    "guidance_embeds": False,
}


def same_bytes(found, wanted):
    tell = lambda state: {name: (x.dtype, x.shape, x.tobytes()) for name, x in state.items()}  # noqa: E731
    assert tell(found) == tell(wanted)


def shapes_of(model, *arguments):
    shapes = jax.eval_shape(model.init, jax.random.key(0), *arguments)
    return jax.tree.map(lambda x: (x.shape, x.dtype), shapes)


def arguments_of(config):
    text = np.zeros((1, 3, config.text_width)), np.zeros((1, config.width)), np.zeros((1, 5))
    return np.zeros((1, config.num_tokens), np.int32), np.zeros(1), Prompt(*map(np.float32, text))


@fixtures.every_configuration("meissonic_transformer")
def test_the_transformer_goes_there_and_back(folder):
    config, state, _, _ = fixtures.load(folder)
    sizes = meissonic.config_of(config["ctor"])
    params = meissonic.params_of(state, sizes)
    found = jax.tree.map(lambda x: (x.shape, x.dtype), params)
    assert found == shapes_of(Meissonic(sizes), *arguments_of(sizes))
    assert sum(x.size for x in jax.tree.leaves(params)) == config["n_params"]
    same_bytes(meissonic.state_of(params, sizes), state)


@fixtures.every_configuration("meissonic_vqmodel")
def test_the_tokenizer_goes_there_and_back(folder):
    config, state, _, _ = fixtures.load(folder)
    sizes = vq_model.config_of(config["ctor"])
    params = vq_model.params_of(state, sizes)
    assert sum(x.size for x in jax.tree.leaves(params)) == config["n_params"]
    same_bytes(vq_model.state_of(params, sizes), state)


@pytest.fixture
def published(tmp_path):
    """A synthetic folder in the published layout: the transformer's weights in two files, the tokenizer's in one."""
    source = tmp_path / "published"
    sizes = meissonic.config_of(SETTINGS, (4, 6))
    shapes = jax.eval_shape(Meissonic(sizes).init, jax.random.key(0), *arguments_of(sizes))
    rng = np.random.default_rng(0)
    state = meissonic.state_of(jax.tree.map(lambda x: rng.standard_normal(x.shape, np.float32), shapes), sizes)
    names = sorted(state)
    files = {"1-of-2": names[::2], "2-of-2": names[1::2]}
    files = {f"diffusion_pytorch_model-0000{key[0]}-of-00002.safetensors": part for key, part in files.items()}
    components = {
        "transformer": {"_class_name": "Transformer2DModel", **SETTINGS},
        "vqvae": {"block_out_channels": [4, 8]},
        "text_encoder": {"hidden_size": 5},
    }
    for name, settings in components.items():
        (source / name).mkdir(parents=True)
        (source / name / "config.json").write_text(json.dumps(settings))
    for file, part in files.items():
        save_file({name: state[name] for name in part}, source / "transformer" / file, {"format": "pt"})
    index = {"metadata": {"total_size": 1}, "weight_map": {name: file for file, part in files.items() for name in part}}
    (source / "transformer" / diffusers_folder.INDEX).write_text(json.dumps(index))
    save_file({"x": np.ones(3, np.float16)}, source / "vqvae" / diffusers_folder.WEIGHTS)
    save_file({"y": np.ones(3, np.float32)}, source / "text_encoder" / "model.safetensors")
    for name in ("scheduler/scheduler_config.json", "tokenizer/vocab.json", "model_index.json"):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(json.dumps({"masking_schedule": "cosine", "mask_token_id": 8}))
    return source, state


def test_a_folder_is_read(published):
    source, state = published
    config, params = meissonic.read_transformer(source, (4, 6), remat=True)
    assert (config.grid, config.depth, config.single_depth, config.remat) == ((4, 6), 1, 2, True)
    same_bytes(meissonic.state_of(params, config), state)
    assert meissonic.read_sampler(source, num_steps=4).schedule == "float32-cosine"


def test_a_tuned_folder_has_every_tensor_where_the_published_one_has_it(published, tmp_path):
    source, state = published
    config, params = meissonic.read_transformer(source, (4, 6))
    tuned = jax.tree.map(lambda x: x + 1, params)
    meissonic.write(source, tmp_path / "tuned", tuned)
    files = lambda root: {str(path.relative_to(root)) for path in root.rglob("*")}  # noqa: E731
    assert files(source) == files(tmp_path / "tuned")
    for path in source.rglob("*.*"):
        after = tmp_path / "tuned" / path.relative_to(source)
        if path.suffix != ".safetensors" or path.parent.name != "transformer":
            assert after.read_bytes() == path.read_bytes()
        else:
            before, found = load_file(path), load_file(after)
            same_bytes(found, {name: x + 1 for name, x in before.items()})
            assert safe_open(after, "numpy").metadata() == {"format": "pt"}
    jax.tree.map(np.testing.assert_array_equal, meissonic.read_transformer(tmp_path / "tuned", (4, 6))[1], tuned)


def test_an_untouched_model_is_written_as_it_was(published, tmp_path):
    source, state = published
    meissonic.write(source, tmp_path / "same", meissonic.read_transformer(source)[1])
    same_bytes(diffusers_folder.read_state(tmp_path / "same" / "transformer"), state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": None}, "^the transformer's settings lack vocab_size$"),
        ({"guidance_embeds": True}, "^guidance_embeds is not supported"),
        ({"upsample": False}, "^downsample and upsample must be both true or both false$"),
        ({"pooled_projection_dim": 17}, "^pooled_projection_dim 17 is not the width 16$"),
    ],
)
def test_settings_of_another_model_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        meissonic.config_of({name: x for name, x in (SETTINGS | change).items() if x is not None})
