"""Outputs of the judge, by kind."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskrl_jax.models.judge import Judge, JudgeConfig

IMAGES = jax.random.uniform(jax.random.key(0), (2, 12, 12, 3))


def read(kind, images=IMAGES):
    judge = Judge(JudgeConfig(kind=kind, num_classes=5, patch=4, width=6))
    params = jax.jit(judge.init)(jax.random.key(1), images)
    return jax.jit(judge.apply)(params, images)


def test_cells_judge_reads_a_map_a_seam_and_a_tone():
    shapes = {name: x.shape for name, x in read("cells").items()}
    assert shapes == {"features": (2, 12), "cells": (2, 3, 3, 5), "mixed": (2, 3, 3), "tone": (2,)}


def test_class_judge_reads_one_class():
    assert {name: x.shape for name, x in read("class").items()} == {"features": (2, 12), "class": (2, 5)}


def test_features_are_the_maximum_and_the_mean_over_the_picture():
    """A map head that is the identity shows the cells that were pooled."""
    judge = Judge(JudgeConfig(kind="cells", num_classes=6, patch=4, width=6))
    params = jax.jit(judge.init)(jax.random.key(1), IMAGES)
    head = params["params"]["Dense_1"]
    head["kernel"] = jnp.eye(6)
    found = jax.jit(judge.apply)(params, IMAGES)
    cells = np.asarray(found["cells"])
    np.testing.assert_allclose(found["features"], np.hstack([cells.max((1, 2)), cells.mean((1, 2))]), atol=1e-6)


def test_pictures_are_read_one_by_one():
    both, flipped = read("cells"), read("cells", IMAGES[::-1])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b[::-1], atol=1e-5), both, flipped)


def test_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="judge kind 'pixels' is not one of cells, class"):
        JudgeConfig(kind="pixels")
