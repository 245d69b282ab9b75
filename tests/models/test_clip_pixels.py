"""Pictures are prepared as the references do it, pixel for pixel, and let gradients through."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from references import reference

from maskrl_jax.models.clip_pixels import MEAN, STD, Pixels, bicubic_weights, prepare, resized_sides, square

SIDES = [(8, 8), (24, 24), (5, 17), (31, 24), (40, 61), (64, 64), (23, 90)]


def noise(height, width):
    return np.random.RandomState(height * width).randint(0, 256, (height, width, 3)).astype(np.uint8)


@functools.partial(jax.jit, static_argnums=1)
def squared(images, pixels):
    return square(images, pixels)


def ours(picture, pixels):
    return np.asarray(squared(picture[None] / np.float32(255), pixels))[0]


@pytest.mark.parametrize(("height", "width"), SIDES)
def test_resized_and_cropped_as_pillow_does_it(height, width):
    picture, pixels = noise(height, width), Pixels(24)
    rows, columns = resized_sides(height, width, pixels)
    assert min(rows, columns) == 24
    resized = np.asarray(Image.fromarray(picture).resize((columns, rows), Image.Resampling.BICUBIC))
    top, left = (rows - 24) // 2, (columns - 24) // 2
    wrong = np.abs(255 * ours(picture, pixels) - resized[top : top + 24, left : left + 24])
    # Pillow's weights are of 22 bits: that moves a sum on a tie by a byte.
    assert wrong.max() < 1.01 and (wrong > 0.01).mean() < 1e-2


@pytest.mark.parity
@pytest.mark.parametrize(("height", "width"), [(256, 256), (224, 224), (100, 333), (511, 300)])
def test_agrees_with_hugging_face_s_processor(height, width):
    transformers = reference("transformers")
    processor = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
    picture = noise(height, width)
    theirs = processor()(images=Image.fromarray(picture), return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    found = jax.jit(lambda x: prepare(x, Pixels()))(picture[None] / np.float32(255))[0]
    assert (np.abs(np.asarray(found) - theirs) * STD).max() < 1.01 / 255


@pytest.mark.parity
@pytest.mark.parametrize(("height", "width"), [(40, 61), (23, 90), (61, 40), (24, 24)])
@pytest.mark.parametrize("fit", ["crop_even", "pad"])
def test_agrees_with_torchvision(height, width, fit):
    torch, transforms = reference("torch"), reference("torchvision.transforms.v2.functional")
    picture = noise(height, width)
    if fit == "crop_even":
        resized = transforms.resize(Image.fromarray(picture), [24], transforms.InterpolationMode.BICUBIC)
        theirs = np.asarray(transforms.center_crop(resized, [24])) / 255
    else:  # a float tensor, as HPSv2
        pixels = torch.from_numpy(np.float32(picture).transpose(2, 0, 1) / 255)
        sides = list(resized_sides(height, width, Pixels(24, fit)))
        resized = transforms.resize(pixels, sides, transforms.InterpolationMode.BICUBIC, antialias=True)
        rows, columns = 24 - sides[0], 24 - sides[1]
        around = [columns // 2, rows // 2, columns - columns // 2, rows - rows // 2]
        theirs = transforms.pad(resized, around, fill=0).numpy().transpose(1, 2, 0)
    wrong = np.abs(ours(picture, Pixels(24, fit, as_bytes=fit != "pad")) - theirs)
    assert wrong.max() < (1.01 / 255 if fit == "crop_even" else 1e-5)


def test_an_odd_pixel_is_cut_where_each_reference_cuts_it():
    picture = np.zeros((4, 7, 3), np.uint8)
    picture[:, 1] = 255  # kept by a cut of one pixel in front, lost by one of two
    assert ours(picture, Pixels(4, "crop"))[0, :, 0].tolist() == [1, 0, 0, 0]
    assert ours(picture, Pixels(4, "crop_even"))[0, :, 0].tolist() == [0, 0, 0, 0]


def test_padding_is_black_around_the_middle():
    picture = np.full((3, 8, 3), 255, np.uint8)
    found = ours(picture, Pixels(8, "pad", as_bytes=False))[..., 0]
    np.testing.assert_allclose(found.mean(axis=1), [0, 0, 1, 1, 1, 0, 0, 0])


def test_weights_by_hand():
    np.testing.assert_allclose(bicubic_weights(3, 3), np.eye(3))
    # A quarter of a pixel behind the third: Keys' cubic with a = -1/2 at distances 5/4, 1/4, 3/4 and 7/4.
    wide = bicubic_weights(6, 12)
    np.testing.assert_allclose(wide[5, :6], [0, -0.0703125, 0.8671875, 0.2265625, -0.0234375, 0], atol=1e-7)
    for inputs, outputs in ((7, 3), (3, 7), (1, 5), (50, 1)):
        np.testing.assert_allclose(bicubic_weights(inputs, outputs).sum(1), 1, rtol=1e-6)


def test_normalised_by_the_published_moments():
    grey = jax.jit(lambda x: prepare(x, Pixels(4)))(jnp.full((1, 4, 4, 3), 51 / 255))
    np.testing.assert_allclose(grey[0, 0, 0], (0.2 - np.array(MEAN)) / STD, rtol=1e-5)


@pytest.mark.parametrize("pixels", [Pixels(4), Pixels(4, "pad", as_bytes=False)])
def test_rounding_and_clipping_let_the_gradient_through(pixels):
    """Every pixel moves the mean as much as resizing without rounding would have it, saturated ones too."""
    image = jnp.concatenate([jnp.full((1, 4, 8, 3), 1.2), jnp.full((1, 4, 8, 3), 0.3)], axis=1)
    slope = jax.jit(jax.grad(lambda x: square(x, pixels).mean()))(image)
    weights = bicubic_weights(8, 4)
    np.testing.assert_allclose(slope[0, ..., 0], np.outer(weights.sum(0), weights.sum(0)) / 48, atol=1e-6)
    assert np.abs(slope).min() > 0


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("pixels", [Pixels(4), Pixels(4, as_bytes=False)])
def test_what_is_not_finite_stays_so(value, pixels):
    images = np.full((2, 8, 8, 3), 0.5, np.float32)
    images[0, 3, 3] = value
    found = squared(images, pixels)
    assert np.isnan(found[0]).any() and np.isfinite(found[1]).all()


@pytest.mark.parametrize(("change", "named"), [({"size": 0}, "size 0"), ({"fit": "squash"}, "fit 'squash'")])
def test_bad_settings_are_refused(change, named):
    with pytest.raises(ValueError, match=named):
        Pixels(**change)
