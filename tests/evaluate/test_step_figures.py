import numpy as np

from maskrl_jax.evaluate import figures, step_figures

ROWS = [
    {"step": step, **{f"critical/chosen@{i:03d}": float(i == step % 3) for i in range(3)}}
    | {f"critical/similarity@{i:03d}": 0.3 * i for i in range(3)}
    for step in (2, 4, 6)
]
SERIES = figures.logged_series(ROWS)


def test_tags_are_collected_by_sampling_step():
    updates, share = step_figures.by_step(SERIES, step_figures.CHOSEN)
    np.testing.assert_array_equal(updates, [2, 4, 6])
    np.testing.assert_array_equal(share, [[0, 0, 1], [0, 1, 0], [1, 0, 0]])
    assert step_figures.by_step({}, step_figures.CHOSEN)[1].size == 0


def test_cells_reach_half_way_to_their_neighbours():
    np.testing.assert_array_equal(step_figures._edges(np.array([2.0, 4.0, 8.0])), [1, 3, 6, 10])
    np.testing.assert_array_equal(step_figures._edges(np.array([5.0])), [4.5, 5.5])


def test_figures_are_drawn_where_something_was_logged(tmp_path):
    chosen = step_figures.chosen_steps(tmp_path / "a.png", SERIES, 3)
    gain = step_figures.information_gain(tmp_path / "b.png", SERIES, np.array([1.0, 0.8, 0.4, 0.0]))
    for image in (chosen, gain):
        assert image.dtype == np.uint8 and image.shape[2] == 3 and image.std() > 5
    assert step_figures.chosen_steps(tmp_path / "c.png", {}, 3) is None
    assert step_figures.information_gain(tmp_path / "c.png", {}, np.zeros(4)) is None
    assert not (tmp_path / "c.png").exists()


def test_steps_count_from_one(monkeypatch):
    drawn = []
    monkeypatch.setattr(step_figures.canvas, "save", lambda figure, path: drawn.append(figure.axes))
    step_figures.chosen_steps("a.png", SERIES, 3)
    step_figures.information_gain("b.png", SERIES, np.array([1.0, 0.8, 0.4, 0.0]))
    (chosen, _), (similarity, gain) = drawn
    assert chosen.get_ylim() == (0.5, 3.5)
    for axes in (similarity, gain):
        assert [line.get_xdata()[0] for line in axes.lines] == [1] * len(axes.lines)
