"""How different the samples of one prompt are from each other."""

import numpy as np


def within_prompt_diversity(features_PGD: np.ndarray) -> np.ndarray:
    """Return the mean pairwise Euclidean distance [P] among the G samples of each prompt.

    Args:
      features_PGD: [P, G, D] features, G samples of each of P prompts.

    Returns:
      float64 [P]; the mean over the G(G-1)/2 unordered pairs, so a collapsed prompt scores exactly 0.

    Raises:
      ValueError: if the shape is not [P, G, D] or a prompt has fewer than two samples.
    """
    features = np.asarray(features_PGD, np.float64)
    if features.ndim != 3 or features.shape[1] < 2:
        raise ValueError(f"diversity needs features [P, G, D] with G >= 2, got shape {features.shape}")
    first, second = np.triu_indices(features.shape[1], k=1)
    # One pair at a time keeps memory at [P, D]; G is small.
    pairs = [np.linalg.norm(features[:, a] - features[:, b], axis=-1) for a, b in zip(first, second, strict=True)]
    return np.mean(pairs, axis=0)
