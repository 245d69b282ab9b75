"""Settings of published tokenizers and their optional parts; test_meissonic.py has the round trip of the weights."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from maskrl_jax.convert import diffusers_folder, vq_model
from maskrl_jax.models.vq_model import VQModel, VQModelConfig

PUBLISHED = {
    "_class_name": "VQModel",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 256, 512, 768],
    "down_block_types": ["DownEncoderBlock2D"] * 5,
    "up_block_types": ["UpDecoderBlock2D"] * 5,
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 64,
    "layers_per_block": 2,
    "lookup_from_codebook": True,
    "mid_block_add_attention": False,
    "norm_num_groups": 32,
    "norm_type": "group",
    "num_vq_embeddings": 8192,
    "vq_embed_dim": None,
}
SMALL = PUBLISHED | {"block_out_channels": [4, 8], "latent_channels": 3, "num_vq_embeddings": 5, "norm_num_groups": 2}


def test_settings_of_the_published_tokenizer():
    assert vq_model.config_of(PUBLISHED) == VQModelConfig()


def halves(config):
    """Variables of the model, all 0.5."""
    shapes = jax.eval_shape(VQModel(config).init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
    return jax.tree.map(lambda x: np.full(x.shape, 0.5, np.float32), shapes)


def test_an_attention_in_the_middle_has_its_places():
    config = vq_model.config_of(SMALL | {"mid_block_add_attention": True, "vq_embed_dim": 2})
    state = vq_model.state_of(halves(config), config)
    name = "encoder.mid_block.attentions.0.to_q.weight"
    state[name] = np.arange(64, dtype=np.float32).reshape(8, 8)
    params = vq_model.params_of(state, config)
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, halves(config))
    query = params["params"]["encoder"]["middle"]["attention"]["query"]["kernel"]
    np.testing.assert_array_equal(query[0, 0], state[name].T)  # a convolution of one cell here


def test_a_folder_is_read(tmp_path):
    config = vq_model.config_of(SMALL)
    (tmp_path / "vqvae").mkdir()
    (tmp_path / "vqvae" / "config.json").write_text(json.dumps(SMALL))
    save_file(vq_model.state_of(halves(config), config), tmp_path / "vqvae" / diffusers_folder.WEIGHTS)
    found, read = vq_model.read(tmp_path)
    assert found == config
    jax.tree.map(np.testing.assert_array_equal, read, halves(config))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latent_channels": None}, "^the tokenizer's settings lack latent_channels$"),
        ({"norm_type": "spatial"}, "^norm_type 'spatial' is not supported, only 'group'$"),
        ({"up_block_types": ["AttnUpDecoderBlock2D"]}, "^up_block_types holds AttnUpDecoderBlock2D"),
        ({"block_out_channels": [128, 192]}, r"^block_out_channels \[128, 192\] are not multiples of the first$"),
    ],
)
def test_settings_of_another_model_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        vq_model.config_of(
            {name: x for name, x in (PUBLISHED | change).items() if x is not None or name == "vq_embed_dim"}
        )
