"""What a run leaves to look at: TensorBoard events, metrics.jsonl, sample pictures, a profile, a progress bar."""

import json
import math
import os
import pathlib
import sys
import tempfile
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from maskrl_jax import paths

METRICS, EVENTS = "metrics.jsonl", "events"
PROFILE, PROFILED_STEPS = "profile", 3


class Writer:
    """Write scalars and pictures of a run into its workdir, from process 0 only.

    `start` is the step that the run resumes from: what an interrupted run wrote beyond it is dropped, since
    the same steps follow again.
    """

    def __init__(self, workdir: str, start: int = 0):
        self._active = jax.process_index() == 0
        self._workdir = workdir
        if not self._active:
            return
        # Imported here and below: it costs most of a second, and only a run that trains needs it.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        folder = epath.Path(workdir)
        folder.mkdir(parents=True, exist_ok=True)
        self._lines = _drop_after(folder / METRICS, start)
        again = any(path.name.startswith(EVENTS) for path in folder.iterdir())
        _events_in_buckets()
        # Not SummaryWriter: it hands events to a thread, and its flush does not wait for that thread.
        self._events = EventsWriter(os.path.join(workdir, EVENTS))
        if again:  # TensorBoard hides what an earlier file of the folder has from this step on
            restart = SessionLog(status=SessionLog.START)
            self._events.write_event(Event(wall_time=time.time(), step=start + 1, session_log=restart))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write named numbers; NaN and infinity become null in metrics.jsonl, which JSON has no word for."""
        if not self._active or not values:
            return
        from tensorboardX.summary import scalar

        values = {name: float(value) for name, value in values.items()}
        clean = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._append(json.dumps({"step": step, **clean}) + "\n")
        self._add(step, [scalar(name, value) for name, value in values.items()])

    def _append(self, line):
        path = os.path.join(self._workdir, METRICS)
        if paths.is_remote(path):  # an object of a bucket is written as a whole
            self._lines.append(line)
            paths.write(path, "".join(self._lines))
            return
        with open(path, "a") as file:
            file.write(line)

    def images(self, step: int, pictures: Mapping[str, np.ndarray]) -> None:
        """Write uint8 [H, W, 3] pictures as events and as PNG under samples/."""
        if not self._active or not pictures:
            return
        from tensorboardX.summary import image

        for name, picture in pictures.items():
            path = os.path.join(self._workdir, "samples", f"{name.removeprefix('samples/')}_{step:07d}.png")
            paths.write(path, paths.as_png(picture))
        self._add(step, [image(name, picture, dataformats="HWC") for name, picture in pictures.items()])

    def _add(self, step, summaries):
        from tensorboardX.proto.event_pb2 import Event

        for summary in summaries:
            self._events.write_event(Event(wall_time=time.time(), step=step, summary=summary))
        self._events.flush()

    def close(self) -> None:
        """Flush and release the event file."""
        if self._active:
            self._events.close()


def read_metrics(workdir: str | os.PathLike) -> list[dict]:
    """Return the lines of metrics.jsonl; a last line cut short by a kill is left out."""
    path = epath.Path(workdir, METRICS)
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n") and line.strip()]


def _drop_after(path, step):
    """Cut metrics.jsonl after a step; return its lines."""
    if not path.exists():
        return []
    kept = [json.dumps(line) + "\n" for line in read_metrics(path.parent) if line["step"] <= step]
    paths.write(path, "".join(kept))
    return kept


def _events_in_buckets():
    """Let tensorboardX write to buckets as everything else does, without a client library of its own."""
    from tensorboardX import record_writer

    for scheme in ("gs", "s3"):
        record_writer.register_writer_factory(scheme, _Bucket)


class _Bucket:
    """A file of events in a bucket, written anew with every flush."""

    def __init__(self, path):
        self._path, self._data = path, b""

    @classmethod
    def open(cls, path):
        return cls(path)

    @staticmethod
    def directory_check(path):
        """Nothing: a bucket has no folders."""

    def write(self, data):
        self._data += data

    def flush(self):
        paths.write(self._path, self._data)

    close = flush


class Progress:
    """Show how far a stage, or a measurement, is and how long it will take.

    A bar on a terminal; elsewhere a line every `every` seconds, so that a log file stays readable.
    """

    def __init__(self, name: str, total: int, start: int = 0, every: float = 15.0):
        self._name, self._total, self._every = name, total, every
        self._told = time.monotonic()
        self._first = None  # step and time of the first update: what comes before it compiles, and tells no pace
        self._bar = None
        self._active = jax.process_index() == 0
        if self._active and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, initial=start, desc=name, dynamic_ncols=True)

    def update(self, step: int) -> None:
        """Tell that `step` steps are done."""
        self._first = self._first or (step, time.monotonic())
        if self._bar is not None:
            self._bar.update(step - self._bar.n)
        elif self._active and time.monotonic() - self._told >= self._every:
            self._told = time.monotonic()
            print(f"{self._name}: {step}/{self._total}{self._left(step)}", flush=True)

    def _left(self, step):
        first, began = self._first
        if step == first:
            return ""
        seconds = round((time.monotonic() - began) / (step - first) * (self._total - step))
        return f", {seconds // 60}:{seconds % 60:02d} left"

    def close(self) -> None:
        """End the bar's line."""
        if self._bar is not None:
            self._bar.close()


class Profile:
    """Trace a few steps, from step `at` on, into `<workdir>/profile`, for TensorBoard's profiler; 0: none."""

    def __init__(self, workdir: str, at: int):
        self._folder, self._at, self._running = os.path.join(workdir, PROFILE), at, False
        self._local = tempfile.mkdtemp() if at and paths.is_remote(workdir) else self._folder

    def reach(self, step: int, state: Any) -> None:
        """Begin or end the trace if this step asks for it; waits for `state` at both ends."""
        if self._at and step in (self._at, self._at + PROFILED_STEPS):
            jax.block_until_ready(state)
            self.close()
            if step == self._at:
                jax.profiler.start_trace(self._local)
                self._running = True

    def close(self) -> None:
        """End the trace if it is running."""
        if self._running:
            jax.profiler.stop_trace()
            if self._local != self._folder:
                for path in filter(pathlib.Path.is_file, pathlib.Path(self._local).rglob("*")):
                    paths.write(os.path.join(self._folder, path.relative_to(self._local)), path.read_bytes())
        self._running = False
