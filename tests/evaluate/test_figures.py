import matplotlib
import numpy as np

from maskrl_jax.evaluate import curve, figures


def read_png(path):
    from PIL import Image

    return np.asarray(Image.open(path).convert("RGB"))


def test_curves_write_the_pixels_that_they_return(make_point, tmp_path):
    base = [make_point("base", steps, steps, np.full(6, 1 - 1 / steps)) for steps in (4, 8, 16)]
    tuned = [make_point("tuned", dial, dial, np.full(6, 0.95)) for dial in (3, 5)]
    found = curve.first_equal(tuned, base[2:], curve.Criteria({"graded": 0.02}))
    path = tmp_path / "deep" / "curves.png"
    before = dict(matplotlib.rcParams)
    image = figures.quality_curves(path, base + tuned, ["graded", "frechet"], base[2:], found)
    assert image.dtype == np.uint8 and image.shape[2] == 3 and image.std() > 5
    np.testing.assert_array_equal(read_png(path), image)
    assert dict(matplotlib.rcParams) == before  # the caller's style is untouched


def test_same_figure_same_bytes(tmp_path):
    for name in ("a.png", "b.png"):
        figures.calls_histogram(tmp_path / name, {"tuned": {3: 10, 5: 2}}, 16)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_series_of_logged_rows():
    rows = [
        {"step": 2, "a": 9.0},
        {"step": 1, "a": 1.0},
        {"step": 2, "a": 2.0},
        {"step": 3, "a": None, "b": 5},
    ]
    series = figures.logged_series(rows)
    assert sorted(series) == ["a", "b"]
    np.testing.assert_array_equal(series["a"], [[1, 2], [1, 2]])


def test_running_mean_keeps_a_straight_line_inside():
    np.testing.assert_allclose(figures._smoothed(np.arange(5.0)), [0.5, 1, 2, 3, 3.5])


def test_training_panels_without_data_are_left_out(tmp_path):
    series = {"rl/kl": (np.arange(4.0), np.array([0.0, 0.05, 0.1, 0.2]))}
    assert figures.training_curves(tmp_path / "x.png", series, {"Loss": {"train/loss": "loss"}}) is None
    assert not (tmp_path / "x.png").exists()
    image = figures.training_curves(tmp_path / "x.png", series, {"KL": {"rl/kl": "KL"}, "Loss": {"train/loss": ""}})
    assert image.ndim == 3 and (tmp_path / "x.png").exists()
