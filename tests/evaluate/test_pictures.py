import numpy as np
import pytest

from maskrl_jax.evaluate import canvas, pictures
from maskrl_jax.sampling.maskgit import GIVEN


def test_masked_cells_are_covered_and_shown_ones_untouched():
    image = np.zeros((4, 4, 3), np.uint8)
    image[:2, :2] = 255
    covered = pictures._hide_masked(image, np.array([True, False, False, True]))
    cell = pictures.CELL_PIXELS
    assert covered.shape == (2 * cell, 2 * cell, 3)
    assert (covered[:cell, :cell] == 255).all() and (covered[cell:, cell:] == 0).all()
    grey = {tuple(pixel) for pixel in covered[:cell, cell:].reshape(-1, 3)}
    assert grey == {tuple(pictures.MASKED), tuple(pictures.STRIPE)}


def test_long_runs_show_the_last_call_and_at_most_the_asked_number():
    np.testing.assert_array_equal(pictures._calls_shown(3, 7), [1, 2, 3])
    np.testing.assert_array_equal(pictures._calls_shown(16, 4), [1, 6, 11, 16])


def test_grid_and_order_are_written(tmp_path):
    images = np.random.default_rng(0).integers(0, 255, (3, 16, 16, 3), dtype=np.uint8)
    rows, right = {"base": images, "tuned": images}, {"base": [True, False, True], "tuned": np.ones(3, bool)}
    grid = pictures.sample_grid(tmp_path / "grid.png", rows, ["a red circle", "b", "c"], right)
    order = pictures.commit_order(tmp_path / "order.png", images, np.arange(12).reshape(3, 4) % 4, [4, 4, 4], "abc")
    for image, name in ((grid, "grid.png"), (order, "order.png")):
        assert image.shape[1] == round(canvas.WIDTH * 150) and (tmp_path / name).stat().st_size > 1000


def test_given_tokens_are_shown_from_the_first_call_on(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(pictures, "_hide_masked", lambda image, shown_N: shown.append(shown_N) or image)
    steps = np.array([[GIVEN, 0, 1, GIVEN]], np.uint8)
    pictures.commit_order(tmp_path / "order.png", np.zeros((1, 4, 4, 3), np.uint8), steps, [2], ["a"])
    np.testing.assert_array_equal(shown, [[True, True, False, True], [True] * 4])


def test_tokens_must_form_a_square(tmp_path):
    with pytest.raises(ValueError, match="square"):
        pictures.commit_order(tmp_path / "x.png", np.zeros((1, 4, 4, 3), np.uint8), np.zeros((1, 5)), [1], ["a"])
