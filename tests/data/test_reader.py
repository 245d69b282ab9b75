"""Batches read ahead by worker processes are those of the step, whatever was read before."""

import io
import os
import signal

import numpy as np
import pytest
from PIL import Image

from maskrl_jax.data.batches import batch_at
from maskrl_jax.data.dataset import Dataset
from maskrl_jax.data.images import StoredColumn
from maskrl_jax.data.reader import PART, InOrder, is_on_disk, reader
from maskrl_jax.errors import UserError

COUNT = 50


class Files:
    """Stored PNG pictures, as `prepare.Records` gives them."""

    def __len__(self):
        return COUNT

    def take(self, positions):
        return [{"image": png(int(i)), "label": int(i) % 7} for i in positions]


def png(i):
    stream = io.BytesIO()
    Image.fromarray(np.full((4, 4, 3), i, np.uint8)).save(stream, format="PNG")
    return stream.getvalue()


def pixels(encoded):
    return np.asarray(Image.open(io.BytesIO(encoded)))


@pytest.fixture(scope="module")
def pictures():
    """A set on disk, its pictures decoded by three threads."""
    columns = {
        "image": StoredColumn(Files(), "image", pixels, threads=3),
        "label": StoredColumn(Files(), "label", np.int32),
    }
    return Dataset("files", columns, None, None, None)


def test_threads_decode_each_picture_into_its_place(pictures):
    chosen = np.array([4, 1, 30, 1])
    np.testing.assert_array_equal(pictures.columns["image"][chosen][:, 0, 0, 0], chosen)
    assert pictures.columns["image"][3].shape == (4, 4, 3)


@pytest.mark.filterwarnings("ignore")  # of the libraries that a worker imports
def test_workers_give_the_batch_of_any_step(pictures):
    rows = slice(8, 8 + PART + 3)  # two parts, of which the second is smaller
    read = reader(pictures, 64, rows, 5, workers=2)
    for step in (3, 4, 0):  # in order, then anew, as a run that resumes
        found, expected = read(step), batch_at(pictures, step, 64, rows, 5)
        assert set(found) == set(expected)
        for name, value in expected.items():
            assert type(found[name]) is np.ndarray and found[name].dtype == value.dtype
            np.testing.assert_array_equal(found[name], value)


def signals(number):
    return [int(signal.getsignal(one)) for one in (signal.SIGINT, signal.SIGTERM)] + [os.getpid()]


@pytest.mark.filterwarnings("ignore")  # of the libraries that a worker imports
def test_workers_leave_signals_to_their_parent():
    ahead = InOrder(signals, 1, 4)
    *found, worker = ahead(0)
    ahead.close()
    assert found == [signal.SIG_IGN] * 2 and worker != os.getpid()
    with pytest.raises(ProcessLookupError):  # and yet it is gone
        os.kill(worker, 0)


def test_without_workers_and_in_memory_no_process_is_started(pictures, monkeypatch):
    monkeypatch.setattr(InOrder, "_begin", lambda *_: pytest.fail("a worker was started"))
    kept = Dataset("kept", {"label": np.arange(COUNT)}, None, None, None)
    assert is_on_disk(pictures) and not is_on_disk(kept)
    for one, workers in ((pictures, 0), (kept, 4)):
        found = reader(one, 4, slice(0, 4), 0, workers)(2)
        np.testing.assert_array_equal(found["label"], batch_at(one, 2, 4, slice(0, 4), 0)["label"])
    with pytest.raises(UserError, match="data.workers -1 must be at least 0"):
        reader(pictures, 4, slice(0, 4), 0, -1)
