"""The mappings from google-research/maskgit's trees are strict and take them nested or flat; see tests/models too."""

import fixtures
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict

from maskrl_jax.convert import google_maskgit, google_vqgan
from maskrl_jax.models.google_maskgit import GoogleMaskGIT, GoogleMaskGITConfig
from maskrl_jax.models.google_vqgan import GoogleVQGAN, GoogleVQGANConfig

TOKENIZER = GoogleVQGANConfig(32, (1, 2, 1), 2, True, codebook_size=6, code_width=3)
SIZES = GoogleMaskGITConfig(num_tokens=4, codebook_size=5, num_classes=2, width=6, depth=2, heads=2, mlp_width=7)
IDS = jnp.zeros((1, 4), jnp.int32), jnp.zeros(1, jnp.int32)
FAMILIES = {
    "tokenizer": (google_vqgan, TOKENIZER, GoogleVQGAN(TOKENIZER), (jnp.zeros((1, 8, 8, 3)),)),
    "transformer": (google_maskgit, SIZES, GoogleMaskGIT(SIZES), IDS),
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    """(converter, sizes, parameters, the original's flat tree)."""
    convert, sizes, model, arguments = FAMILIES[request.param]
    params = fixtures.random_params(model, *arguments)
    return convert, sizes, params, convert.state_of(params, sizes)


def test_parameters_go_there_and_back_nested_or_flat(family):
    convert, sizes, params, tree = family
    for given in (tree, unflatten_dict(tree, sep="/")):
        jax.tree.map(np.testing.assert_array_equal, convert.params_of(given, sizes), params)


def test_every_missing_key_is_named_and_so_is_one_too_many(family):
    convert, sizes, _, tree = family
    for name in tree:
        with pytest.raises(ValueError, match=f"^the state lacks {name}$"):
            convert.params_of({key: x for key, x in tree.items() if key != name}, sizes)
    with pytest.raises(ValueError, match="^the state holds params/more without a place$"):
        convert.params_of(tree | {"params/more": np.zeros(1)}, sizes)


def test_every_wrong_shape_is_named(family):
    convert, sizes, _, tree = family
    for name, array in tree.items():
        with pytest.raises(ValueError, match=f"^{name} has shape "):
            convert.params_of(tree | {name: array[None]}, sizes)


def test_queries_keys_and_values_lie_side_by_side():
    rng = np.random.default_rng(0)
    tree = FAMILIES["transformer"][0].state_of(fixtures.random_params(GoogleMaskGIT(SIZES), *IDS), SIZES)
    stem = "params/TransformerLayer_1/Attention_0/self_attention"
    parts = {part: np.float32(rng.normal(size=(6, 2, 3))) for part in ("query", "key", "value")}
    tree |= {f"{stem}/{part}/kernel": kernel for part, kernel in parts.items()}
    kernel = google_maskgit.params_of(tree, SIZES)["params"]["blocks"]["attention"]["qkv"]["kernel"][1]
    np.testing.assert_array_equal(kernel.reshape(6, 3, 2, 3), np.stack(list(parts.values()), axis=1))


def test_layers_are_numbered_in_the_order_of_their_calls():
    """Levels of 32, 64 and 32 channels, two blocks each, two more at the coarsest grid: where the channels change."""
    tree = google_vqgan.state_of(fixtures.random_params(GoogleVQGAN(TOKENIZER), jnp.zeros((1, 8, 8, 3))), TOKENIZER)
    for part, blocks in {"encoder": {"ResBlock_2", "ResBlock_4"}, "decoder": {"ResBlock_4", "ResBlock_6"}}.items():
        changing = {name.split("/")[2] for name in tree if f"/{part}/ResBlock" in name and "Conv_2" in name}
        assert changing == blocks
    assert tree["params/encoder/Conv_2/kernel"].shape == (4, 4, 64, 64)
    assert tree["params/encoder/Conv_3/kernel"].shape == (1, 1, 32, 3)
    assert tree["params/decoder/Conv_3/kernel"].shape == (3, 3, 32, 3)
