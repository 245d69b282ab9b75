"""The command line in processes of its own: errors in one line, signals, several processes, kills."""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from benchmarks import kill_processes
from benchmarks.kill_resume import kill_and_resume
from maskrl_jax import stored
from maskrl_jax.checkpoint import load_params
from maskrl_jax.writers import read_metrics

HERE = pathlib.Path(__file__).parent
CLUSTER = ["--coordinator_address=localhost:7000"]
COMMAND = [sys.executable, str(HERE / "toy_main.py")]


def start(*arguments, devices=2):
    return subprocess.Popen(
        [*COMMAND, *arguments],
        env={**os.environ, "TOY_DEVICES": str(devices)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def toy(tmp_path, name, *arguments, argument=""):
    config = f"--config={HERE / 'toy_task.py'}{argument}"
    return [config, f"--workdir={tmp_path / name}", f"--store={tmp_path / 'store'}", *arguments]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected --config=<file>"),
        (["--config=configs/nothing.py"], "No such file"),
        (["--config={toy}", "--config.model.widht=8"], 'Did you mean "width"'),
        (["--config={toy}", "--config.model.depth=8"], "the config has no key 'depth'"),
        (["--config={toy}", "--config.task=tokeniser"], "did you mean 'tokenizer'"),
        (["--config={toy}", "--config.seed=x"], "seed"),
    ],
)
def test_a_mistake_is_one_line_and_exit_1(arguments, message):
    process = start(*(argument.format(toy=HERE / "toy_task.py") for argument in arguments))
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert message in errors and errors.startswith("error: ") and errors.count("\n") == 1


def test_a_dry_run_prints_its_table_trains_nothing_and_exits_0(tmp_path):
    process = start(*toy(tmp_path, "dry", "--dry_run"))
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "dry run: toy" in output and "peak memory" in output
    assert not errors and not (tmp_path / "dry").exists()


def test_importing_starts_no_device_and_no_tensorflow():
    code = (
        "import sys, maskrl_jax.main, maskrl_jax.runner, jax\n"
        "assert not jax._src.xla_bridge.backends_are_initialized()\n"
        "assert not {'tensorflow', 'tensorflow_datasets', 'tensorboardX', 'matplotlib'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=HERE.parent)


def test_sigterm_saves_and_exits_143_and_the_same_command_resumes(tmp_path):
    arguments = toy(tmp_path, "a", "--config.num_steps=30", "--config.data.slow=0.1", "--config.save_every=1000")
    process = start(*arguments)
    while not (tmp_path / "a" / "metrics.jsonl").exists():  # written at step 2
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 143, errors
    assert "run it again to resume" in out
    process = start(*arguments)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert "step 0/30" not in out and stored.is_finished(str(tmp_path / "a"))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["pmap", "sharded"])
def test_two_processes_equal_one(tmp_path, strategy):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    arguments = toy(tmp_path, "two", f"--config.parallel={strategy}", argument=":child")
    cluster = ["--distributed", f"--coordinator_address=localhost:{port}", "--num_processes=2"]
    processes = [start(*arguments, *cluster, f"--process_id={i}") for i in range(2)]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    alone = start(*toy(tmp_path, "one", argument=":child"), devices=1)
    _, errors = alone.communicate(timeout=60)
    assert alone.returncode == 0, errors
    pair = zip(*(jax.tree.leaves(load_params(str(tmp_path / name))) for name in ("one", "two")), strict=True)
    for one, two in pair:
        np.testing.assert_allclose(one, two, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_kills_at_random_moments_do_not_change_the_result(tmp_path):
    settings = ["--config.num_steps=60", "--config.save_every=3", "--config.data.slow=0.02"]
    command = [*COMMAND, f"--config={HERE / 'toy_task.py'}", f"--store={tmp_path / 'store'}", *settings]
    equal, hits = kill_and_resume(command, str(tmp_path), kills=3, seed=0)
    assert equal and hits > 0


@pytest.mark.slow
def test_when_one_of_two_processes_is_stopped_all_end_and_the_same_command_resumes(tmp_path):
    """SIGTERM saves one step in both; kill -9 of process 0, the coordinator, is what the other tells as exit code 42."""
    settings = ["--config.num_steps=40", "--config.save_every=4", "--config.data.slow=0.1"]
    command = [*COMMAND, f"--config={HERE / 'toy_task.py'}", f"--store={tmp_path / 'store'}", *settings]
    again, seen = [*command, f"--workdir={tmp_path / 'stopped'}"], []
    for i, (number, victim) in enumerate([(signal.SIGTERM, 1), (signal.SIGKILL, 0)]):
        processes = kill_processes.start(again, tmp_path / f"log{i}")
        _beyond(tmp_path / "stopped", 4 + 16 * i, processes)
        codes, seconds = kill_processes.stop_one(processes, number, victim, after=0)
        seen.append(codes)
        assert seconds < kill_processes.LIMIT
    assert seen == [[143, 143], [-signal.SIGKILL, 42]]
    assert "process 1 of 2 lost another one" in (tmp_path / "log1.1").read_text()
    kill_processes.finish(again, tmp_path / "resumed")
    kill_processes.finish([*command, f"--workdir={tmp_path / 'straight'}"], tmp_path / "straight.log")
    assert "process 0 of 2, 2 devices of 4" in (tmp_path / "straight.log.0").read_text()
    assert kill_processes.difference(str(tmp_path / "stopped"), str(tmp_path / "straight")) == 0


def _beyond(workdir, step, processes):
    """Wait until a run has logged a step."""
    while not any(line["step"] >= step for line in read_metrics(str(workdir))):
        assert all(process.poll() is None for process in processes)
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num_processes=2"], "--num_processes without --distributed"),
        (["--distributed", "--process_id=1"], "--coordinator_address, --num_processes missing"),
        (["--distributed", *CLUSTER, "--num_processes=2", "--process_id=2"], "--process_id=2 is not one of"),
        (["--distributed", "--coordinator_address=here", "--num_processes=1", "--process_id=0"], "is not host:port"),
    ],
)
def test_flags_of_a_cluster_that_disagree_are_a_mistake(arguments, message):
    process = start(f"--config={HERE / 'toy_task.py'}", *arguments)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert message in errors and errors.startswith("error: ") and errors.count("\n") == 1


def test_processes_that_do_not_come_are_counted(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    flags = ["--distributed", f"--coordinator_address={address}", "--num_processes=3", "--startup_timeout=2"]
    process = start(*toy(tmp_path, "alone", *flags, "--process_id=0"))
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 42
    assert "waited 2 s for 2 of 3 processes, which are missing" in errors
