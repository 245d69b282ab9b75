"""Files of a run, in a folder or a bucket."""

import dataclasses

import jax
import numpy as np
import pytest
import toy_task
from bucket import bucket  # noqa: F401
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from maskrl_jax import paths, runner, stored
from maskrl_jax.checkpoint import load_arrays
from maskrl_jax.writers import read_metrics

FIELDS = ("step", "params", "opt_state", "ema", "extra")


@pytest.mark.parametrize(
    ("path", "start", "expected"),
    [
        ("runs/stages/a", "runs/b", "../stages/a"),
        ("gs://bucket/stages/a", "gs://bucket/runs/b", "../../stages/a"),
        ("gs://bucket/stages/a", "gs://other/runs/b", "gs://bucket/stages/a"),
        ("/data/stages/a", "gs://bucket/runs/b", "/data/stages/a"),
        ("gs://bucket/stages/a", "runs/b", "gs://bucket/stages/a"),
    ],
)
def test_a_place_is_found_again_from_where_it_was_noted(path, start, expected):
    assert paths.relative(path, start) == expected
    assert paths.joined(start, expected) == path


def test_a_file_is_written_whole(tmp_path):
    path = tmp_path / "new" / "notes.txt"
    for text in ("longer than the next", "short"):
        paths.write(path, text)
        assert path.read_text() == text
    assert [found.name for found in path.parent.iterdir()] == ["notes.txt"]
    paths.write_arrays(path, {"a": np.arange(3)})
    np.testing.assert_array_equal(paths.read_arrays(path)["a"], [0, 1, 2])


def test_a_run_in_a_bucket_leaves_and_resumes_what_one_in_a_folder_does(bucket, tmp_path, monkeypatch):  # noqa: F811
    address, folder = bucket
    monkeypatch.setitem(runner.TASKS, "toy", "toy_task")
    config = toy_task.get_config("child")
    build = toy_task.build
    monkeypatch.setattr(toy_task, "build", lambda context: _without_report(build(context)))
    runner.run(config, str(tmp_path / "local"), str(tmp_path / "store"))
    config.num_steps = 4
    runner.run(config, f"{address}/run", f"{address}/store")
    config.num_steps = 6
    runner.run(config, f"{address}/run", f"{address}/store")
    found, expected = (load_arrays(place, FIELDS) for place in (f"{address}/run", str(tmp_path / "local")))
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert stored.is_finished(f"{address}/run")
    parents, store = stored.read_places(f"{address}/run")
    assert store == f"{address}/store" and stored.is_finished(parents["base"])
    steps = [[line["step"] for line in read_metrics(place)] for place in (f"{address}/run", str(tmp_path / "local"))]
    assert steps == [[2, 4, 4, 6, 6], [2, 4, 6, 6]]  # evaluated at its first end, too
    events = EventAccumulator(str(folder / "run")).Reload()
    assert events.Scalars("train/loss")[-1].step == 6
    assert Image.open(folder / "run" / "samples" / "grid_0000006.png").size == (4, 4)
    assert not (tmp_path / "gs:").exists()


def _without_report(task):
    return dataclasses.replace(task, report=None)
