"""A folder of CLIP rewards becomes a judge that needs nothing beside its own folder."""

import pathlib
import shutil

import clip_weights
import jax
import numpy as np
import pytest

from maskrl_jax import published, runner, stored
from maskrl_jax.checkpoint import load_params
from maskrl_jax.convert import files
from maskrl_jax.errors import UserError
from maskrl_jax.rewards import clip
from maskrl_jax.tasks import judge
from maskrl_jax.tasks.task import Parent

pytest.importorskip("tokenizers", reason="needs the package tokenizers")
PROMPTS = ("a cat", "red dog")


@pytest.fixture
def folder(tmp_path):
    """Two rewards: one with a text tower, one without."""
    for seed, name in enumerate(("hps", "aesthetic")):
        clip_weights.write_reward(tmp_path / "weights" / name, seed)
    return tmp_path / "weights"


def convert(folder, out, **changes):
    published.read("clip-rewards", str(folder), str(out), below={}, store=str(out.parent / "store"), **changes)


def test_the_stage_is_finished_holds_its_tokenizer_and_scores_as_the_files(folder, tmp_path, capsys):
    expected = {name: clip.open_reward(name, str(folder / name)) for name in ("hps", "aesthetic")}
    convert(folder, tmp_path / "made" / "stage")
    assert "a judge that gives hps, aesthetic" in capsys.readouterr().out
    shutil.rmtree(folder)
    moved = shutil.move(tmp_path / "made" / "stage", tmp_path / "elsewhere")
    config, (params, extra) = stored.read_config(moved), load_params(moved)
    assert stored.is_finished(moved) and stored.trained_id(moved) == runner._trained_id(moved)
    assert (config.task, config.name, config.model.kind) == ("judge", "configs/judge.py:clip", "clip")
    found = judge.load(Parent(config, params, extra, str(moved)))
    images = np.random.RandomState(5).uniform(0, 1, (2, 15, 15, 3)).astype(np.float32)
    measured = jax.jit(found.measured)(params, images, found.targets(np.zeros(2), PROMPTS))
    for name, reward in expected.items():
        np.testing.assert_allclose(measured[name], reward.score(images, PROMPTS), rtol=1e-5, atol=1e-5)
    assert set(params) == {"hps", "aesthetic"} and "text" not in params["aesthetic"]["clip"]["params"]


def test_a_config_says_how_it_is_computed(folder, tmp_path):
    text = "from configs import judge\n\ndef get_config(arg):\n    config = judge.get_config('clip')\n"
    (tmp_path / "config.py").write_text(
        text + "    config.model.dtype, config.model.remat = 'bfloat16', True\n    return config\n"
    )
    shutil.rmtree(folder / "hps")
    convert(folder, tmp_path / "stage", config=f"{tmp_path}/config.py")
    (reward,) = judge.load(Parent(stored.read_config(tmp_path / "stage"), {}, {}, "")).rewards
    assert (reward.kind, reward.config.picture.dtype, reward.config.picture.remat) == ("aesthetic", "bfloat16", True)
    assert not (tmp_path / "stage" / "tokenizer").exists()


def test_mistakes_are_one_line_and_leave_nothing(folder, tmp_path):
    def refused(message, **changes):
        with pytest.raises(UserError, match=message) as error:
            convert(folder, tmp_path / "out", **changes)
        assert "\n" not in str(error.value) and not (tmp_path / "out").exists()

    refused("stand on no other stage", entry="model")
    refused("become a 'judge' stage, not 'maskgit'", config="configs/maskgit.py:smoke")
    refused("does not fit configs/judge.py:smoke: .*rewards", config="configs/judge.py:smoke")
    clip_weights.write_reward(folder / "pickscore")
    refused("did you mean 'pick_score'")
    (folder / "pickscore").rename(folder / "pick_score")
    (folder / "pick_score" / "merges.txt").write_text("#version: 0.2\n")  # the same ids, other words
    refused("the tokenizers of hps and pick_score differ; make a judge of each")
    for place in folder.iterdir():
        shutil.rmtree(place)
    refused("has no subfolder; make one for each reward: clip_score, pick_score, hps, aesthetic")
    folder.rmdir()
    refused("there is no folder")
    with pytest.raises(UserError, match="nothing to write back"):
        published.write("clip-rewards", str(tmp_path), str(tmp_path / "x.safetensors"))


def test_a_text_of_another_length_is_refused(folder, tmp_path):
    clip_weights.write_reward(folder / "pick_score")
    sizes = files.json_object(folder / "pick_score" / "config.json")
    sizes["text_config"]["max_position_embeddings"] = 8
    (folder / "pick_score" / "config.json").write_text(str(sizes).replace("'", '"'))
    state = files.read(str(folder / "pick_score" / "model.safetensors"))
    name = "text_model.embeddings.position_embedding.weight"
    files.write(folder / "pick_score" / "model.safetensors", state | {name: np.ascontiguousarray(state[name][:8])})
    with pytest.raises(UserError, match="does not fit configs/judge.py:clip: .*texts of other sizes"):
        convert(folder, tmp_path / "out")


def test_the_help_names_it():
    text = pathlib.Path(published.__file__).with_name("convert").joinpath("__main__.py").read_text()
    assert "; clip-rewards," in text
