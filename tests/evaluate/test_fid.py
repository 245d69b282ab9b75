"""The command as a user types it, on made-up weights."""

import json
import os
import subprocess
import sys

import hashed
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file
from typed import ROOT, SETTINGS

from maskrl_jax.convert.files import sha256_of
from maskrl_jax.evaluate import statistics
from maskrl_jax.evaluate.protocols import PROTOCOLS

pytestmark = pytest.mark.slow


def fid(*arguments):
    """Return (exit code, stdout, stderr); without a jackknife, whose every group costs seconds."""
    command = [sys.executable, "-m", "maskrl_jax.evaluate.fid", "--batch_size=6", "--groups=0", *arguments]
    done = subprocess.run(
        command, env={**os.environ, **SETTINGS}, cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with weights, an npz of 12 samples, and real pictures of two sizes."""
    root = tmp_path_factory.mktemp("fid")
    save_file(hashed.inception_state(), root / "weights.safetensors")
    np.savez(root / "samples.npz", hashed.images(12, 16, 16))
    (root / "real").mkdir()
    for index in range(5):
        Image.fromarray(hashed.images(1, 20 + index % 2, 24, seed=9 + index)[0]).save(root / "real" / f"{index}.png")
    return root


@pytest.fixture(scope="module")
def weights(made):
    file = made / "weights.safetensors"
    return f"--weights={file}", f"--weights_sha256={sha256_of(file)}"


def test_samples_against_real_pictures(made, weights):
    samples, saved, out = made / "samples.npz", made / "saved.npz", made / "result.json"
    code, printed, errors = fid(
        f"--samples={samples}", f"--reference={made / 'real'}", "--protocol=torch_fidelity",
        f"--save_statistics={saved}", f"--out={out}", *weights,
    )  # fmt: skip
    assert code == 0, errors
    result = json.loads(out.read_text())
    assert json.loads(printed) == result
    assert set(result["metrics"]) == {"fid", "inception_score"}
    assert result["metrics"]["fid"]["value"] > 1
    assert (result["samples"]["count"], result["reference"]["count"]) == (12, 5)
    assert result["protocol"]["name"] == "torch_fidelity" and result["protocol"]["resize"] == "bilinear_tf1"
    assert result["weights"]["published"] is False and result["weights"]["sha256"] in weights[1]
    assert any("12 samples" in remark for remark in result["remarks"])
    stored = statistics.read(str(saved), PROTOCOLS["adm"])
    assert (stored.count, stored.declared) == (12, True)


def test_a_mistake_is_one_line(made, weights):
    ready = {"samples": made / "samples.npz", "reference": made / "real", "protocol": "clean"}
    for wrong, message in (
        ({"protocol": "cleen"}, "error: unknown protocol 'cleen'; did you mean 'clean'?"),
        ({"samples": "/nowhere"}, "error: cannot read /nowhere as a folder or npz of images: "),
        ({"num_samples": 13}, f"error: --num_samples=13: {made}/samples.npz holds 12 images"),
        ({"out": "/nowhere/x.json"}, "error: --out /nowhere/x.json: there is no such folder"),
    ):
        code, _, errors = fid(*(f"--{name}={value}" for name, value in (ready | wrong).items()), *weights)
        assert code == 1 and errors.startswith(message) and errors.count("\n") == 1
    save_file({"a": np.zeros(3, np.float32)}, other := made / "other.safetensors")
    named = f"--weights={other}", f"--weights_sha256={sha256_of(other)}"
    code, _, errors = fid(*(f"--{name}={value}" for name, value in ready.items() if name != "protocol"), *named)
    assert code == 1 and errors.startswith(f"error: --weights {other}: the state lacks fc.weight; give the InceptionV3")
    code, _, errors = fid(f"--samples={made}", "--reference=x")
    assert code == 1 and "--weights" in errors and errors.count("\n") == 1
