import numpy as np
import pytest

from maskrl_jax.evaluate.diversity import within_prompt_diversity


def test_mean_over_unordered_pairs_of_each_prompt():
    # Prompt 0: points 0, 3, 4 on a line: (3 + 4 + 1) / 3. Prompt 1: collapsed.
    features = np.array([[[0.0, 0], [3, 0], [4, 0]], [[5, 5], [5, 5], [5, 5]]])
    np.testing.assert_allclose(within_prompt_diversity(features), [8 / 3, 0.0])


def test_distance_is_euclidean():
    assert within_prompt_diversity(np.array([[[0.0, 0], [3, 4]]])) == [5.0]


def test_one_sample_has_no_diversity():
    with pytest.raises(ValueError, match="G >= 2"):
        within_prompt_diversity(np.zeros((4, 1, 2)))
