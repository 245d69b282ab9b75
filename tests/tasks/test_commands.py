"""`sample` and `evaluate` on the tiny run: as a user types them, and in this process where only flags differ."""

import pathlib

import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from PIL import Image
from typed import ROOT, typed

from maskrl_jax import sample as sample_command
from maskrl_jax.errors import UserError

PROMPT = "a red circle left of a blue square"


@pytest.fixture
def sample(trained, one_device, tmp_path, capsys):
    """Sample from the tiny run in this process: sample(*flags) -> what it printed; pictures go to tmp_path."""

    def sample(*arguments):
        with flagsaver.flagsaver(), one_device():
            flags.FLAGS(["sample", f"--workdir={trained.workdir}", f"--out={tmp_path / 'grid.png'}", *arguments])
            sample_command.main()
        return capsys.readouterr().out

    return sample


def test_sample_draws_a_row_for_each_prompt_and_the_order(sample, tmp_path):
    prompts = [f"--prompt={PROMPT}", "--prompt=a green cross"]
    out = sample(*prompts, "--num_images=3", f"--order={tmp_path / 'order.png'}")
    assert "tuned policy at dial 0, parameters of configs/speed_rl.py:smoke" in out and f"{PROMPT}: " in out
    wide, high = Image.open(tmp_path / "grid.png").size
    assert 1.4 < wide / high < 1.6  # three pictures beside each other, two rows
    assert Image.open(tmp_path / "order.png").size[0] > 300


def test_any_number_of_images_goes_on_any_number_of_devices(trained, tmp_path, capsys):
    with flagsaver.flagsaver():  # eight devices
        flags.FLAGS(["sample", f"--workdir={trained.workdir}", f"--out={tmp_path / 'grid.png'}", "--num_images=3"])
        sample_command.main()
    assert capsys.readouterr().out.count("network calls an image") == 4


def test_sample_inpaints_with_a_fixed_sampler(sample, tmp_path):
    Image.fromarray(np.full((32, 32, 3), 200, np.uint8)).save(tmp_path / "photo.png")
    files = [f"--image={tmp_path / 'photo.png'}", f"--order={tmp_path / 'order.png'}"]
    out = sample(*files, "--box=0,16,32,32", "--num_images=2", "--num_steps=2", f"--prompt={PROMPT}")
    assert "fixed sampler: confidence, 2 steps at most" in out and "2.0 network calls an image" in out


def test_sample_takes_any_setting_of_the_sampler(sample, tmp_path):
    """The sampler of Lumina-DiMOO, whose second step of 12 reveals nothing; one that halves the factors' end."""
    asked = ["--num_images=2", "--seed=3", f"--prompt={PROMPT}"]
    named = "--set=num_steps=12 --set=schedule=floored-cosine --set=last_gumbel=1 --set=plain_confidence=True"
    out = sample(*asked, "--gumbel=1", *named.split())
    assert "fixed sampler: confidence, 12 steps at most, Gumbel 1," in out and "12.0 network calls" in out
    grids = []
    for factors in ("1,1", "1,0.01"):
        sample(*asked, "--num_steps=4", "--set=timesteps=countdown", f"--set=factors={factors}")
        grids.append(np.asarray(Image.open(tmp_path / "grid.png")))
    assert (grids[0] != grids[1]).any()


def test_help_lists_every_setting():
    listed = flags.FLAGS["set"].help
    for name in (
        "factors=1.0,1.0",
        "entropy_filtering=False",
        "timesteps=clock",
        "noise_ends=after",
        "inner_steps=100",
    ):
        assert name in listed


@pytest.mark.parametrize("name", ["grid.pgn", "grid", "grid.xbm"])
def test_an_ending_that_no_picture_has_is_refused_before_anything_is_opened(tmp_path, name):
    with flagsaver.flagsaver(), pytest.raises(UserError, match="no picture can be written under this ending"):
        flags.FLAGS(["sample", "--workdir=/nowhere", f"--out={tmp_path / name}"])
        sample_command.main()


@pytest.mark.parametrize("flag", ["out", "order"])
def test_a_folder_that_is_not_there_is_named_before_anything_is_opened(tmp_path, flag):
    file = tmp_path / "none" / "x.png"
    message = f"{tmp_path / 'none'}, the folder of --{flag} {file}; make it"
    with flagsaver.flagsaver(), pytest.raises(UserError, match=message):
        flags.FLAGS(["sample", "--workdir=/nowhere", f"--out={tmp_path / 'x.png'}", f"--{flag}={file}"])
        sample_command.main()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt=a purple circle"], "unknown word 'purple'"),
        (["--num_steps=999"], "--num_steps=999 must lie in 1..16"),
        (["--mode=threshold", "--threshold=5"], "threshold 5.0 of mode threshold is a probability"),
        (["--full_steps=2"], "--full_steps is for a run of a shortcut stage"),
        (["--num_steps=4", "--dial=1"], "--dial is for a tuned policy alone"),
        (["--image=/nowhere.png"], "--image and --box belong together"),
        (["--image=/nowhere.png", "--box=0,0,8,8"], "cannot read --image /nowhere.png"),
        (["--image=docs/samples.png", "--box=0,0,8,8"], "pixels; this model makes 32 x 32"),
        (["--set=gumbell=1"], "unknown setting of the sampler 'gumbell'; did you mean 'gumbel'?"),
        (["--set=gumbel"], "--set gumbel must be name=value"),
        (["--set=gumbel=much"], "--set gumbel=much must be a number"),
        (["--set=temperature=nan"], "--set temperature=nan must be a number"),
        (["--set=num_steps=2.5"], "--set num_steps=2.5 must be a whole number"),
        (["--set=entropy_filtering=1"], "--set entropy_filtering=1 must be true or false"),
        (["--set=factors=1"], "--set factors=1 must be two numbers, such as 1,0.5"),
        (["--set=gumbel=1", "--set=gumbel=2"], "--set gumbel is given twice"),
        (["--set=gumbel=1", "--gumbel=2"], "--gumbel and --set gumbel are one setting"),
        (["--set=timesteps=sundial"], "timesteps 'sundial' is not one of clock, countdown"),
        (["--set=num_steps=999"], "--num_steps=999 must lie in 1..16"),
        (["--image={photo}", "--box=0,0,8,64"], "must be top,left,bottom,right with 0 <= top < bottom <= 32"),
    ],
)
def test_sample_refuses_what_cannot_be(sample, tmp_path, arguments, message):
    photo = tmp_path / "photo.png"
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(photo)
    arguments = [argument.replace("docs", f"{ROOT}/docs").format(photo=photo) for argument in arguments]
    with pytest.raises((UserError, ValueError)) as error:
        sample(*arguments)
    assert message in str(error.value) and not (tmp_path / "grid.png").exists()


@pytest.mark.slow
def test_a_mistake_is_one_line_and_so_is_a_warning(trained, tmp_path):
    grid = f"--out={tmp_path / 'grid.png'}"
    code, _, errors = typed("sample", trained.workdir, grid, "--num_steps=0")
    assert (code, errors.count("\n")) == (1, 1) and errors.startswith("error: --num_steps=0 must lie in 1..16")
    code, _, errors = typed("sample", trained.workdir, f"--out={tmp_path / 'nowhere' / 'grid.png'}", "--num_images=1")
    assert code == 1 and errors.startswith("error: No such file or directory: ") and errors.count("\n") == 1
    code, _, errors = typed("sample", trained.workdir, grid, f"--prompt={PROMPT} {PROMPT}", "--num_images=1")
    assert (code, errors) == (0, f"warning: prompt '{PROMPT} {PROMPT}' has 14 words; cut to 8\n")


@pytest.mark.slow
def test_evaluate_measures_into_a_folder_of_its_own(trained, tmp_path):
    before = (pathlib.Path(trained.workdir) / "report.md").read_text()
    code, _, errors = typed("evaluate", trained.workdir, "--dials=0,1", "--seed=17", f"--out={tmp_path / 'again'}")
    assert code == 0, errors
    assert "8 prompts × 2 samples" in (tmp_path / "again" / "report.md").read_text()
    assert (pathlib.Path(trained.workdir) / "report.md").read_text() == before
    code, _, errors = typed("evaluate", trained.workdir, f"--out={tmp_path / 'again'}")
    assert code == 1 and "exists already; name a new folder" in errors


def test_a_workdir_without_a_run_is_named(tmp_path):
    code, _, errors = typed("evaluate", tmp_path)
    assert (code, errors) == (1, f"error: {tmp_path} has no config.json; give the --workdir of a run\n")
