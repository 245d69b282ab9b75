"""What the commands share, in a process of its own."""

import subprocess
import sys

INTERRUPTED = """
import os, signal, sys, time
from maskrl_jax import command

signal.signal(signal.SIGINT, signal.default_int_handler)  # also where a shell started the tests in the background

def work(path):
    with open(path, "w") as file:
        file.write("half of a report")
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(10)

command.run(work, arguments=1)
"""


def test_ctrl_c_is_one_line_and_exit_130_and_what_is_written_stays(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, str(tmp_path / "report.md")], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "stopped; what is written stays\n")
    assert (tmp_path / "report.md").read_text() == "half of a report"


def test_a_bucket_without_its_driver_is_one_line(tmp_path):
    program = (
        "from etils import epath; from maskrl_jax import command; command.run(lambda: epath.Path('s3://b/x').exists())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (1, "error: Install s3fs to access S3\n")
