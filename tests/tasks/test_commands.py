"""`sample` and `evaluate` as a user types them, on the tiny run."""

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

SETTINGS = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "JAX_NUM_CPU_DEVICES": "1"}  # quick to compile, as conftest
ROOT = pathlib.Path(__file__).parent.parent.parent
PROMPT = "a red circle left of a blue square"


@pytest.fixture
def command(trained):
    """Run a command on the tiny run, or on another workdir: command(module, *flags) -> (exit code, stdout, stderr)."""

    def command(module, *arguments, workdir=None):
        done = subprocess.run(
            [sys.executable, "-m", f"maskrl_jax.{module}", f"--workdir={workdir or trained.workdir}", *arguments],
            env={**os.environ, **SETTINGS},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=300,
        )
        return done.returncode, done.stdout, done.stderr

    return command


def succeeds(result):
    code, out, errors = result
    assert code == 0, errors
    return out


@pytest.mark.slow
def test_sample_draws_a_row_for_each_prompt_and_the_order(command, tmp_path):
    files = [f"--out={tmp_path / 'grid.png'}", f"--order={tmp_path / 'order.png'}"]
    prompts = [f"--prompt={PROMPT}", "--prompt=a green cross"]
    out = succeeds(command("sample", *prompts, "--num_images=3", *files))
    assert "tuned policy at dial 0, parameters of configs/speed_rl.py:smoke" in out and f"{PROMPT}: " in out
    wide, high = Image.open(tmp_path / "grid.png").size
    assert 1.4 < wide / high < 1.6  # three pictures beside each other, two rows
    assert Image.open(tmp_path / "order.png").size[0] > 300


@pytest.mark.slow
def test_sample_keeps_what_is_outside_the_box(command, tmp_path):
    """Tokens of 8 pixels: the box covers the right half; the left comes back as the tokenizer sees it."""
    picture = np.full((32, 32, 3), 200, np.uint8)
    Image.fromarray(picture).save(tmp_path / "photo.png")
    files = [f"--image={tmp_path / 'photo.png'}", f"--out={tmp_path / 'grid.png'}", f"--order={tmp_path / 'order.png'}"]
    out = succeeds(
        command("sample", *files, "--box=0,16,32,32", "--num_images=2", "--num_steps=2", f"--prompt={PROMPT}")
    )
    assert "fixed sampler: confidence, 2 steps at most" in out and "2.0 network calls an image" in out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt=a purple circle"], "unknown word 'purple'"),
        (["--num_steps=999"], "--num_steps=999 must lie in 1..16"),
        (["--mode=threshold", "--threshold=5"], "threshold 5.0 of mode threshold is a probability"),
        (["--num_steps=4", "--dial=1"], "--dial is for a tuned policy alone"),
        (["--image=/nowhere.png"], "--image and --box belong together"),
        (["--image=/nowhere.png", "--box=0,0,8,8"], "cannot read --image /nowhere.png"),
        (["--image=docs/samples.png", "--box=0,0,8,8"], "pixels; this model makes 32 x 32"),
        (["--image={photo}", "--box=0,0,8,64"], "must be top,left,bottom,right with 0 <= top < bottom <= 32"),
    ],
)
def test_sample_refuses_in_one_line(command, tmp_path, arguments, message):
    photo = tmp_path / "photo.png"
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(photo)
    arguments = [argument.format(photo=photo) for argument in arguments]
    code, _, errors = command("sample", f"--out={tmp_path / 'grid.png'}", *arguments)
    assert code == 1 and errors.startswith("error: ") and errors.count("\n") == 1
    assert message in errors and not (tmp_path / "grid.png").exists()


@pytest.mark.slow
def test_a_prompt_that_is_too_long_is_cut_with_one_line(command, tmp_path):
    code, _, errors = command("sample", f"--prompt={PROMPT} {PROMPT}", "--num_images=1", f"--out={tmp_path / 'a.png'}")
    assert (code, errors) == (0, f"warning: prompt '{PROMPT} {PROMPT}' has 14 words; cut to 8\n")


@pytest.mark.slow
def test_evaluate_measures_into_a_folder_of_its_own(command, trained, tmp_path):
    before = (pathlib.Path(trained.workdir) / "report.md").read_text()
    quick = ["--prompts=4", "--group=2", "--dials=0,1", "--steps=2,4"]
    succeeds(command("evaluate", *quick, f"--out={tmp_path / 'again'}"))
    report = (tmp_path / "again" / "report.md").read_text()
    assert "4 prompts × 2 samples" in report
    assert (pathlib.Path(trained.workdir) / "report.md").read_text() == before
    code, _, errors = command("evaluate", *quick, f"--out={tmp_path / 'again'}")
    assert code == 1 and "exists already; name a new folder" in errors


def test_commands_without_a_run_say_so(command, tmp_path):
    for module in ("sample", "evaluate"):
        code, _, errors = command(module, workdir=tmp_path)
        assert (code, errors) == (1, f"error: {tmp_path} has no config.json; give the --workdir of a run\n")
