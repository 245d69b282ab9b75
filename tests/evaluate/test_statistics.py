import re

import hashed
import numpy as np
import pytest

from maskrl_jax.errors import UserError
from maskrl_jax.evaluate import statistics
from maskrl_jax.evaluate.moments import Moments
from maskrl_jax.evaluate.protocols import PROTOCOLS

MEAN, SPATIAL_MEAN = hashed.hashed((2048,), 0).astype(float), hashed.hashed((2023,), 1).astype(float)
COVARIANCE, SPATIAL_COVARIANCE = np.eye(2048, dtype=np.float32), np.eye(2023)


def refused(path, message, protocol="adm"):
    with pytest.raises(UserError, match=f"^{re.escape(message)}") as error:
        statistics.read(str(path), PROTOCOLS[protocol])
    assert "\n" not in str(error.value)


def test_statistics_of_pytorch_fid_and_its_kin_have_two_arrays(tmp_path):
    file = str(tmp_path / "a.npz")
    np.savez(file, mu=MEAN, sigma=COVARIANCE)
    assert statistics.holds_statistics(file)
    found = statistics.read(file, PROTOCOLS["clean"])
    np.testing.assert_array_equal(found.pool[0], MEAN)
    np.testing.assert_array_equal(found.pool[1], COVARIANCE)
    assert {x.dtype for x in found.pool} == {np.dtype(float)}
    assert (found.spatial, found.count, found.images, found.declared) == (None, None, False, False)


def test_virtual_files_of_adm_hold_both_gaussians_and_images(tmp_path):
    file = str(tmp_path / "VIRTUAL_set256_labeled.npz")
    np.savez(file, hashed.images(3, 4, 4), np.arange(3), mu=MEAN, sigma=COVARIANCE, mu_s=SPATIAL_MEAN,
             sigma_s=SPATIAL_COVARIANCE)  # fmt: skip
    found = statistics.read(file, PROTOCOLS["adm"])
    np.testing.assert_array_equal(found.spatial[0], SPATIAL_MEAN)
    assert found.images and found.spatial[1].shape == (2023, 2023)


def test_what_is_written_is_read_again_by_protocols_that_see_the_same_images(tmp_path):
    rows = hashed.hashed((3, 2048), 2), hashed.hashed((3, 2023), 3)
    pool, spatial = (Moments.of(x) for x in rows)
    file = str(tmp_path / "own")
    statistics.write(file, pool, spatial, PROTOCOLS["torch_fidelity"])
    found = statistics.read(file, PROTOCOLS["adm"])
    np.testing.assert_array_equal(found.pool[0], pool.mean)
    np.testing.assert_allclose(found.spatial[1], spatial.covariance, atol=1e-15)
    assert (found.count, found.declared, found.images) == (3, True, False)
    refused(file, f"{file} was made with resize 'bilinear_tf1'; this protocol has 'bicubic_pil'", "clean")
    refused(file, f"{file} was made with values 'clip'; this protocol has 'stretch'", "stretch")


def test_how_floats_were_rounded_is_kept_and_another_rounding_refused(tmp_path):
    moments = [Moments.of(hashed.hashed((3, size), size)) for size in (2048, 2023)]
    file = str(tmp_path / "floats")
    statistics.write(file, *moments, PROTOCOLS["torch_fidelity"], rounded=True)
    assert statistics.read(file, PROTOCOLS["torch_fidelity"]).rounding
    refused(file, f"{file} was made with rounding 'nearest'; this protocol has 'down'")
    statistics.write(file, *moments, PROTOCOLS["adm"])  # bytes, which no protocol rounds
    with np.load(file) as stored:
        arrays = dict(stored)
    assert arrays["rounding"] == "none"
    del arrays["rounding"]  # as it was written before
    np.savez(tmp_path / "older.npz", **arrays)
    found = statistics.read(str(tmp_path / "older.npz"), PROTOCOLS["torch_fidelity"])
    assert found.declared and not found.rounding


def test_images_alone_are_no_statistics(tmp_path):
    np.savez(tmp_path / "a.npz", hashed.images(3, 4, 4))
    assert not statistics.holds_statistics(str(tmp_path / "a.npz"))
    assert not statistics.holds_statistics(str(tmp_path))


def test_what_is_no_npz_is_refused(tmp_path):
    (tmp_path / "a.npz").write_bytes(b"garbage")
    np.save(tmp_path / "b.npy", np.zeros(3))
    for name in ("a.npz", "b.npy", "nowhere.npz"):
        with pytest.raises(UserError, match=f"^cannot read {tmp_path}/{name} as an .npz: ") as error:
            statistics.holds_statistics(str(tmp_path / name))
        assert "pickle" not in str(error.value)


def test_pickled_arrays_are_refused(tmp_path):
    np.savez(tmp_path / "a.npz", mu=np.array([{}], object), sigma=COVARIANCE)
    refused(tmp_path / "a.npz", f"cannot read {tmp_path}/a.npz as statistics: Object arrays cannot be loaded")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"mu": MEAN[:768]}, "mu and sigma must be [2048] and [2048, 2048], not [768] and [2048, 2048]"),
        ({"sigma": COVARIANCE[:5]}, "mu and sigma must be [2048] and [2048, 2048], not [2048] and [5, 2048]"),
        ({"mu": MEAN * np.nan}, "mu or sigma hold values that are not finite"),
        ({"sigma": np.triu(np.ones((2048, 2048)))}, "sigma is no covariance: not symmetric"),
        ({"sigma": -COVARIANCE}, "sigma is no covariance: not symmetric, or with a variance below 0"),
        ({"mu_s": MEAN, "sigma_s": COVARIANCE}, "mu_s and sigma_s must be [2023] and [2023, 2023]"),
    ],
)
def test_arrays_that_are_no_statistics_are_refused(tmp_path, wrong, message):
    np.savez(tmp_path / "a.npz", **({"mu": MEAN, "sigma": COVARIANCE} | wrong))
    refused(tmp_path / "a.npz", f"{tmp_path}/a.npz: {message}")


def test_half_of_the_arrays_is_not_enough(tmp_path):
    np.savez(tmp_path / "a.npz", mu=MEAN)
    refused(tmp_path / "a.npz", f"cannot read {tmp_path}/a.npz as statistics: ")
