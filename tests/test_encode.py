"""The command that encodes a set: killed and started again, shared by jobs, and what it refuses."""

import pathlib
import subprocess
import sys

import jax
import pytest
import tiny

from benchmarks.kill_encode import contents, kill_and_resume
from maskrl_jax import runner
from maskrl_jax.checkpoint import load_params
from maskrl_jax.data import encoded
from maskrl_jax.tasks import encoding, tokenizer
from maskrl_jax.tasks.task import Parent


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """Flags that encode digits by a tokenizer that nobody trained, in shards and batches that do not fit each other."""
    root = tmp_path_factory.mktemp("encode")
    config = tiny.tokenizer("digits-smoke")
    state = jax.jit(tokenizer.Wiring(config).init)(jax.random.key(0))
    runner.keep(config, str(root / "tokenizer"), str(root / "store"), {}, state.params, state.extra)
    flags = [f"--tokenizer={root / 'tokenizer'}", f"--store={root / 'store'}", "--shard_size=70", "--batch_size=16"]
    return flags


@pytest.fixture(scope="module")
def made(command, tmp_path_factory):
    """A folder that has begun to be filled."""
    folder = str(tmp_path_factory.mktemp("made"))
    fields = (("index", "<i8", ()), ("cond", "<i4", ()), ("label", "<i4", ()), ("tokens", "<u2", (16,)))
    config, (parent, *_) = tiny.tokenizer("digits-smoke"), command
    tokens = Parent(config, *load_params(parent.partition("=")[2]), "")
    encoded.begin(folder, encoded.Manifest(encoding.identity(tokens), "digits", "train", 32, 1500, 70, fields))
    return folder


def answer(*arguments):
    command = [sys.executable, "-m", "maskrl_jax.encode", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=pathlib.Path(__file__).parent.parent)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.slow
def test_killed_and_started_again_it_ends_in_the_same_files(command, tmp_path):
    equal, hits = kill_and_resume(command, str(tmp_path), kills=3, seed=1)
    assert equal and hits
    names = sorted(contents(str(tmp_path / "killed")))
    assert names == [*(f"train-{i:05d}-of-00022.array_record" for i in range(22)), "train.json"]


@pytest.mark.slow
def test_jobs_share_the_shards_and_the_last_one_checks_them(command, tmp_path):
    out = f"--out={tmp_path / 'shared'}"
    code, told, errors = answer(*command, out, "--jobs=2", "--job=1")
    assert code == 0 and "11 of 22 shards are for other jobs" in told, errors
    code, told, errors = answer(*command, out, "--jobs=2", "--job=0")
    assert code == 0 and "1500 samples in 22 shards, each once" in told, errors
    manifest = encoded.read_manifest(str(tmp_path / "shared"), "train")
    whole = encoded.Shards(str(tmp_path / "shared"), manifest).columns()
    assert len(whole["tokens"]) == 1500 and whole["tokens"][0].shape == (16,)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--shard_size=80", "--out={made}"],
            "holds shards of another shard_size (70, not 80); give what it was begun with",
        ),
        (["--tokenizer={made}", "--out={made}"], "is no finished run; run its training command first"),
        (["--jobs=2", "--job=2", "--out={made}"], "--job=2 is not one of --jobs=2; they count from 0"),
        (["--out="], "--out is empty; name the folder of the shards"),
        (["--out=gs://bucket/made"], "--out=gs://bucket/made lies in a bucket; shards are written to a local folder"),
        (["--data=nothing", "--out={made}"], "unknown data set 'nothing'"),
        (["--dtype=float16", "--out={made}"], "--dtype=float16 is of moments, and "),
    ],
)
def test_a_mistake_is_one_line_and_exit_1(command, made, arguments, message):
    code, _, errors = answer(*command, *(argument.format(made=made) for argument in arguments))
    assert code == 1 and errors.startswith("error: ") and errors.count("\n") == 1
    assert message in errors
