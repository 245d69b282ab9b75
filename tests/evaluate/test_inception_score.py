import numpy as np
import pytest

from maskrl_jax.evaluate.inception_score import even_splits, inception_score, sized_splits


def test_sure_and_different_answers_score_the_number_of_classes():
    logits = 1e4 * np.eye(8, dtype=np.float32)
    assert inception_score(logits, [np.arange(8)]) == (pytest.approx(8.0), 0.0)


def test_equal_answers_score_one():
    assert inception_score(np.ones((6, 5)), [np.arange(6)])[0] == pytest.approx(1.0)


def test_two_answers_by_hand():
    # p = (3/4, 1/4) and (1/4, 3/4), marginal 1/2: KL = 3/4 log 3/2 + 1/4 log 1/2 for both.
    logits = np.log([[0.75, 0.25], [0.25, 0.75]])
    expected = np.exp(0.75 * np.log(1.5) + 0.25 * np.log(0.5))
    assert inception_score(logits, [np.arange(2)])[0] == pytest.approx(expected)


def test_score_is_the_mean_over_splits_with_their_deviation():
    logits = 1e4 * np.eye(4)
    # Parts of 1 and of 3 sure answers score 1 and 3.
    assert inception_score(logits, [np.arange(1), np.arange(1, 4)]) == (pytest.approx(2.0), pytest.approx(1.0))


def test_splits():
    assert [len(rows) for rows in even_splits(10, 3)] == [3, 3, 4]
    assert [rows.tolist() for rows in sized_splits(5, 2)] == [[0, 1], [2, 3], [4]]
    shuffled = even_splits(10, 2, seed=2020)
    assert sorted(np.concatenate(shuffled)) == list(range(10))
    np.testing.assert_array_equal(np.concatenate(shuffled), np.random.RandomState(2020).permutation(10))


@pytest.mark.parametrize("splits", [0, 11])
def test_more_splits_than_samples_are_refused(splits):
    with pytest.raises(ValueError, match=f"^10 samples cannot be split into {splits} parts$"):
        even_splits(10, splits)


@pytest.mark.parity
def test_score_and_distance_are_torch_fidelity_s():
    from maskrl_jax.evaluate import frechet
    from maskrl_jax.evaluate.protocols import PROTOCOLS

    torch = pytest.importorskip("torch", reason="no torch (extra parity)")
    fidelity = pytest.importorskip("torch_fidelity", reason="no torch-fidelity (extra parity)")
    logits = np.random.default_rng(0).normal(size=(203, 30)).astype(np.float32) * 3
    theirs = fidelity.metric_isc.isc_features_to_metric(torch.tensor(logits))
    found = inception_score(logits, PROTOCOLS["torch_fidelity"].score_splits(203))
    assert found == (pytest.approx(theirs["inception_score_mean"]), pytest.approx(theirs["inception_score_std"]))
    other = logits[::-1] * 1.1 + 0.2
    stats = [fidelity.metric_fid.fid_features_to_statistics(torch.tensor(x.copy())) for x in (logits, other)]
    distance = fidelity.metric_fid.fid_statistics_to_metric(*stats, verbose=False)["frechet_inception_distance"]
    assert frechet.frechet_distance(logits, other) == pytest.approx(distance, rel=1e-5)  # their mean is float32
