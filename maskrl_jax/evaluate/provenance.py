"""Where a number comes from: the commit, the command and the machine that it was made with."""

import os
import pathlib
import platform
import re
import shlex
import subprocess
import sys

import jax

STAMP = pathlib.Path(__file__).parents[1] / "commit.txt"  # git puts the commit in as it makes an archive


def commit_hash(folder: str | pathlib.Path) -> str:
    """Return the git commit of a folder, "-dirty" added where files differ.

    Where its repository has not this library, it is that of the archive that the library came in (git archive), or
    "unknown".
    """

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", str(STAMP))
        return git("rev-parse", "--short=12", "HEAD") + ("-dirty" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        archived = STAMP.read_text().strip() if STAMP.exists() else ""
        return archived[:12] if re.fullmatch("[0-9a-f]{40}", archived) else "unknown"


def command() -> str:
    """Return the command line of this process, as one would type it."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    program = ["-m", spec.name.removesuffix(".__main__")] if spec else sys.argv[:1]
    return shlex.join(["python", *program, *sys.argv[1:]])


def machine() -> str:
    """Return processor kind, the number of cores that this process may use, and the accelerators where there are."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cores = f"{platform.system()} {platform.machine()}, {usable} usable cores of {os.cpu_count()}"
    devices = jax.devices()
    return cores if devices[0].platform == "cpu" else f"{cores}, {len(devices)} x {devices[0].device_kind}"
