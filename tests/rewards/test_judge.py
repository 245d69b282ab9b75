"""What the learned judge pays for, on maps drawn by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskrl_jax.data import captions
from maskrl_jax.errors import UserError
from maskrl_jax.rewards import judge

RED_CIRCLE, BLUE_SQUARE, YELLOW_CROSS = 1, 7, 16  # 1 + 4 shape + colour
PAIR = "a red circle left of a blue square"


def outputs(objects, seam=-40.0):
    """Return a judge's outputs that are sure of the objects {(row, column): kind} of a 3 x 3 grid."""
    kinds = np.zeros((1, 3, 3), np.int32)
    for cell, kind in objects.items():
        kinds[0][cell] = kind
    return {"cells": 40.0 * jax.nn.one_hot(kinds, 17), "mixed": jnp.full((1, 3, 3), seam)}


def scores(prompt, objects, seam=-40.0):
    target = jnp.asarray(judge.targets("cells", np.zeros((1, 8)), [prompt]))
    found = judge.score("cells", outputs(objects, seam), target)
    return [float(found[name][0]) for name in judge.names("cells")]


def test_targets_of_captions_and_classes():
    found = judge.targets("cells", np.zeros((2, 8)), [PAIR, "a yellow cross"])
    assert found.tolist() == [[RED_CIRCLE, BLUE_SQUARE, 0], [YELLOW_CROSS, 0, 0]]
    assert judge.targets("class", np.array([3, 1]), ["3", "1"]).tolist() == [3, 1]
    with pytest.raises(UserError, match="cannot verify"):
        judge.targets("cells", np.zeros((1, 8)), ["a purple circle"])


@pytest.mark.parametrize(
    ("prompt", "objects", "shown", "exact"),
    [
        (PAIR, {(1, 0): RED_CIRCLE, (1, 2): BLUE_SQUARE}, 1, 1),
        (PAIR, {(1, 2): RED_CIRCLE, (1, 0): BLUE_SQUARE}, 1 / 3, 1),  # the other way round
        (PAIR, {(0, 0): RED_CIRCLE, (1, 1): BLUE_SQUARE}, 1 / 3, 1),  # diagonal: no relation
        (PAIR, {(0, 0): RED_CIRCLE, (1, 2): BLUE_SQUARE}, 1, 1),  # two right and one down still is left of
        (PAIR, {(1, 0): RED_CIRCLE}, 1 / 6, 0),  # one missing
        (PAIR, {(1, 0): RED_CIRCLE, (1, 2): YELLOW_CROSS}, 1 / 6, 1),  # wrong kind
        (PAIR, {(1, 0): RED_CIRCLE, (0, 0): RED_CIRCLE, (1, 2): BLUE_SQUARE}, 1, 0),  # twice
        (PAIR, {}, 0, 0),
        ("a yellow cross", {(2, 2): YELLOW_CROSS}, 1, 1),
        ("a yellow cross", {(2, 2): RED_CIRCLE}, 0, 1),
        ("a yellow cross", {(2, 2): YELLOW_CROSS, (0, 0): RED_CIRCLE}, 1, 0),
        ("a yellow cross", {}, 0, 0),
    ],
)
def test_a_picture_is_paid_for_what_it_shows(prompt, objects, shown, exact):
    correct = shown == exact == 1
    np.testing.assert_allclose(scores(prompt, objects), [shown * exact, shown, 1.0, correct], atol=1e-6)


@pytest.mark.parametrize(
    ("relation", "second"), [("left of", (1, 2)), ("right of", (1, 0)), ("above", (2, 1)), ("below", (0, 1))]
)
def test_every_relation_holds_in_its_own_direction_only(relation, second):
    objects = {(1, 1): RED_CIRCLE, second: BLUE_SQUARE}
    for other in captions.RELATIONS:
        shown = scores(f"a red circle {other} a blue square", objects)[1]
        np.testing.assert_allclose(shown, 1.0 if other == relation else 1 / 3, atol=1e-6)


def test_a_torn_picture_loses_all_in_proportion():
    """Nine cells that are torn with probability 1/2: exp(-9 ln 2 / 8)."""
    whole = 2 ** (-9 / 8)
    found = scores("a yellow cross", {(2, 2): YELLOW_CROSS}, seam=0.0)
    np.testing.assert_allclose(found, [whole, 1.0, whole, 1.0], rtol=1e-5)


def test_doubt_is_counted_in_expectation():
    """One cell holds the cross with probability 1/2: presence and relation are 1/2, both 1/4, the count is half off."""
    unsure = outputs({})
    unsure["cells"] = unsure["cells"].at[0, 1, 1, YELLOW_CROSS].set(40.0)
    found = judge.score("cells", unsure, jnp.array([[YELLOW_CROSS, 0, 0]]))
    np.testing.assert_allclose(found["judge"], [1 / 2 * (1 / 2 + 1 / 2 + 1 / 4) / 3], rtol=1e-5)


def test_samples_are_scored_by_their_own_target():
    objects = {(1, 0): RED_CIRCLE, (1, 2): BLUE_SQUARE}
    both = jax.tree.map(lambda x: x.repeat(2, 0), outputs(objects))
    found = judge.score("cells", both, jnp.array([[RED_CIRCLE, BLUE_SQUARE, 0], [RED_CIRCLE, BLUE_SQUARE, 1]]))
    np.testing.assert_allclose(found["judge"], [1.0, 1 / 3], atol=1e-6)


def test_class_judge_pays_the_probability_of_the_class():
    logits = jnp.log(jnp.array([[0.7, 0.2, 0.1], [0.7, 0.2, 0.1]]))
    found = judge.score("class", {"class": logits}, jnp.array([0, 2]))
    assert tuple(found) == judge.names("class")
    np.testing.assert_allclose(found["judge"], [0.7, 0.1], rtol=1e-6)


@pytest.mark.parametrize(("scale", "seam"), [(0.15, -1.0), (3.0, -99.0)])
def test_gradient_reaches_the_maps_and_stays_finite(scale, seam):
    """Also where the judge is so sure that probabilities are 0 and 1."""
    given = outputs({(1, 0): RED_CIRCLE, (1, 2): BLUE_SQUARE}, seam)
    given["cells"] *= scale
    target = jnp.array([[RED_CIRCLE, BLUE_SQUARE, 0]])
    gradient = jax.grad(lambda o: judge.score("cells", o, target)["judge"].sum())(given)
    assert all(np.isfinite(x).all() for x in gradient.values())
    if scale < 1:
        assert gradient["cells"][0, 1, 0, RED_CIRCLE] > 1e-3
        assert gradient["cells"][0, 1, 2, BLUE_SQUARE] > 1e-3
        assert (gradient["mixed"] < -1e-3).all()
