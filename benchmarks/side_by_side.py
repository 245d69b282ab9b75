"""The runs of a benchmark: what is missing is trained, one run or several at a time, and kept as soon as it ends."""

import contextlib
import pathlib
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent import futures
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent


class Runs:
    """Runs of maskrl_jax.main, `jobs` at a time; SIGTERM ends them with this command, and they save."""

    def __init__(self, jobs: int):
        self.jobs, self.running, self.stopped = jobs, [], False
        signal.signal(signal.SIGTERM, self._stop)

    def _stop(self, number: int, _) -> None:
        self.stopped = True  # a worker whose run ends now takes no other
        for run in self.running:
            run.terminate()
        sys.exit(128 + number)

    def train(self, config: str, workdir: pathlib.Path, store: str, changes: dict[str, Any]) -> pathlib.Path:
        """One run; what it prints goes to <workdir>.log where several run. CalledProcessError if it fails."""
        if self.stopped:
            raise futures.CancelledError
        command = [sys.executable, "-m", "maskrl_jax.main", f"--config={config}", f"--workdir={workdir}"]
        command += [f"--store={store}", *(f"--config.{key}={value}" for key, value in changes.items())]
        print(" ".join(command), flush=True)
        workdir.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as files:
            log = files.enter_context(open(f"{workdir}.log", "w")) if self.jobs > 1 else None
            run = files.enter_context(subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log and subprocess.STDOUT))
            self.running.append(run)
            if run.wait():
                raise subprocess.CalledProcessError(run.returncode, command)
        return workdir

    def all(self, trainings: dict[str, Callable[[], pathlib.Path]], keep: Callable[[str, pathlib.Path], None]) -> str:
        """Call `keep(name, workdir)` after every run; returns what to say of those that failed, or nothing."""
        failed = []
        with futures.ThreadPoolExecutor(self.jobs) as pool:
            runs = {pool.submit(training): name for name, training in trainings.items()}
            try:
                for run in futures.as_completed(runs):
                    if isinstance(run.exception(), subprocess.CalledProcessError):
                        failed.append(runs[run])
                        continue
                    keep(runs[run], run.result())
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        return f"error: failed: {'; '.join(failed)}; the same command tries them again" if failed else ""
