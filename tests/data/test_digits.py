import numpy as np

from maskrl_jax.data import digits


def test_the_splits_share_nothing_and_hold_every_class():
    train, names = digits.load("train", 8)
    validation, _ = digits.load("validation", 8)
    assert len(train["label"]) + len(validation["label"]) == 1797
    assert names == list("0123456789")
    assert set(validation["label"].tolist()) == set(range(10))
    seen = {image.tobytes() for image in train["image"]}
    assert not any(image.tobytes() in seen for image in validation["image"])


def test_images_are_grey_and_span_the_range():
    images = digits.load("validation", 32)[0]["image"]
    assert images.dtype == np.uint8 and images.shape == (297, 32, 32, 3)
    np.testing.assert_array_equal(images[..., 0], images[..., 2])
    assert images.min() == 0 and images.max() == 255
