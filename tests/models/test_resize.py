"""Each resize against an implementation of its own: loops for TensorFlow 1, Pillow itself for the other."""

import math

import numpy as np
import pytest
from hashed import hashed, images
from PIL import Image

from maskrl_jax.models.resize import bicubic_pil, bilinear_tf1, resize


def looped_tf1(image, size):
    """Return an image [H,W,C] resized as TensorFlow 1.x does it, a pixel at a time."""
    height, width, channels = image.shape
    out = np.zeros((size, size, channels))
    for y in range(size):
        for x in range(size):
            at_y, at_x = y * (height / size), x * (width / size)
            top, left = math.floor(at_y), math.floor(at_x)
            bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
            upper = image[top, left] * (1 - (at_x - left)) + image[top, right] * (at_x - left)
            lower = image[bottom, left] * (1 - (at_x - left)) + image[bottom, right] * (at_x - left)
            out[y, x] = upper * (1 - (at_y - top)) + lower * (at_y - top)
    return out


@pytest.mark.parametrize(("height", "width"), [(32, 32), (20, 45), (100, 64)])
def test_bilinear_is_that_of_tensorflow_1(height, width):
    image = images(1, height, width)
    found = resize(image, "bilinear_tf1", 49)[0]
    np.testing.assert_allclose(found, looped_tf1(image[0].astype(float), 49), atol=2e-3)  # of 255


def test_bilinear_repeats_the_last_pixel_and_starts_at_the_first():
    # Without half-pixel centres 2 pixels become 4 at 0, 1/2, 1 and 3/2, and nothing lies beyond the second.
    np.testing.assert_array_equal(bilinear_tf1(2, 4) @ np.array([0.0, 10.0]), [0, 5, 10, 10])


def test_bilinear_does_not_smooth_where_it_shrinks():
    np.testing.assert_array_equal(bilinear_tf1(6, 2) @ np.arange(6.0), [0, 3])


@pytest.mark.parametrize(("height", "width"), [(64, 64), (37, 500), (299, 120), (640, 300)])
def test_bicubic_is_pillow_s_of_float_images_cut_to_bytes(height, width):
    image = images(1, height, width)[0]
    channels = [Image.fromarray(image[..., c].astype(np.float32)) for c in range(3)]
    expected = np.stack([np.asarray(c.resize((299, 299), Image.Resampling.BICUBIC)) for c in channels], axis=-1)
    found = np.asarray(resize(image[None], "bicubic_pil", 299)[0])
    np.testing.assert_allclose(found, expected.clip(0, 255), atol=2e-3)
    assert expected.max() > 255


@pytest.mark.parametrize("weights", [bilinear_tf1, bicubic_pil])
def test_weights_sum_to_one_and_equal_sizes_change_nothing(weights):
    for length in (1, 7, 299, 1024):
        np.testing.assert_allclose(weights(length, 299).sum(axis=1), 1, atol=1e-6)
    np.testing.assert_array_equal(weights(299, 299), np.eye(299))


@pytest.mark.parity
def test_resizes_are_those_of_the_published_programs():
    torch = pytest.importorskip("torch", reason="no torch (extra parity)")
    fidelity = pytest.importorskip("torch_fidelity", reason="no torch-fidelity (extra parity)")
    clean = pytest.importorskip("cleanfid.resize", reason="no clean-fid (extra parity)")
    batch = images(2, 60, 411, seed=3)
    tf1 = fidelity.interpolate_compat_tensorflow.interpolate_bilinear_2d_like_tensorflow1x(
        torch.tensor(batch).permute(0, 3, 1, 2).float(), size=(299, 299), align_corners=False
    )
    found = np.asarray(resize(batch, "bilinear_tf1", 299))
    np.testing.assert_allclose(found, tf1.permute(0, 2, 3, 1).numpy(), atol=1e-4 * 255)
    found = np.asarray(resize(batch, "bicubic_pil", 299))
    np.testing.assert_allclose(found[1], clean.build_resizer("clean")(batch[1]), atol=1e-4 * 255)


def test_floats_and_bytes_are_resized_alike():
    image = (hashed((1, 9, 9, 3), 1) * 100).round() + 100
    for kind in ("bilinear_tf1", "bicubic_pil"):
        np.testing.assert_array_equal(resize(image.astype(np.uint8), kind, 20), resize(image, kind, 20))
