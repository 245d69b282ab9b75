import dataclasses
import json

import numpy as np
import pytest

from maskrl_jax.evaluate import frechet
from maskrl_jax.evaluate.measure import Generated, Protocol, Scorer, System, measure, pack, save_samples, unpack


def recorder(seen):
    """Return a system whose picture is its prompt's value plus 0.01 x sample id; calls = id % 2 + 1."""

    def generate(setting, cond, ids, seed):
        seen.append((setting, tuple(cond), tuple(ids), seed))
        images = np.broadcast_to((cond + ids * 0.01)[:, None, None, None], (len(ids), 2, 2, 3)).astype(np.float32)
        return Generated(images, (ids % 2 + 1).astype(np.int32), np.zeros((len(ids), 4), np.uint8))

    return System("fake", "Fake", generate)


def judge(images, prompts):
    value = images[:, 0, 0, 0]
    return {"judge": value, "features": np.stack([value, -value], axis=1)}


PROTOCOL = Protocol(("a", "b", "c"), np.array([0.1, 0.2, 0.3]), 2, 4, 5, np.random.default_rng(0).normal(size=(9, 2)))


def test_samples_are_keyed_by_a_global_index_in_batches_of_one_size():
    seen = []
    measure(recorder(seen), 8, PROTOCOL, Scorer(judge))
    assert [row[2] for row in seen] == [(0, 1, 2, 3), (4, 5, 6, 7)]
    assert [row[1] for row in seen] == [(0.1, 0.1, 0.2, 0.2), (0.3, 0.3, 0.3, 0.3)]
    assert all(row[0] == 8 and row[3] == 5 for row in seen)


def test_numbers_of_a_point():
    point = measure(recorder([]), 8, PROTOCOL, Scorer(judge))
    np.testing.assert_allclose(point.per_sample["judge"], [0.10, 0.11, 0.22, 0.23, 0.34, 0.35], rtol=1e-6)
    np.testing.assert_allclose(point.per_prompt("judge"), [0.105, 0.225, 0.345], rtol=1e-6)
    assert point.metrics["judge"].mean == pytest.approx(0.225)
    assert (point.calls_mean, point.calls_sd, point.calls_histogram) == (1.5, 0.5, {1: 3, 2: 3})
    assert point.diversity.mean == pytest.approx(0.01 * np.sqrt(2), rel=1e-5)
    expected = frechet.frechet_distance(PROTOCOL.real_features, point.per_sample["features"])
    assert point.frechet == pytest.approx(expected)
    assert "features" not in point.metrics


def test_batch_size_changes_nothing():
    first = measure(recorder([]), 8, PROTOCOL, Scorer(judge))
    second = measure(recorder([]), 8, dataclasses.replace(PROTOCOL, batch_size=5), Scorer(judge))
    assert first.to_json() == second.to_json()


def test_kept_pictures_are_the_first_sample_of_each_prompt():
    point = measure(recorder([]), 8, dataclasses.replace(PROTOCOL, keep=3), Scorer(judge))
    np.testing.assert_array_equal(point.kept["images"][:, 0, 0, 0], [26, 56, 87])  # 0.10, 0.22, 0.34 of 255
    assert point.kept["commit_step"].shape == (3, 4)


def test_one_sample_a_prompt_has_no_diversity_and_a_verifier_adds_scores():
    scorer = Scorer(judge, lambda images, prompts: {"strict": np.array([p == "a" for p in prompts])})
    protocol = dataclasses.replace(PROTOCOL, prompts=tuple("abcabc"), cond=np.arange(6.0), group=1)
    point = measure(recorder([]), 8, protocol, scorer)
    assert point.diversity is None
    assert point.metrics["strict"].mean == pytest.approx(1 / 3)


def test_scores_that_are_not_finite_are_named():
    scorer = Scorer(judge, lambda images, prompts: {"strict": np.full(len(images), np.nan)})
    with pytest.raises(ValueError, match="'strict' must be finite"):
        measure(recorder([]), 8, PROTOCOL, scorer)


def test_without_real_pictures_there_is_no_distance():
    point = measure(recorder([]), 8, dataclasses.replace(PROTOCOL, real_features=None), Scorer(judge))
    assert (point.frechet, point.precision, point.recall) == (None, None, None)
    assert point.diversity is not None and point.metrics["judge"].mean == pytest.approx(0.225)
    plain = json.loads(json.dumps(point.to_json(), allow_nan=False))
    assert plain["frechet"] is None
    assert unpack(pack(point)).to_json() == point.to_json()


def test_json_form_is_plain_and_samples_are_kept_beside(tmp_path):
    point = measure(recorder([]), 8, PROTOCOL, Scorer(judge))
    plain = json.loads(json.dumps(point.to_json(), allow_nan=False))
    assert plain["calls_histogram"] == {"1": 3, "2": 3}
    path = save_samples(tmp_path / "samples", point)
    assert path.name == "fake-8-seed5.npz"
    with np.load(path) as stored:
        np.testing.assert_array_equal(stored["calls"], [1, 2, 1, 2, 1, 2])
