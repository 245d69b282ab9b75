import builtins
import re

import numpy as np
import pytest
from safetensors.numpy import save_file

from maskrl_jax import state_dict
from maskrl_jax.errors import UserError

STATE = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b.c": np.float32([1])}


def refused(path, message):
    with pytest.raises(UserError, match=f"^{re.escape(message)}") as error:
        state_dict.read(path)
    assert "\n" not in str(error.value)


def test_safetensors_are_read_by_name(tmp_path):
    save_file(STATE, tmp_path / "a.safetensors")
    found = state_dict.read(tmp_path / "a.safetensors")
    assert sorted(found) == ["a", "b.c"]
    np.testing.assert_array_equal(found["a"], STATE["a"])


def test_sum_is_that_of_the_file(tmp_path):
    (tmp_path / "empty").touch()
    # The SHA-256 of nothing.
    assert state_dict.sha256_of(tmp_path / "empty").startswith("e3b0c44298fc1c149afbf4c8996fb924")
    with pytest.raises(UserError, match="^cannot read /nowhere/x: No such file or directory$"):
        state_dict.sha256_of("/nowhere/x")


@pytest.mark.parametrize("name", ["a.safetensors", "nowhere.safetensors"])
def test_damaged_and_missing_files_are_refused(tmp_path, name):
    (tmp_path / "a.safetensors").write_bytes(b"garbage")
    refused(tmp_path / name, f"cannot read {tmp_path}/{name} as a state dict: ")


def test_a_missing_package_is_named_with_its_extra(tmp_path, monkeypatch):
    original = builtins.__import__

    def without_torch(name, *rest):
        if name == "torch":
            raise ModuleNotFoundError("No module named 'torch'", name="torch")
        return original(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without_torch)
    refused(tmp_path / "a.pth", f"reading {tmp_path}/a.pth needs torch: pip install 'maskrl_jax[convert]'")


@pytest.mark.parity
def test_torch_files_hold_tensors_alone(tmp_path):
    torch = pytest.importorskip("torch", reason="no torch (extra convert)")
    for options in ({}, {"_use_new_zipfile_serialization": False}):
        torch.save({name: torch.tensor(value) for name, value in STATE.items()}, tmp_path / "a.pth", **options)
        np.testing.assert_array_equal(state_dict.read(tmp_path / "a.pth")["a"], STATE["a"])
    torch.save({"state": {"a": torch.zeros(1)}}, tmp_path / "nested.pth")
    refused(tmp_path / "nested.pth", f"{tmp_path}/nested.pth is no plain state dict")
    torch.save(test_safetensors_are_read_by_name, tmp_path / "code.pth")
    refused(tmp_path / "code.pth", f"cannot read {tmp_path}/code.pth as a state dict: ")
