"""The training loop of every stage.

Order of one step: evaluate the state as it is, save it, take the next batch, update, log the previous update
(while the devices work on this one).
"""

import contextlib
import functools
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
from clu import parameter_overview
from ml_collections import ConfigDict

from maskrl_jax.checkpoint import Checkpoints
from maskrl_jax.errors import UserError
from maskrl_jax.interruption import Interruption
from maskrl_jax.parallel import Parallel
from maskrl_jax.writers import Profile, Progress, Writer, read_metrics

EVAL_TIME = "perf/eval_time"


def train(task: Any, config: ConfigDict, workdir: str, parallel: Parallel) -> Any:
    """Train a task to `config.num_steps`, from its newest checkpoint if there is one; return the last state.

    Leaves checkpoints, metrics, samples and the task's report in workdir. Raises UserError after
    `config.max_bad_steps` skipped updates in a row (0: never), and SystemExit after SIGTERM (143) and SIGINT
    (130), both with the state saved.
    """
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(Interruption())
        checkpoints = stack.enter_context(contextlib.closing(Checkpoints(workdir, parallel, config.keep)))
        state = task.init(jax.random.key(config.seed))
        start = checkpoints.latest() or 0
        if start:
            state = checkpoints.restore(state)
        size = parameter_overview.count_parameters(state.params)
        if jax.process_index() == 0:
            steps = f"step {start}/{config.num_steps}"
            print(f"{config.task}: {size / 1e6:.2f} M parameters, {steps}, {workdir}", flush=True)
        writer = stack.enter_context(contextlib.closing(Writer(workdir, start)))
        # An interrupted run may have evaluated this step just before it saved it.
        evaluated = any(line["step"] == start and EVAL_TIME in line for line in read_metrics(workdir))
        state = _run(task, config, workdir, checkpoints, writer, stop, state, start, start if evaluated else None)
    if task.report is not None:
        task.report(parallel.whole(state.ema))
    return state


def _run(task, config, workdir, checkpoints, writer, stop, state, start, evaluated):
    """Advance from step `start` to `config.num_steps`; `evaluated` is a step that needs no evaluation."""
    log = Log(writer, config.log_every, config.max_bad_steps, task.peak_seconds)
    with contextlib.ExitStack() as stack:
        progress = stack.enter_context(contextlib.closing(Progress(config.task, config.num_steps, start)))
        batches = stack.enter_context(contextlib.closing(Prefetch(task.batch, start, config.num_steps)))
        profile = stack.enter_context(contextlib.closing(Profile(workdir, config.profile_at)))
        for step in range(start, config.num_steps + 1):
            if _due(step, config.eval_every, config.num_steps) and step != evaluated:
                stop.attempt(functools.partial(_evaluate, task, writer, state, step))
            stopped = stop.requested()
            if stopped or (step > start and _due(step, config.save_every, config.num_steps)):
                log.flush()
                checkpoints.save(step, state)
            if stopped:
                print(f"{config.task}: stopped by a signal at step {step}; run it again to resume", flush=True)
                raise SystemExit(128 + stopped)
            if step == config.num_steps:
                return state
            profile.reach(step, state)
            began = time.monotonic()
            batch = batches.next()
            # The first step compiles, and compiling moves constants; no later one may move data unasked.
            with jax.transfer_guard("allow" if step == start else "disallow"):
                state, metrics = task.step(state, batch)
            # A copy, because the next step donates the state.
            log.add(step + 1, metrics, jnp.copy(state.bad_steps), began)
            progress.update(step + 1)


def _due(step, every, last):
    return step == last or (every > 0 and step % every == 0)


def _evaluate(task, writer, state, step):
    began = time.monotonic()
    scalars, pictures = task.evaluate(state, step)
    writer.images(step, pictures)
    # Last, since this line says on resume that the evaluation is complete.
    writer.scalars(step, {**scalars, EVAL_TIME: time.monotonic() - began})


class Prefetch:
    """Make the next batch in one background thread while the devices work on the last."""

    def __init__(self, batch: Any, start: int, stop: int):
        self._batch, self._step, self._stop = batch, start, stop
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="batch")
        self._ahead = self._submit()

    def _submit(self):
        return self._pool.submit(self._batch, self._step) if self._step < self._stop else None

    def next(self) -> Any:
        """Return the batch of the next step, and start on the one after."""
        ready, self._step = self._ahead, self._step + 1
        batch = ready.result()
        self._ahead = self._submit()
        return batch

    def close(self) -> None:
        """Drop what is not begun."""
        self._pool.shutdown(cancel_futures=True)


class Log:
    """Collect metrics on device and read them on the host once per `every` steps."""

    def __init__(self, writer: Writer, every: int, max_bad_steps: int, peak_seconds: float | None = None):
        self._writer, self._every, self._max_bad_steps = writer, every, max_bad_steps
        self._peak_seconds = peak_seconds
        self._step, self._pending, self._seconds = 0, [], 0.0

    def add(self, step: int, metrics: dict, bad_steps: jax.Array, began: float) -> None:
        """Take the metrics of the update to `step`; write the earlier ones if it is their time."""
        if self._pending:
            # At most one step ahead of the devices: an unbounded queue holds unbounded memory.
            jax.block_until_ready(self._pending[-1])
            if self._step % self._every == 0:
                self.flush()
        self._pending.append((metrics, bad_steps))
        self._step = step
        self._seconds += time.monotonic() - began

    def flush(self) -> None:
        """Write the mean of every metric over the steps collected; UserError after too many bad ones."""
        if not self._pending:
            return
        collected = jax.device_get(self._pending)
        means = _means([metrics for metrics, _ in collected])
        seconds = self._seconds / len(collected)
        speed = {"perf/step_time": seconds}
        if self._peak_seconds is not None:  # model FLOPs utilisation: known for chips with published figures
            speed["perf/mfu"] = self._peak_seconds / seconds
        self._writer.scalars(self._step, {**means, **speed})
        self._pending, self._seconds = [], 0.0
        bad = max(int(bad_steps) for _, bad_steps in collected)
        if self._max_bad_steps and bad >= self._max_bad_steps:
            raise UserError(
                f"{bad} updates in a row had a gradient that is not finite, up to step {self._step}; "
                "the last checkpoint is intact: lower optimizer.learning_rate, then run again"
            )


def _means(collected):
    """Divide sums by weights over several steps; plain numbers have weight 1; weight 0 is left out."""
    totals = {}
    for metrics in collected:
        for name, value in metrics.items():
            value, weight = value if isinstance(value, tuple) else (value, 1.0)
            total, weights = totals.get(name, (0.0, 0.0))
            totals[name] = (total + float(value), weights + float(weight))
    return {name: total / weight for name, (total, weight) in totals.items() if weight}
