"""Figures of shortcuts are drawn of what was measured, and of nothing else."""

import numpy as np

from maskrl_jax.evaluate import shortcut_figures
from maskrl_jax.evaluate.latency import Latency
from maskrl_jax.evaluate.timing import Spread


def test_quality_against_time_leaves_out_what_was_not_timed(tmp_path, make_point):
    points = [make_point(name, setting, setting, [0.5, 0.9]) for name in ("base", "shortcut") for setting in (4, 8)]
    times = [Latency(p.system, p.label, p.setting, 16, Spread(1.0, 1.0, p.setting)) for p in points[:3]]
    metrics = ("graded", "frechet", "diversity")
    image = shortcut_figures.quality_vs_time(tmp_path / "a.png", points, times, metrics)
    assert image.shape[2] == 3 and image.std() > 5
    fewer = shortcut_figures.quality_vs_time(tmp_path / "b.png", points[:2], times, metrics)
    assert image.shape != fewer.shape or (image != fewer).any()
    assert shortcut_figures.quality_vs_time(tmp_path / "c.png", points, [], metrics) is None
    assert not (tmp_path / "c.png").exists()


def test_drift_and_budget(tmp_path):
    errors = {name: {m: np.random.default_rng(0).random((6, 6)) for m in ("mse", "cosine", "kl")} for name in "ab"}
    for measures in errors.values():
        measures["kl"][:, 5] = np.nan
    image = shortcut_figures.drift(tmp_path / "a.png", errors)
    assert image.shape[2] == 3 and image.std() > 5
    rows = {"two": [True, False, False, True], "one": [True, False, False, False]}
    image = shortcut_figures.budget(tmp_path / "b.png", rows, full_ms=2.0, shortcut_ms=0.5)
    assert image.shape[2] == 3 and image.std() > 5
