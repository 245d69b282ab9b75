"""Everything written is there after a kill, and nothing twice after a resume."""

import json

import numpy as np
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from maskrl_jax.writers import Progress, Writer, read_metrics


def test_scalars_are_on_disk_before_close(tmp_path):
    writer = Writer(str(tmp_path))
    writer.scalars(3, {"train/loss": np.float32(0.5)})
    assert read_metrics(str(tmp_path)) == [{"step": 3, "train/loss": 0.5}]
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(3, 0.5)]
    writer.close()


def test_what_is_not_finite_is_null_in_json(tmp_path):
    writer = Writer(str(tmp_path))
    writer.scalars(0, {"a": float("nan"), "b": float("inf")})
    writer.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 0, "a": None, "b": None}


def test_images_go_to_events_and_samples(tmp_path):
    picture = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    writer = Writer(str(tmp_path))
    writer.images(7, {"samples/grid": picture})
    writer.close()
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "samples" / "grid_0000007.png")), picture)
    assert EventAccumulator(str(tmp_path)).Reload().Images("samples/grid")[0].step == 7


def test_a_resume_drops_what_follows_again(tmp_path):
    writer = Writer(str(tmp_path))
    for step in (2, 4, 6):
        writer.scalars(step, {"x": step})
    writer.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 8, "x"')  # cut short by a kill
    writer = Writer(str(tmp_path), start=4)
    writer.scalars(6, {"x": 60})
    writer.close()
    assert [line["x"] for line in read_metrics(str(tmp_path))] == [2, 4, 60]


def test_progress_tells_the_time_left_when_there_is_no_terminal(capsys, monkeypatch):
    clock = iter([0.0, 10.0, 10.0, 20.0, 20.0, 20.0])
    monkeypatch.setattr("maskrl_jax.writers.time.monotonic", lambda: next(clock))
    progress = Progress("tokenizer", total=100, every=15.0)
    progress.update(1)  # at 10 s, which went into compiling: too early for a line
    progress.update(11)  # at 20 s: one second a step, 89 to go
    progress.close()
    assert capsys.readouterr().out == "tokenizer: 11/100, 1:29 left\n"
