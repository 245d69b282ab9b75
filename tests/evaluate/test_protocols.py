import dataclasses

import numpy as np
import pytest

from maskrl_jax.evaluate.protocols import PROTOCOLS, FidProtocol

RAMP = np.array([-0.1, 0.0, 0.2498, 0.5, 1.0, 1.3], np.float32)[:, None, None] * np.ones((1, 1, 3), np.float32)


def test_protocols_differ_where_publications_do():
    assert {name: (p.resize, p.values, p.rounding) for name, p in PROTOCOLS.items()} == {
        "adm": ("bilinear_tf1", "clip", "down"),
        "torch_fidelity": ("bilinear_tf1", "clip", "nearest"),
        "clean": ("bicubic_pil", "clip", "nearest"),
        "stretch": ("bilinear_tf1", "stretch", "down"),
    }


def test_floats_are_cut_and_rounded():
    assert PROTOCOLS["torch_fidelity"].pixels(RAMP)[:, 0, 0].tolist() == [0, 0, 64, 128, 255, 255]
    assert PROTOCOLS["adm"].pixels(RAMP)[:, 0, 0].tolist() == [0, 0, 63, 127, 255, 255]


def test_stretch_runs_from_the_least_value_of_each_image_to_its_largest():
    # -0.1..1.3 becomes 0..1: 0.5 lies at 0.6 / 1.4.
    images = np.stack([RAMP, RAMP * 2])
    found = PROTOCOLS["stretch"].pixels(images)
    assert found[0, :, 0, 0].tolist()[::3] == [0, int(255 * 0.6 / 1.4)] and found[0].max() == 255
    np.testing.assert_array_equal(found[0], found[1])


def test_stretch_of_bytes_and_of_a_flat_image():
    image = np.array([100, 150], np.uint8)[:, None, None] * np.ones((1, 1, 3), np.uint8)
    assert PROTOCOLS["stretch"].pixels(image)[:, 0, 0].tolist() == [0, 255]
    assert PROTOCOLS["stretch"].pixels(image[:1]).max() == 0


def test_bytes_pass_as_they_are():
    image = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    for name in ("adm", "torch_fidelity", "clean"):
        assert PROTOCOLS[name].pixels(image) is image


@pytest.mark.parametrize("wrong", [np.zeros((2, 2, 3), int), np.full((2, 2, 3), np.nan)])
def test_other_images_are_refused(wrong):
    with pytest.raises(ValueError, match="^images (must be of bytes or of floats|hold values that are not finite)"):
        PROTOCOLS["adm"].pixels(wrong)


def test_splits_are_those_of_the_programs():
    assert [len(rows) for rows in PROTOCOLS["adm"].score_splits(12_000)] == [5000, 5000, 2000]
    assert len(PROTOCOLS["torch_fidelity"].score_splits(50_000)) == 10


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"resize": "lanczos"}, "resize 'lanczos' is not one of bilinear_tf1, bicubic_pil"),
        ({"values": "tanh"}, "values 'tanh' is not one of clip, stretch"),
        ({"rounding": "up"}, "rounding 'up' is not one of nearest, down"),
        ({"metrics": ("kid",)}, "metrics .* are not among fid"),
        ({"metrics": ()}, "metrics .* are not among fid"),
        ({"metrics": ("inception_score",)}, "needs splits or split_size"),
        ({"samples": 1}, "samples 1 must be at least 2"),
    ],
)
def test_impossible_protocols_are_refused(wrong, message):
    with pytest.raises(ValueError, match=f"^.*{message}"):
        dataclasses.replace(FidProtocol("bicubic_pil", ("fid",)), **wrong)
