"""`--verify`: fresh weights against the packages that they are for, and what is refused."""

import re
import sys

import clip_weights
import numpy as np
import pytest
import tiny_text
from references import reference

from maskrl_jax import published, verify
from maskrl_jax.convert import clip as clip_convert
from maskrl_jax.convert import files
from maskrl_jax.errors import UserError

CONFIG = """
import tiny_text

def get_config(arg):
    config = tiny_text.tokenizer(arg != "plain")
    if arg == "wrong":
        config.model.text.activation = "quick_gelu"
    return config
"""


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A Meissonic folder and the config file of its sizes."""
    packages("torch")
    root = tmp_path_factory.mktemp("verify")
    tiny_text.write_meissonic(root / "Meissonic")
    (root / "config.py").write_text(CONFIG)
    return root


def convert(family, folder, out, config="", **changes):
    own = {"below": {}, "store": str(out.parent / "store"), "compare": True} | changes
    published.read(family, str(folder), str(out), config=config, **own)


def refused(message, *arguments, **changes):
    with pytest.raises(UserError, match=message) as error:
        convert(*arguments, **changes)
    assert "\n" not in str(error.value) and not arguments[2].exists()


def packages(*names):
    for name in names:
        reference(name)


def largest(line):
    found = [float(x) for x in re.findall(r"\d\.\de[+-]\d+", line)]
    assert found and max(found) <= verify.TOLERANCE
    return found


@pytest.mark.parity
def test_a_tokenizer_and_its_text_encoder_agree(work, tmp_path, capsys):
    packages("torch", "transformers", "diffusers")
    convert("meissonic-tokenizer", work / "Meissonic", tmp_path / "out", f"{work}/config.py:text")
    codes, text, made = capsys.readouterr().out.splitlines()
    assert codes.startswith("verified: vqvae latents ") and codes.endswith("100.00% of 128 codes equal")
    assert text.startswith("verified: text_encoder penultimate states ") and "pooled" in text
    assert len(largest(codes)) == len(largest(text)) == 2
    assert "a 'tokenizer' stage" in made


@pytest.mark.parity
def test_a_tokenizer_alone_agrees(work, tmp_path, capsys):
    packages("torch", "diffusers")
    convert("amused", work / "Meissonic" / "vqvae", tmp_path / "out", f"{work}/config.py:plain")
    assert len(largest(capsys.readouterr().out.splitlines()[0])) == 2


@pytest.mark.parity
def test_what_computes_something_else_is_not_kept(work, tmp_path):
    packages("torch", "transformers", "diffusers")
    message = "text_encoder: penultimate states differ from the reference's by .* nothing was kept"
    refused(message, "meissonic-tokenizer", work / "Meissonic", tmp_path / "out", f"{work}/config.py:wrong")


@pytest.mark.parity
def test_rewards_agree_and_those_of_another_place_are_not_kept(tmp_path, capsys, monkeypatch):
    packages("torch", "transformers")
    for seed, name in enumerate(("hps", "aesthetic")):
        clip_weights.write_reward(tmp_path / "weights" / name, seed)
    convert("clip-rewards", tmp_path / "weights", tmp_path / "out")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines[:2]] == ["aesthetic", "hps"]
    assert [len(largest(line)) for line in lines[:2]] == [3, 3]
    monkeypatch.setattr(verify, "TOLERANCE", 0.0)
    refused("^aesthetic: picture differ", "clip-rewards", tmp_path / "weights", tmp_path / "other")


@pytest.mark.parity
def test_weights_of_open_clip_agree_without_a_config(tmp_path, capsys):
    packages("torch", "open_clip")
    clip_weights.write_reward(tmp_path / "hps")
    config = clip_weights.SMALL
    shapes = verify._open_network(config).state_dict()
    draw = np.random.RandomState(3)
    state = {name: np.float32(0.3 * draw.standard_normal(x.shape)) for name, x in shapes.items()}
    files.write(tmp_path / "hps" / "model.safetensors", state)
    verify.reward("hps", tmp_path / "hps", {"clip": clip_convert.params_of(state, config)}, config)
    assert len(largest(capsys.readouterr().out)) == 3


@pytest.mark.parity
def test_sizes_without_a_config_are_those_of_the_weights(tmp_path, capsys):
    packages("torch", "transformers")
    clip_weights.write_reward(tmp_path / "hps")
    (tmp_path / "hps" / "config.json").unlink()
    state, config = clip_weights.state(clip_weights.SMALL), clip_weights.SMALL
    verify.reward("hps", tmp_path / "hps", {"clip": clip_convert.params_of(state, config)}, config)
    largest(capsys.readouterr().out)


@pytest.mark.parity
def test_weights_that_the_reference_does_not_take_are_one_line(work, tmp_path):
    packages("torch", "transformers", "diffusers")
    text = files.read(str(work / "Meissonic" / "text_encoder" / "model.safetensors"))
    text.pop("text_projection.weight")
    with pytest.raises(UserError, match="CLIPTextModelWithProjection does not take these weights: .*text_projection"):
        verify._text(work / "Meissonic" / "text_encoder", text, {}, tiny_text.TEXT)


@pytest.mark.parametrize("name", ["mar", "kl16", "meissonic", "dimoo", "taming"])
def test_a_family_without_a_reference_says_so_first(name, tmp_path):
    known = "no reference in a package; --verify is for amused, clip-rewards, meissonic-tokenizer$"
    refused(f"^weights of {name!r} have {known}", name, tmp_path / "nothing", tmp_path / "out")


@pytest.mark.parametrize("family", verify.PACKAGES)
def test_a_missing_package_is_named_before_anything_is_read(family, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    message = r"^--verify compares with torch, which is missing: pip install '\.\[parity\]'$"
    refused(message, family, tmp_path / "nothing", tmp_path / "out")


def test_an_unknown_family_is_named_as_ever(tmp_path):
    refused("did you mean 'mar'", "marr", tmp_path, tmp_path / "out")


def test_errors_are_of_an_output_s_scale_and_nan_is_one():
    wanted = np.array([4.0, -8.0])
    assert verify.errors("it", {"x": wanted + 4e-4}, {"x": wanted}) == {"x": pytest.approx(5e-5)}
    for wrong in (1e-2, np.nan):
        with pytest.raises(UserError, match="^it: x differ from the reference's by .* more than 1e-04"):
            verify.errors("it", {"x": wanted + wrong}, {"x": wanted})


def test_codes_may_differ_where_two_are_as_near_and_nowhere_else():
    codebook = np.array([[0.0, 0.0], [2.0, 0.0], [9.0, 9.0]])
    latents = np.array([[1.0, 0.0], [0.1, 0.0]])  # as near to both of the first, and near the first
    theirs = {"latents": latents, "codes": np.array([0, 0])}
    assert verify.equal_codes("it", theirs, theirs, codebook) == "100.00% of 2 codes equal"
    tie = {"latents": latents + [1e-5, 0], "codes": np.array([1, 0])}
    assert verify.equal_codes("it", tie, theirs, codebook) == "50.00% of 2 codes equal"
    for codes in ([0, 1], [2, 0]):
        with pytest.raises(UserError, match="^it: 1 of 2 codes are not the reference's; nothing was kept$"):
            verify.equal_codes("it", {"latents": latents, "codes": np.array(codes)}, theirs, codebook)


def test_texts_end_and_no_other_token_ends_them():
    ids = verify.texts(clip_weights.SMALL.text, np.random.RandomState(0))
    ends = ids == clip_weights.SMALL.text.end
    assert ids.min() > 0 and ends.argmax(1).tolist() == [8, 4] and ends[1, 4:].all() and ends.sum() == 6
