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


LIBRARY = """
from maskrl_jax import command

def work():
    try:
        import no_such_driver
    except ImportError as error:
        raise ImportError("Please install no_such_driver") from error

command.run(work)
"""


def test_a_library_that_wants_another_one_says_so_in_one_line():
    done = subprocess.run([sys.executable, "-c", LIBRARY], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr == "error: Please install no_such_driver (No module named 'no_such_driver')\n"


def test_a_failing_import_of_our_own_keeps_its_traceback():
    program = "from maskrl_jax import command; command.run(lambda: __import__('maskrl_jax.no_such_room'))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "Traceback" in done.stderr
