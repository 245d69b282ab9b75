import numpy as np
import pytest
from scipy import ndimage

from maskrl_jax.data import captions, scenes, shapes, verifier
from maskrl_jax.data.scenes import Scene
from maskrl_jax.errors import UserError

PAIR = "a red circle left of a blue square"


def picture(text, centres, tone=0):
    """A clean picture; the text may hold things that a caption would not (equal ones, any order)."""
    return scenes.render(Scene(captions.parse(text), centres, tone)).astype(np.float32) / 255


def score(image, prompt):
    return {name: float(values[0]) for name, values in verifier.verify(image[None], [prompt]).items()}


def five(scores):
    return [scores[name] for name in verifier.SCORES]


@pytest.fixture(scope="module")
def real():
    drawn = [shapes.scene_at("validation", i) for i in range(2048)]
    images = np.stack([scenes.render(scene) for scene in drawn]).astype(np.float32) / 255
    return images, [str(scene.caption) for scene in drawn]


def test_every_real_picture_is_right(real):
    scores = verifier.verify(*real)
    for name in (*verifier.SCORES, "graded", "strict", "coherence"):
        assert scores[name].dtype == np.float32 and scores[name].shape == (2048,)
        assert (scores[name] == 1).all(), name


def test_foreign_captions_are_wrong(real):
    images, prompts = real
    scores = verifier.verify(images, prompts[1:] + prompts[:1])
    assert scores["strict"].mean() < 0.01
    assert scores["graded"].mean() < 0.4


@pytest.mark.parametrize("noise, blur", [(0.03, 0), (0, 0.7), (0.03, 0.7), (0.06, 0)])
def test_noise_and_blur_do_little(real, noise, blur):
    images, prompts = real[0][:512], real[1][:512]
    damaged = ndimage.gaussian_filter(images, (0, blur, blur, 0))
    damaged = damaged + np.random.default_rng(0).normal(0, noise, images.shape)
    assert verifier.verify(damaged, prompts)["strict"].mean() >= 0.97


def test_wrong_colour_and_wrong_shape_and_swapped_colours():
    image = picture("a red circle left of a green square", ((2, 1), (3, 6)))
    assert five(score(image, PAIR)) == [1, 1, 0.5, 0.5, 0]
    image = picture("a red circle left of a blue cross", ((2, 1), (3, 6)))
    assert five(score(image, PAIR)) == [1, 0.5, 1, 0.5, 0]
    image = picture("a blue circle left of a red square", ((2, 1), (3, 6)))
    assert five(score(image, PAIR)) == [1, 1, 1, 0, 0]


def test_the_relation_must_hold_along_its_axis():
    assert five(score(picture(PAIR, ((2, 6), (3, 1))), PAIR)) == [1, 1, 1, 1, 0]
    assert five(score(picture(PAIR, ((1, 1), (6, 3))), PAIR)) == [1, 1, 1, 1, 0]
    assert score(picture(PAIR, ((2, 1), (3, 6))), PAIR)["strict"] == 1


def test_a_missing_object():
    scores = score(picture("a red circle", ((2, 1),)), PAIR)
    assert five(scores) == [0.5, 0.5, 0.5, 0.5, 0]
    assert scores["graded"] == pytest.approx(0.4) and scores["strict"] == 0 and scores["count"] == 1


def test_a_duplicate_is_never_strict():
    image = picture("a red circle left of a red circle", ((2, 1), (3, 6)))
    scores = score(image, "a red circle")
    assert five(scores) == [0, 1, 1, 1, 1] and scores["strict"] == 0 and scores["count"] == 2


@pytest.mark.parametrize("name", captions.SHAPES)
def test_an_object_with_a_third_missing_is_not_right(name):
    image = picture(f"a red {name}", ((3, 3),))
    for top in (8, 12, 16):
        broken = image.copy()
        broken[top : top + 4, 8:20] = scenes.TONE_RGB[0] / 255
        assert score(broken, f"a red {name}")["strict"] == 0
        assert score(broken, f"a red {name}")["binding"] == 0


@pytest.mark.parametrize("name", captions.SHAPES)
def test_a_cell_of_another_colour_spoils_the_object(name):
    image = picture(f"a red {name}", ((3, 3),))
    image[12:16, 12:16] = scenes.COLOUR_RGB[1] / 255
    scores = score(image, f"a red {name}")
    assert scores["strict"] == 0 and scores["count"] >= 2


def test_two_halves_are_not_one_object():
    image = picture("a red square", ((3, 3),))
    halves = np.full_like(image, image[0, 0, 0])
    halves[8:20, 2:8], halves[8:20, 22:28] = image[8:20, 8:14], image[8:20, 14:20]
    scores = score(halves, "a red square")
    assert five(scores) == [0, 0, 1, 0, 0] and scores["count"] == 2


def test_a_foreign_blob_counts_as_an_object():
    image = picture("a red square", ((2, 2),))
    image[24:28, 24:28] = 0
    assert score(image, "a red square")["count"] == 2


def test_empty_and_broken_pictures_score_nothing():
    assert score(np.full((32, 32, 3), 0.58, np.float32), "a red square")["graded"] == 0
    assert score(np.full((32, 32, 3), np.nan, np.float32), PAIR)["strict"] == 0


def test_one_cell_of_the_other_tone_breaks_coherence_and_nothing_else():
    image = picture("a red square", ((2, 2),))
    image[24:28, 24:28] = scenes.TONE_RGB[1] / 255
    scores = score(image, "a red square")
    assert scores["coherence"] == 0 and scores["strict"] == 1


def test_bad_arguments():
    image = picture("a red square", ((2, 2),))[None]
    with pytest.raises(UserError, match="cannot verify"):
        verifier.verify(image, ["red"])
    with pytest.raises(ValueError, match="1 images but 2 prompts"):
        verifier.verify(image, ["a red square"] * 2)
