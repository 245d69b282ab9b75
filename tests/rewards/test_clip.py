"""Rewards from local weights: their formulas recomputed from features, their references, and missing files."""

import functools
import json

import clip_weights
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from references import reference
from safetensors.numpy import save_file

from maskrl_jax.convert import clip as convert
from maskrl_jax.errors import UserError
from maskrl_jax.models.clip import Clip
from maskrl_jax.models.clip_pixels import Pixels, prepare
from maskrl_jax.rewards import clip

pytest.importorskip("tokenizers", reason="needs the package tokenizers")
PROMPTS = ("a cat", "red dog", "a cat", "cat cat")
FIT = {"clip_score": "crop", "pick_score": "crop", "hps": "pad", "aesthetic": "crop_even"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("weights")
    clip_weights.write_tokenizer(place)
    save_file(clip_weights.state(clip_weights.SMALL), place / clip.WEIGHTS)
    save_file(clip_weights.head(), place / clip.HEAD)
    (place / clip.SIZES).write_text(json.dumps(clip_weights.hugging_face(clip_weights.SMALL)))
    return str(place)


@functools.cache
def opened(kind, folder):
    return clip.open_reward(kind, folder)


def images():
    return np.random.RandomState(5).uniform(0, 1, (4, 15, 20, 3)).astype(np.float32)


@functools.cache
def features(fit, ids):
    """Unit features of pictures and texts, step by step."""
    model, params = (
        Clip(clip_weights.SMALL),
        convert.params_of(clip_weights.state(clip_weights.SMALL), clip_weights.SMALL),
    )
    pixels = Pixels(12, fit, as_bytes=fit != "pad")

    @jax.jit
    def both(x, ids):
        pictures = model.apply(params, prepare(x, pixels), method="picture_features")
        return pictures, model.apply(params, ids, method="text_features")

    return [x / np.linalg.norm(x, axis=1, keepdims=True) for x in map(np.float64, both(images(), np.int32(ids)))]


@pytest.mark.parametrize("kind", clip.KINDS)
def test_formulas(kind, folder):
    reward = opened(kind, folder)
    ids = reward._tokens.encode(PROMPTS) if reward._tokens else np.full((4, 9), 520)
    pictures, texts = features(FIT[kind], tuple(map(tuple, ids.tolist())))
    cosine = (pictures * texts).sum(1)
    scale = np.exp(np.float64(clip_weights.state(clip_weights.SMALL)["logit_scale"]))
    judged, head = pictures, clip_weights.head()
    for layer in convert.HEAD_LAYERS:
        judged = judged @ head[f"layers.{layer}.weight"].T + head[f"layers.{layer}.bias"]
    expected = {
        "clip_score": 100 * np.maximum(cosine, 0),
        "pick_score": scale * cosine,
        "hps": cosine,
        "aesthetic": judged[:, 0],
    }[kind]
    found = reward.score(images(), PROMPTS)
    assert found.shape == (4,) and found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    assert np.std(found) > 1e-3


def test_more_pictures_than_a_batch(folder):
    """Four in batches of three."""
    found = clip.open_reward("hps", folder, batch_size=3).score(images(), PROMPTS)
    np.testing.assert_allclose(found, opened("hps", folder).score(images(), PROMPTS), atol=1e-6)


def test_texts_are_encoded_once(folder):
    reward, seen = clip.open_reward("hps", folder, batch_size=3), []
    encode = reward._tokens.encode
    reward._tokens.encode = lambda prompts: seen.extend(p for p in prompts if p) or encode(prompts)
    reward.text_features(PROMPTS)
    reward.text_features(["red dog", "dog"])
    assert seen == ["a cat", "red dog", "cat cat", "dog"]
    np.testing.assert_array_equal(reward.text_features(PROMPTS)[0], reward.text_features(["a cat"])[0])


def test_as_many_texts_are_kept_as_were_asked_for_last(folder, monkeypatch):
    monkeypatch.setattr(clip, "KEPT", 2)
    reward = clip.open_reward("hps", folder, batch_size=3)
    first = reward.text_features(PROMPTS)  # more at once than are kept
    assert len(first) == 4 and list(reward._known) == ["red dog", "cat cat"]
    reward.text_features(["red dog", "dog"])
    assert list(reward._known) == ["red dog", "dog"]
    reward.text_features(["red dog"])
    reward.text_features(["cat"])
    assert list(reward._known) == ["red dog", "cat"]
    assert all(row.base is None for row in reward._known.values())  # no view that holds a batch
    np.testing.assert_array_equal(reward.text_features(PROMPTS), first)


def test_the_gradient_reaches_every_picture(folder):
    reward = opened("pick_score", folder)
    slope = jax.jit(jax.grad(lambda x: reward.score(x, PROMPTS).sum()))(images())
    assert np.isfinite(slope).all() and (np.abs(slope).max(axis=(1, 2, 3)) > 0).all()


def test_a_picture_that_is_not_finite_is_nan_and_harms_no_other(folder):
    broken = images()
    broken[1, 7, 9], broken[2, 7, 9] = np.nan, np.inf
    for kind in clip.KINDS:
        found = np.asarray(opened(kind, folder).score(broken, PROMPTS))
        assert np.isnan(found).tolist() == [False, True, True, False]
        np.testing.assert_array_equal(found[[0, 3]], np.asarray(opened(kind, folder).score(images(), PROMPTS))[[0, 3]])


def test_wrong_numbers_are_refused(folder):
    with pytest.raises(ValueError, match="and 3 prompts"):
        opened("hps", folder).score(images(), PROMPTS[:3])
    with pytest.raises(ValueError, match="at least 1"):
        clip.open_reward("hps", folder, batch_size=0)


@pytest.mark.parametrize(
    ("kind", "without", "named"),
    [
        ("pick_score", clip.WEIGHTS, "wants .*model.safetensors: those of yuvalkirstain/PickScore_v1"),
        ("hps", clip.WEIGHTS, "the state_dict of HPS_v2.1_compressed.pt"),
        ("aesthetic", clip.HEAD, "wants .*aesthetic.safetensors"),
        ("clip_score", "merges.txt", "no vocab.json with merges.txt"),
        ("hps", clip.SIZES, "does not hold"),  # then the sizes are the published ones
    ],
)
def test_a_missing_file_is_one_line(folder, tmp_path, kind, without, named):
    names = [clip.WEIGHTS, clip.HEAD, clip.SIZES, "vocab.json", "merges.txt"]
    for name in set(names) - {without}:
        (tmp_path / name).symlink_to(f"{folder}/{name}")
    with pytest.raises(UserError, match=named) as found:
        clip.open_reward(kind, str(tmp_path))
    assert "\n" not in str(found.value)


def test_what_is_no_safetensors_file_is_one_line(tmp_path):
    (tmp_path / clip.WEIGHTS).write_bytes(b"\x80\x02pickled")
    with pytest.raises(UserError, match="cannot be read as safetensors"):
        clip.open_reward("hps", str(tmp_path))


def test_an_unknown_reward_names_the_nearest(folder):
    with pytest.raises(UserError, match="did you mean 'pick_score'"):
        clip.open_reward("pickscore", folder)


def test_half_precision_is_near(folder):
    rough = clip.open_reward("hps", folder, dtype="bfloat16").score(images(), PROMPTS)
    assert rough.dtype == np.float32
    np.testing.assert_allclose(rough, opened("hps", folder).score(images(), PROMPTS), atol=0.05)


@pytest.mark.parity
def test_pick_score_as_its_authors_compute_it(folder):
    torch, transformers, image = reference("torch"), reference("transformers"), reference("PIL.Image")
    theirs = transformers.CLIPModel(transformers.CLIPConfig(**clip_weights.hugging_face(clip_weights.SMALL))).eval()
    state = clip_weights.state(clip_weights.SMALL)
    theirs.load_state_dict({key: torch.from_numpy(value) for key, value in state.items()})
    pixels = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
    sides = {"size": {"shortest_edge": 12}, "crop_size": {"height": 12, "width": 12}}
    pictures = [image.fromarray(np.uint8(np.round(255 * x))) for x in images()]
    inputs = pixels(**sides)(images=pictures, return_tensors="pt")["pixel_values"]
    ids = transformers.CLIPTokenizer.from_pretrained(folder)(
        list(PROMPTS), padding=True, truncation=True, max_length=9, return_tensors="pt"
    )
    with torch.no_grad():
        expected = torch.diagonal(theirs(pixel_values=inputs, **ids).logits_per_image).numpy()
    found = opened("pick_score", folder).score(images(), PROMPTS)
    np.testing.assert_allclose(found, expected, atol=1e-3 * np.abs(expected).max())


def test_a_program_may_hold_the_weights_itself(folder):
    reward = opened("hps", folder)
    texts = reward.text_features(PROMPTS)
    program = jax.jit(lambda params, x, texts: reward.values(params, x, texts))
    found = program(reward.params, jnp.asarray(images()), texts)
    np.testing.assert_allclose(found, reward.score(images(), PROMPTS), atol=1e-6)
