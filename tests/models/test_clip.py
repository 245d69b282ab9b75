"""Both towers: published sizes, numbers of the reference implementations, and what their contracts promise."""

import dataclasses
import functools

import clip_weights
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from references import reference

from maskrl_jax.convert import clip as convert
from maskrl_jax.models.clip import LAION_H14, OPENAI_B32, OPENAI_L14, AestheticHead, Clip, PictureTower, TextTower

CONFIGS = {"quick_gelu": clip_weights.SMALL, "gelu": clip_weights.GELU}
# Of Hugging Face's CLIPModel in float64 on the weights, texts and pictures of tests/clip_weights.py.
GOLDEN_TEXT = [
    [1.670599, 0.378713, -1.530894, 0.034325, -0.008816, -0.963189],
    [-0.108185, -0.610348, 0.194961, 0.163861, 1.614490, -0.245695],
    [2.177229, 1.568158, -0.680687, 0.616462, 1.497911, -1.429327],
]
GOLDEN_PICTURE = [
    [-0.064322, -2.308861, 1.227058, 2.377410, 0.571648, 1.103042],
    [-0.217849, -1.808683, 1.916449, 1.971995, 0.508311, 1.123973],
    [-0.489009, -1.544516, 0.342286, 1.086515, 0.241220, 0.685423],
]
# The first six numbers of the second token.
GOLDEN_STATE = [
    [0.620335, 0.681903, 0.864884, -0.117338, -2.529116, -2.283168],
    [1.185850, -1.292375, 1.163648, -0.545154, -1.199630, -2.433925],
    [0.980933, -0.525725, 2.551670, -0.722263, -1.593418, -2.484673],
]


@functools.cache
def small(name="quick_gelu"):
    config = CONFIGS[name]
    return Clip(config), convert.params_of(clip_weights.state(config), config)


@functools.partial(jax.jit, static_argnums=0)
def features(model, params, images, ids):
    with jax.default_matmul_precision("highest"):
        pictures = model.apply(params, images, method="picture_features")
        text = TextTower(model.config.text).apply({"params": params["params"]["text"]}, ids)
    return pictures, text


def found(name="quick_gelu", **change):
    model, params = small(name)
    config = model.config
    towers = (dataclasses.replace(tower, **change) for tower in (config.text, config.picture))
    model = Clip(dataclasses.replace(config, **dict(zip(("text", "picture"), towers, strict=True))))
    return features(model, params, clip_weights.pictures(config), clip_weights.texts(config))


def close(ours, theirs, tolerance=1e-4):
    theirs = np.asarray(theirs, np.float64)
    assert ours.dtype == np.float32
    assert np.abs(ours - theirs).max() <= tolerance * np.abs(theirs).max()


@pytest.mark.parametrize(
    ("config", "whole", "text"),
    [
        (OPENAI_B32, 151_277_313, 63_428_096),
        (OPENAI_L14, 427_616_513, 123_650_304),
        (LAION_H14, 986_109_441, 354_032_640),
    ],
)
def test_published_sizes(config, whole, text):
    inputs = jnp.zeros((1, 224, 224, 3)), jnp.zeros((1, 77), jnp.int32)
    shapes = jax.eval_shape(Clip(config).init, jax.random.key(0), *inputs)["params"]
    assert [sum(x.size for x in jax.tree.leaves(tree)) for tree in (shapes, shapes["text"])] == [whole, text]


def test_golden_numbers():
    pictures, text = found()
    close(pictures, GOLDEN_PICTURE)
    close(text.pooled, GOLDEN_TEXT)
    close(text.penultimate[:, 1, :6], GOLDEN_STATE)


@pytest.mark.parity
@pytest.mark.parametrize("name", CONFIGS)
def test_agrees_with_hugging_face(name):
    torch, transformers = reference("torch"), reference("transformers")
    model, _ = small(name)
    sizes = clip_weights.hugging_face(model.config)
    theirs = transformers.CLIPModel(transformers.CLIPConfig(**sizes)).eval()
    state = {key: torch.from_numpy(value) for key, value in clip_weights.state(model.config).items()}
    theirs.load_state_dict(state, strict=True)
    images = torch.from_numpy(clip_weights.pictures(model.config).transpose(0, 3, 1, 2))
    ids = torch.from_numpy(clip_weights.texts(model.config).astype(np.int64))
    pictures, text = found(name)
    with torch.no_grad():
        out = theirs(input_ids=ids, pixel_values=images)
        states = theirs.text_model(input_ids=ids, output_hidden_states=True)
        pooled = theirs.text_projection(states.pooler_output)
        seen = theirs.visual_projection(theirs.vision_model(pixel_values=images).pooler_output)
    close(pictures, seen)
    close(text.pooled, pooled)
    close(text.penultimate, states.hidden_states[-2])
    logits = jax.jit(model.apply)(small(name)[1], clip_weights.pictures(model.config), clip_weights.texts(model.config))
    close(logits, out.logits_per_image)


@pytest.mark.parity
@pytest.mark.parametrize("name", CONFIGS)
def test_agrees_with_open_clip(name):
    torch, open_clip = reference("torch"), reference("open_clip")
    config = CONFIGS[name]
    text, picture = config.text, config.picture
    theirs = open_clip.model.CLIP(
        text.projection,
        {
            "image_size": picture.image_size,
            "patch_size": picture.patch,
            "layers": picture.depth,
            "width": picture.width,
            "head_width": picture.width // picture.heads,
            "mlp_ratio": picture.mlp_width / picture.width,
        },
        {
            "context_length": text.length,
            "vocab_size": text.vocabulary,
            "width": text.width,
            "heads": text.heads,
            "layers": text.depth,
            "mlp_ratio": text.mlp_width / text.width,
        },
        quick_gelu=name == "quick_gelu",
    ).eval()
    draw = np.random.RandomState(3)
    state = {key: np.asarray(0.3 * draw.standard_normal(x.shape), np.float32) for key, x in theirs.state_dict().items()}
    theirs.load_state_dict({key: torch.from_numpy(x) for key, x in state.items()}, strict=True)
    images, ids = clip_weights.pictures(config), clip_weights.texts(config)
    pictures, texts = features(Clip(config), convert.params_of(state, config), images, ids)
    with torch.no_grad():
        close(pictures, theirs.encode_image(torch.from_numpy(images.transpose(0, 3, 1, 2))))
        close(texts.pooled, theirs.encode_text(torch.from_numpy(ids.astype(np.int64))))


def test_what_follows_the_first_end_token_is_not_pooled():
    model, params = small()
    ids = clip_weights.texts(model.config)
    other = ids.copy()
    other[1, 5:] = 7  # behind the end token at place 4
    one, two = (features(model, params, clip_weights.pictures(model.config), x)[1] for x in (ids, other))
    np.testing.assert_array_equal(one.pooled, two.pooled)
    np.testing.assert_array_equal(one.penultimate[1, :5], two.penultimate[1, :5])
    assert np.abs(one.penultimate[1, 5:] - two.penultimate[1, 5:]).min(axis=-1).max() > 1e-3


def test_ids_that_there_are_not_and_a_text_without_end_are_nan():
    model, params = small()
    ids = clip_weights.texts(model.config)
    ids[0, 2], ids[1, 2] = -1, model.config.text.vocabulary
    ids[2] = 5
    text = features(model, params, clip_weights.pictures(model.config), ids)[1]
    assert np.isnan(text.pooled).all()
    assert np.isnan(text.penultimate[:2]).all() and np.isfinite(text.penultimate[2]).all()


def test_half_precision_gives_float32_near_the_same():
    for ours, exact in zip(*map(jax.tree.leaves, (found(dtype="bfloat16"), found())), strict=True):
        close(ours, exact, 0.1)


def test_remat_changes_nothing():
    """And the gradient reaches the pixels."""
    config = clip_weights.SMALL.picture
    params = {"params": small()[1]["params"]["picture"]}

    def gradient(remat):
        tower = PictureTower(dataclasses.replace(config, remat=remat))
        return jax.jit(jax.grad(lambda x: tower.apply(params, x).sum()))(clip_weights.pictures(clip_weights.SMALL))

    one, two = gradient(False), gradient(True)
    np.testing.assert_allclose(one, two, atol=1e-4 * np.abs(one).max())
    assert (np.abs(one).max(axis=-1) > 0).all()


def test_the_aesthetic_head_is_linear():
    shapes, draw = jax.eval_shape(AestheticHead().init, jax.random.key(0), jnp.zeros((1, 6))), np.random.RandomState(0)
    params = jax.tree.map(lambda x: np.float32(0.1 * draw.standard_normal(x.shape)), shapes)
    a, b = np.float32(draw.standard_normal((2, 4, 6)))
    score = jax.jit(AestheticHead().apply)
    np.testing.assert_allclose(score(params, (a + b) / 2), (score(params, a) + score(params, b)) / 2, atol=1e-4)
    assert score(params, a).shape == (4,)


@pytest.mark.parametrize(
    ("tower", "change", "named"),
    [
        ("text", {"heads": 5}, "heads 5"),
        ("text", {"end": 600}, "end 600"),
        ("text", {"activation": "relu"}, "activation 'relu'"),
        ("text", {"projection": 5}, "projections 5 and 6"),
        ("picture", {"patch": 5}, "patch 5"),
        ("picture", {"depth": 0}, "depth 0"),
    ],
)
def test_bad_sizes_are_refused(tower, change, named):
    with pytest.raises(ValueError, match=named):
        changed = dataclasses.replace(getattr(clip_weights.SMALL, tower), **change)
        dataclasses.replace(clip_weights.SMALL, **{tower: changed})


def test_wrong_inputs_are_refused():
    model, params = small()
    with pytest.raises(ValueError, match="10 tokens exceed the 9 places"):
        model.apply(params, jnp.zeros((1, 10), jnp.int32), method="text_features")
    with pytest.raises(ValueError, match="prepare them"):
        model.apply(params, jnp.zeros((1, 8, 8, 3)), method="picture_features")
