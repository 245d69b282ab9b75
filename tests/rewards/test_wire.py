"""What is asked and answered survives the way, and nothing else is taken for it."""

import base64
import io
import json

import numpy as np
import pytest
from PIL import Image

from maskrl_jax.rewards import wire

BOUNDS = wire.Bounds()
IMAGES = np.random.RandomState(0).randint(0, 256, (2, 4, 6, 3)).astype(np.float32) / 255


def asked(**change):
    return json.dumps(json.loads(wire.request(IMAGES, ["a", "b"])) | change).encode()


def png(side):
    file = io.BytesIO()
    Image.new("RGB", (side, side)).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def test_a_request_survives_the_way():
    images, prompts = wire.read_request(wire.request(IMAGES, ("a", "ä 猫")), BOUNDS)
    np.testing.assert_array_equal(images, IMAGES)
    assert images.dtype == np.float32 and prompts == ["a", "ä 猫"]


def test_scores_survive_the_way_and_what_is_no_number_is_nan():
    found = wire.read_answer(wire.answer(np.array([0.5, np.nan, -np.inf, 0.0])), 4)
    np.testing.assert_array_equal(found, np.float32([0.5, np.nan, np.nan, 0]))
    np.testing.assert_array_equal(wire.read_answer(b'{"scores": [NaN, Infinity, 1e999, 1e40]}', 4), 4 * [np.nan])


@pytest.mark.parametrize(
    ("body", "named"),
    [
        (b"", "no JSON"),
        (b"\x80\x02pickle", "no JSON"),
        (b"[" * 100000, "no JSON"),
        (b"[1, 2]", "no JSON object"),
        (b"{}", "no list of scores"),
        (b'{"scores": {"0": 1, "1": 1}}', "no list of scores"),
        (b'{"scores": [1]}', "1 scores for 2"),
        (b'{"scores": [1, 2, 3]}', "3 scores for 2"),
        (b'{"scores": [1, true]}', "'True' is no score"),
        (b'{"scores": [1, "1"]}', "'1' is no score"),
        (b'{"scores": [1, [1]]}', "is no score"),
        (b'{"scores": [1, 1' + b"0" * 400 + b"]}", "too large"),
    ],
)
def test_no_other_answer_is_taken(body, named):
    with pytest.raises(ValueError, match=named) as found:
        wire.read_answer(body, 2)
    assert "\n" not in str(found.value) and len(str(found.value)) < 200


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"prompts": ["a"]}, "2 images and 1 prompts"),
        ({"prompts": ["a", 1]}, "prompts must be a list of strings"),
        ({"prompts": ["a", "b" * 2001]}, "more than 2000 characters"),
        ({"images": [], "prompts": []}, "0 images"),
        ({"images": ["?", "?"]}, "no base64 of a PNG"),
        ({"images": [base64.b64encode(b"GIF89a").decode()] * 2}, "no base64 of a PNG"),
        ({"images": [png(4), png(5)]}, "differ in size"),
        ({"images": [png(4)[:60] + png(4)[64:]] * 2}, "PNG"),
    ],
)
def test_no_other_request_is_taken(change, named):
    with pytest.raises(ValueError, match=named):
        wire.read_request(asked(**change), BOUNDS)


@pytest.mark.parametrize("flood", [b"[],", b"{},", b"1,"])
def test_values_are_bounded_before_they_are_made(flood, monkeypatch):
    monkeypatch.setattr(json, "loads", lambda body: pytest.fail("parsed"))
    with pytest.raises(ValueError, match="too many values"):
        wire.read_request(b'{"images": [' + flood * 60, wire.Bounds(images=4, prompt=10))


def test_prompts_may_be_of_commas_alone():
    body = wire.request(IMAGES, [",[{" * 3 + ","] * 2)
    assert wire.read_request(body, wire.Bounds(images=2, prompt=10))[1] == [",[{,[{,[{,"] * 2


def test_sizes_are_bounded_before_pixels_are_made():
    for bounds, named in ((wire.Bounds(pixels=47), "exceed 47 pixels"), (wire.Bounds(images=1), "wanted are 1..1")):
        with pytest.raises(ValueError, match=named):
            wire.read_request(asked(), bounds)
    with pytest.raises(ValueError, match="pixels 0"):
        wire.Bounds(pixels=0)
