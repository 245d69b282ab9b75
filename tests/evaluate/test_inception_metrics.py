import dataclasses
import hashlib

import hashed
import numpy as np
import pytest
import scipy.linalg
from safetensors.numpy import save_file

from maskrl_jax.errors import UserError
from maskrl_jax.evaluate import frechet, inception_metrics
from maskrl_jax.evaluate.extract import Extracted
from maskrl_jax.evaluate.inception_metrics import Reference, measure, read_reference, remarks, share_interval
from maskrl_jax.evaluate.moments import Moments
from maskrl_jax.evaluate.protocols import PROTOCOLS

RNG = np.random.default_rng(0)
REAL, FAKE = RNG.normal(size=(300, 6)), RNG.normal(size=(200, 6)) @ RNG.normal(size=(6, 6)) + 0.3
LOGITS = RNG.normal(size=(200, 5)) * 3


def extracted(rows, groups=4, logits=LOGITS):
    parts = [Moments.of(rows[i::groups]) for i in range(groups)]
    spatial = [Moments.of(rows[i::groups, :3]) for i in range(groups)]
    return Extracted(len(rows), "sum", parts, spatial, rows, logits)


def gaussian(rows):
    return rows.mean(axis=0), np.cov(rows, rowvar=False)


REFERENCE = Reference(gaussian(REAL), gaussian(REAL[:, :3]), REAL)
ADM = dataclasses.replace(PROTOCOLS["adm"], split_size=60)


def root_distance(a, b):
    """The distance by the matrix root itself, in float64."""
    (mean_a, cov_a), (mean_b, cov_b) = gaussian(a), gaussian(b)
    return ((mean_a - mean_b) ** 2).sum() + np.trace(cov_a + cov_b - 2 * scipy.linalg.sqrtm(cov_a @ cov_b).real)


def test_distances_are_those_of_the_matrix_root():
    found = measure(extracted(FAKE), REFERENCE, ADM)
    assert found["fid"]["value"] == pytest.approx(root_distance(FAKE, REAL), rel=1e-6)
    assert found["sfid"]["value"] == pytest.approx(root_distance(FAKE[:, :3], REAL[:, :3]), rel=1e-6)


def test_distance_of_fewer_samples_than_dimensions_is_that_of_the_features_themselves():
    """tr (A B)^1/2 is the nuclear norm of the product of the centred rows, where no root is taken."""
    a, b = RNG.normal(size=(40, 100)), RNG.normal(size=(60, 100)) + 0.1
    rows = [(x - x.mean(axis=0)) / np.sqrt(len(x) - 1) for x in (a, b)]
    overlap = np.linalg.svd(rows[0] @ rows[1].T, compute_uv=False).sum()
    expected = ((a.mean(axis=0) - b.mean(axis=0)) ** 2).sum() + sum((x**2).sum() for x in rows) - 2 * overlap
    assert frechet.frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)


def test_all_metrics_of_adm():
    found = measure(extracted(FAKE), REFERENCE, ADM)
    assert set(found) == {"fid", "sfid", "inception_score", "precision", "recall"}
    assert found["inception_score"]["splits"] == 4
    precision, recall = frechet.precision_recall(REAL, FAKE)
    assert (found["precision"]["value"], found["recall"]["value"]) == (precision, recall)
    assert found["precision"]["low"] < precision < found["precision"]["high"]


def test_only_what_is_needed_is_kept_whole():
    without = dataclasses.replace(REFERENCE, features=None)
    assert inception_metrics.kept(PROTOCOLS["adm"], REFERENCE) == ("pool", "logits")
    assert inception_metrics.kept(PROTOCOLS["adm"], without) == ("logits",)
    assert inception_metrics.kept(PROTOCOLS["stretch"], REFERENCE) == ("pool",)
    assert inception_metrics.kept(PROTOCOLS["clean"], REFERENCE) == ()


def test_each_protocol_has_its_own_metrics():
    assert set(measure(extracted(FAKE), REFERENCE, PROTOCOLS["torch_fidelity"])) == {"fid", "inception_score"}
    assert set(measure(extracted(FAKE, logits=None), REFERENCE, PROTOCOLS["clean"])) == {"fid"}


def test_jackknife_error_of_a_mean_is_the_textbook_one():
    """Groups of one sample: sd / sqrt(n)."""
    rows = FAKE[:50, :1]
    error = inception_metrics.standard_error(lambda m: m.mean.item(), [Moments.of(row[None]) for row in rows])
    assert error == pytest.approx(rows.std(ddof=1) / 50**0.5)


def test_jackknife_error_of_the_distance_is_the_spread_of_new_samples():
    def distance(seed):
        rows = np.random.default_rng(seed).normal(size=(400, 3)) * [1, 2, 0.5] + 0.5
        found = measure(extracted(rows, groups=20), Reference(gaussian(REAL[:, :3]), None), PROTOCOLS["clean"])["fid"]
        return found["value"], found["standard_error"]

    values, errors = np.transpose([distance(seed) for seed in range(60)])
    assert errors.mean() == pytest.approx(values.std(), rel=0.3)


def test_no_error_without_groups_of_two():
    for rows, groups in ((FAKE, 1), (FAKE[:5], 4)):
        found = measure(extracted(rows, groups), REFERENCE, PROTOCOLS["clean"])
        assert "standard_error" not in found["fid"]


def test_share_interval_is_wilson_s():
    assert share_interval(0.5, 100) == (pytest.approx(0.4038, abs=1e-4), pytest.approx(0.5962, abs=1e-4))
    assert share_interval(0.0, 10) == (0.0, pytest.approx(0.2775, abs=1e-4))
    assert share_interval(1.0, 10)[1] == 1.0


def test_remarks_tell_what_is_missing_and_what_does_not_compare():
    notes = remarks(extracted(FAKE), Reference(gaussian(REAL), None, None, declared=False), PROTOCOLS["adm"])
    for word in ("200 samples", "mostly bias", "does not say how it was made", "no sFID", "no precision and recall"):
        assert sum(word in note for note in notes) == 1
    many = dataclasses.replace(extracted(FAKE), count=50_000)
    assert remarks(many, REFERENCE, PROTOCOLS["adm"]) == []


def test_a_file_that_does_not_tell_its_rounding_is_named_in_one_line():
    older = Reference(gaussian(REAL), None, REAL, rounding=False)
    notes = remarks(dataclasses.replace(extracted(FAKE), count=50_000), older, PROTOCOLS["torch_fidelity"])
    assert notes == ["the file of statistics does not say how floats were rounded; it was written before that was kept"]


def test_reference_statistics_with_images_give_both(tmp_path):
    file = str(tmp_path / "reference.npz")
    np.savez(file, hashed.images(3, 4, 4), mu=np.zeros(2048), sigma=np.eye(2048))
    calls = []

    def run(images, keep):
        calls.append((images.count, keep))
        return extracted(REAL)

    found, facts = read_reference(file, PROTOCOLS["adm"], run)
    assert calls == [(3, ("pool",))] and found.features is REAL and found.spatial is None and not found.declared
    with open(file, "rb") as stored:
        digest = hashlib.sha256(stored.read()).hexdigest()
    assert facts == {"path": file, "kind": "statistics", "sha256": digest, "count": None, "images": 300}
    found, facts = read_reference(file, PROTOCOLS["clean"], run)
    assert len(calls) == 1 and found.features is None and "images" not in facts


def test_reference_images_are_measured(tmp_path):
    file = str(tmp_path / "images.npz")
    np.savez(file, hashed.images(3, 4, 4))
    found, facts = read_reference(file, PROTOCOLS["clean"], lambda images, keep: extracted(REAL))
    np.testing.assert_allclose(found.pool[1], np.cov(REAL, rowvar=False), atol=1e-12)
    assert facts == {"path": file, "kind": "images", "sha256": "sum", "count": 300} and found.declared


def test_weights_other_than_the_published_ones_are_refused_until_named(tmp_path):
    file = str(tmp_path / "weights.safetensors")
    save_file({"a": np.zeros(3, np.float32)}, file)
    with open(file, "rb") as stored:
        digest = hashlib.sha256(stored.read()).hexdigest()
    with pytest.raises(UserError, match=f"has SHA-256 {digest}, which is not that of the published checkpoint; "):
        inception_metrics.read_weights(file)
    with pytest.raises(UserError, match="which is not that of --weights_sha256; "):
        inception_metrics.read_weights(file, "0" * 64)
    with pytest.raises(ValueError, match="^the state lacks fc.weight$"):
        inception_metrics.read_weights(file, digest.upper())
