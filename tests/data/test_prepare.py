import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from maskrl_jax.data import shapes
from maskrl_jax.errors import UserError

WRITE = (
    "import sys; from maskrl_jax.data import shapes\n"
    "shapes.SPLIT_SIZES = {{'train': {n}, 'validation': 8}}\n"
    "print(len(shapes.load('train', sys.argv[1])['image']))"
)


def write(data_dir, n):
    command = [sys.executable, "-c", WRITE.format(n=n), str(data_dir)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process):
    out, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    return out.strip().splitlines()[-1]


def test_two_processes_at_once_write_one_whole_set(tmp_path):
    writers = [write(tmp_path, 300) for _ in range(2)]
    assert [finish(process) for process in writers] == ["300", "300"]
    assert [path.name for path in (tmp_path / "shapes").iterdir()] == ["1.0.0"]


def test_a_killed_writer_leaves_nothing_that_disturbs_the_next(tmp_path):
    killed = write(tmp_path, 10**9)
    deadline = time.monotonic() + 60
    while not list(Path(tmp_path).glob("shapes/incomplete.*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert list(Path(tmp_path).glob("shapes/incomplete.*")), "the writer was killed before it began"
    assert finish(write(tmp_path, 20)) == "20"
    assert [path.name for path in (tmp_path / "shapes").iterdir()] == ["1.0.0"]


def test_a_directory_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot prepare data set 'shapes' in"):
        shapes.load("train", str(tmp_path / "file"))


@pytest.mark.parametrize("file", ["shapes-train.array_record*", "dataset_info.json"])
@pytest.mark.parametrize("length", [50, None])  # cut to so many bytes; gone
def test_damaged_files_are_named_with_what_to_do(tmp_path, monkeypatch, file, length):
    monkeypatch.setattr(shapes, "SPLIT_SIZES", {"train": 20, "validation": 8})
    shapes.load("train", str(tmp_path))
    shapes.load.cache_clear()
    (path,) = (tmp_path / "shapes").rglob(file)
    path.unlink() if length is None else os.truncate(path, length)
    with pytest.raises(UserError, match=r"'shapes' in .*shapes.* is damaged \(.*\); delete that folder") as error:
        shapes.load("train", str(tmp_path))
    assert "\n" not in str(error.value)
