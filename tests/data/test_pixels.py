import numpy as np
import pytest
from PIL import Image

from maskrl_jax.data.pixels import rgb


def test_bytes_stay_as_they_are():
    pixels = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    np.testing.assert_array_equal(rgb(Image.fromarray(pixels)), pixels)
    grey = pixels[..., 0]
    np.testing.assert_array_equal(rgb(Image.fromarray(grey)), np.repeat(grey[..., None], 3, axis=2))


@pytest.mark.parametrize("kind", [np.uint16, np.int32, np.float32])
def test_deeper_channels_are_refused(kind):
    with pytest.raises(ValueError, match="more than 8 bits"):
        rgb(Image.fromarray(np.full((2, 2), 16_384, kind)))
