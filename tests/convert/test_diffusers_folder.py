"""Folders of diffusers' layout: what is missing, damaged or not of the published form is named, and nothing is half written."""

import numpy as np
import pytest
from safetensors.numpy import save_file

from maskrl_jax.convert import diffusers_folder, files
from maskrl_jax.convert.diffusers_folder import INDEX, WEIGHTS
from maskrl_jax.errors import UserError

STATE = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.zeros(2, np.float32)}


@pytest.fixture
def model(tmp_path):
    (tmp_path / "model" / "net").mkdir(parents=True)
    (tmp_path / "model" / "net" / "config.json").write_text('{"width": 3}')
    save_file(STATE, tmp_path / "model" / "net" / WEIGHTS)
    (tmp_path / "model" / "README.md").write_text("a model")
    return tmp_path / "model"


def test_settings_and_tensors_are_read(model):
    assert diffusers_folder.read_settings(model / "net") == {"width": 3}
    np.testing.assert_equal(diffusers_folder.read_state(model / "net"), STATE)


def test_half_precision_is_read_in_its_type(model):
    save_file({"a": STATE["a"].astype(np.float16)}, model / "net" / WEIGHTS)
    assert diffusers_folder.read_state(model / "net")["a"].dtype == np.float16


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda net: (net / "config.json").unlink(), "net holds no config.json or scheduler_config.json$"),
        (lambda net: (net / "config.json").write_text("{"), "config.json cannot be read as JSON"),
        (lambda net: (net / "config.json").write_text("[]"), "config.json holds no JSON object$"),
        (lambda net: (net / WEIGHTS).unlink(), f"net holds no {WEIGHTS}$"),
        (lambda net: (net / WEIGHTS).write_bytes(b"pickle"), f"{WEIGHTS} cannot be read as safetensors"),
        (lambda net: (net / INDEX).write_text("{}"), f"{INDEX} holds no weight_map$"),
        (lambda net: (net / INDEX).write_text('{"weight_map": {"a": "other"}}'), "there is no .*other$"),
        (lambda net: (net / INDEX).write_text('{"weight_map": {"a": "../net/x"}}'), "names files of other folders"),
    ],
)
def test_what_is_missing_or_damaged_is_named(model, break_it, message):
    break_it(model / "net")
    with pytest.raises(UserError, match=message):
        diffusers_folder.read_settings(model / "net")
        diffusers_folder.read_state(model / "net")


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"a": STATE["a"]}, "^the state lacks b$"),
        (STATE | {"c": STATE["b"]}, "^the state holds c without a place$"),
        (STATE | {"a": STATE["a"].T}, r"^the state holds a of shape \[3, 2\], not \[2, 3\]$"),
    ],
)
def test_tensors_that_are_not_of_the_published_form_are_refused(model, tmp_path, state, message):
    with pytest.raises(ValueError, match=message):
        diffusers_folder.write_folder(model, tmp_path / "out", {"net": state})
    assert not (tmp_path / "out").exists()


def test_a_folder_that_exists_is_not_written_over(model):
    with pytest.raises(UserError, match="model exists; choose another folder or remove it$"):
        diffusers_folder.write_folder(model, model, {"net": STATE})


def test_a_kill_half_way_leaves_no_model_and_the_next_try_succeeds(model, tmp_path, monkeypatch):
    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(files, "save_file", killed)
        with pytest.raises(KeyboardInterrupt):
            diffusers_folder.write_folder(model, tmp_path / "out", {"net": STATE})
    assert not (tmp_path / "out").exists()
    diffusers_folder.write_folder(model, tmp_path / "out", {"net": STATE})
    np.testing.assert_equal(diffusers_folder.read_state(tmp_path / "out" / "net"), STATE)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]
    assert (tmp_path / "out" / "README.md").read_text() == "a model"


def test_files_behind_links_are_copied(model, tmp_path):
    """As a download's cache has them."""
    (tmp_path / "blob").write_text("a model")
    (model / "README.md").unlink()
    (model / "README.md").symlink_to(tmp_path / "blob")
    diffusers_folder.write_folder(model, tmp_path / "out", {})
    assert (
        not (tmp_path / "out" / "README.md").is_symlink() and (tmp_path / "out" / "README.md").read_text() == "a model"
    )
