"""Files of weights: every kind gives the same state dict, and what is no file of weights is refused in one line."""

import json
import re
import sys

import ml_dtypes
import numpy as np
import pytest
from flax import serialization
from safetensors.numpy import save_file

from maskrl_jax.convert import files
from maskrl_jax.errors import UserError

STATE = {
    "a.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "a.bias": np.array([0.5, -2.0, 1e-3], ml_dtypes.bfloat16),
    "b": np.array(7, np.int64),
}


def same(found, expected=STATE):
    assert list(sorted(found)) == sorted(expected)
    for name, array in expected.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
        assert found[name].tobytes() == array.tobytes()


def refused(message, *arguments, call=files.read):
    with pytest.raises(UserError, match=message):
        call(*arguments)


def test_safetensors_there_and_back(tmp_path):
    path = str(tmp_path / "deep" / "model.safetensors")
    files.write(path, STATE)
    same(files.read(path))
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["model.safetensors"]


def test_transposed_arrays_are_written_as_they_are_seen(tmp_path):
    path = str(tmp_path / "model.safetensors")
    files.write(path, {"x": STATE["a.weight"].T})
    np.testing.assert_array_equal(files.read(path)["x"], STATE["a.weight"].T)


def test_only_safetensors_are_written(tmp_path):
    refused("let its name end so", str(tmp_path / "model.pth"), STATE, call=files.write)


def sharded(folder):
    save_file({"a.weight": STATE["a.weight"]}, folder / "model-1.safetensors")
    save_file({name: STATE[name] for name in ("a.bias", "b")}, folder / "model-2.safetensors")
    save_file({"another": STATE["b"]}, folder / "other.safetensors")
    weights = {"a.weight": "model-1.safetensors", "a.bias": "model-2.safetensors", "b": "model-2.safetensors"}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weights}))
    return index


def test_shards_are_those_of_the_index(tmp_path):
    sharded(tmp_path)
    same(files.read(str(tmp_path)))
    same(dict(files.stream(files.shards(str(tmp_path)))))


def test_headers_tell_all_shapes(tmp_path):
    sharded(tmp_path)
    found = files.shapes(files.shards(str(tmp_path)))
    assert {name: (file.name, shape) for name, (file, shape) in found.items()} == {
        "a.weight": ("model-1.safetensors", (2, 3)),
        "a.bias": ("model-2.safetensors", (3,)),
        "b": ("model-2.safetensors", ()),
    }


def test_a_folder_without_an_index_is_all_its_files(tmp_path):
    sharded(tmp_path).unlink()
    assert sorted(files.read(str(tmp_path))) == ["a.bias", "a.weight", "another", "b"]


def test_broken_folders_are_refused(tmp_path):
    refused(r"holds no \*.safetensors$", str(tmp_path))
    index = sharded(tmp_path)
    (tmp_path / "model-2.safetensors").unlink()
    refused("there is no .*model-2.safetensors$", str(tmp_path))
    index.write_text(json.dumps({"weight_map": {"a": "../model.safetensors"}}))
    refused("names files of other folders", str(tmp_path))
    index.write_text("{}")
    refused("index.json holds no weight_map$", str(tmp_path))
    (tmp_path / "other.safetensors.index.json").write_text("{}")
    refused("has 2 indices of shards; give the folder of one model$", str(tmp_path))


def test_variants_beside_the_weights_are_passed_over(tmp_path):
    sharded(tmp_path)
    assert [file.name for file in files.shards(tmp_path, "other")] == ["other.safetensors"]
    refused("holds no fp16.safetensors$", tmp_path, "fp16", call=files.shards)


def test_a_name_in_two_shards_is_refused(tmp_path):
    for name in ("one", "two"):
        save_file({"x": STATE["b"]}, tmp_path / f"{name}.safetensors")
    refused("x is both in .*one.safetensors and in .*two.safetensors", files.shards(str(tmp_path)), call=files.shapes)
    refused("x is both in ", str(tmp_path))


def test_npz_without_objects(tmp_path):
    plain = {name: array for name, array in STATE.items() if name != "a.bias"}
    np.savez(tmp_path / "state.npz", **plain)
    same(files.read(str(tmp_path / "state.npz")), plain)
    np.savez(tmp_path / "objects.npz", x=np.array([{}], object))
    refused("objects.npz holds objects, or is damaged", str(tmp_path / "objects.npz"))
    (tmp_path / "garbage.npz").write_bytes(b"garbage" * 9)
    refused("garbage.npz is no npz, or is cut short; copy it again$", str(tmp_path / "garbage.npz"))
    whole = (tmp_path / "state.npz").read_bytes()
    (tmp_path / "short.npz").write_bytes(whole[:-30])
    refused("short.npz is no npz, or is cut short", str(tmp_path / "short.npz"))


def test_msgpack_has_slashes_and_needs_no_ending(tmp_path):
    tree = {"params": {"layer": {"kernel": STATE["a.weight"]}}, "step": 3}
    path = tmp_path / "maskgit_checkpoint"
    path.write_bytes(serialization.msgpack_serialize(tree))
    same(files.read(str(path)), {"params/layer/kernel": STATE["a.weight"]})


@pytest.mark.parametrize("name", ["x.safetensors", "x.npz", "x"])
def test_damaged_files_are_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x93 this is nothing")
    refused(re.escape(str(tmp_path / name)), str(tmp_path / name))


def test_files_cut_short_and_types_that_numpy_lacks_are_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    files.write(str(path), STATE)
    path.write_bytes(path.read_bytes()[:-1])
    refused("x.safetensors cannot be read as safetensors", str(path))
    header = json.dumps({"x": {"dtype": "F8_E4M3", "shape": [2], "data_offsets": [0, 2]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(2))
    refused("x.safetensors cannot be read as safetensors.*float8", str(path))


@pytest.mark.parametrize(
    ("text", "message"), [("{", "cannot be read as JSON"), ("[]", "holds no JSON object$"), (None, "No such file")]
)
def test_settings_are_a_json_object(tmp_path, text, message):
    path = tmp_path / "config.json"
    if text:
        path.write_text(text)
    refused(f"^{re.escape(str(path))} .*{message}", path, call=files.json_object)


def test_missing_files_and_needless_entries(tmp_path):
    refused("there is no .*nothing.npz", str(tmp_path / "nothing.npz"))
    np.savez(tmp_path / "x.npz", x=STATE["b"])
    refused("leave --entry out", str(tmp_path / "x.npz"), "model")


def test_sum_is_that_of_the_file(tmp_path):
    (tmp_path / "empty").touch()
    assert files.sha256_of(str(tmp_path / "empty")).startswith("e3b0c44298fc1c149afbf4c8996fb924")  # of nothing
    refused("^cannot read /nowhere/x: No such file or directory$", "/nowhere/x", call=files.sha256_of)


def test_the_extra_is_named_where_torch_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "a.pth").touch()
    refused("install the extra, pip install '.\\[convert\\]'", str(tmp_path / "a.pth"))


class TestTorch:
    """PyTorch's files, where it is installed."""

    torch = None

    @pytest.fixture(autouse=True)
    def _installed(self):
        self.torch = pytest.importorskip("torch", reason="torch is not installed: pip install '.[convert]'")

    def saved(self, path, **entries):
        tensors = {
            name: self.torch.from_numpy(np.asarray(array, np.float32) if array.dtype == ml_dtypes.bfloat16 else array)
            for name, array in STATE.items()
        }
        tensors["a.bias"] = tensors["a.bias"].to(self.torch.bfloat16)
        self.torch.save({name: tensors if value is None else value for name, value in entries.items()}, path)
        return str(path)

    def test_the_average_comes_first(self, tmp_path):
        path = self.saved(tmp_path / "x.pth", model_ema=None, model={"other": self.torch.zeros(1)}, epoch=3)
        same(files.read(path))
        assert list(files.read(path, "model")) == ["other"]
        refused("has no entry 'optimizer'; it holds model_ema, model, epoch", path, "optimizer")

    def test_files_of_before_there_were_zips_are_read(self, tmp_path):
        self.torch.save({"a": self.torch.ones(2)}, tmp_path / "a.pth", _use_new_zipfile_serialization=False)
        np.testing.assert_array_equal(files.read(str(tmp_path / "a.pth"))["a"], np.ones(2, np.float32))

    def test_objects_are_not_unpickled(self, tmp_path):
        class Loud:
            def __reduce__(self):
                return (open, (str(tmp_path / "ran"), "w"))

        path = tmp_path / "x.pth"
        self.torch.save({"model": {"x": self.torch.zeros(1)}, "callback": Loud()}, path)
        refused("holds more than tensors", str(path))
        assert not (tmp_path / "ran").exists()
