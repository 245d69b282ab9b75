"""Files of prompts, with and without pictures."""

import json

import numpy as np
import pytest
import text_tokenizers
from PIL import Image

from configs import maskgit, sizes
from maskrl_jax.data import prompts, settings
from maskrl_jax.data.dataset import conditioning_of, is_held_out, open_conditions, open_dataset, open_pictures
from maskrl_jax.errors import UserError
from maskrl_jax.tasks import checks

pytest.importorskip("tokenizers", reason="needs the package tokenizers")
ANIMALS = [f"{word} {number}" for word in ("cat", "dog", "red") for number in range(12)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(text_tokenizers.write_clip(tmp_path_factory.mktemp("clip")))


def data(path, folder="", **more):
    return {"name": str(path), "text_length": 12, "tokens": "clip", "tokenizer": folder, **more}


def write(path, *lines):
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return path


def test_a_text_file_has_prompts_and_no_pictures(tmp_path, folder):
    file = write(tmp_path / "my.txt", *ANIMALS)
    train, validation = (open_dataset(data(file, folder), split, "unused", 32) for split in ("train", "validation"))
    assert len(train) == len(validation) == 36 and not train.has_pictures
    assert train.describe(train.columns["cond"]) == ANIMALS and train.verify is None
    held_out, rest = (train.describe(train.pool(held_out=which)) for which in (True, False))
    assert sorted([*held_out, *rest]) == sorted(ANIMALS) and all(map(is_held_out, held_out))
    assert set(validation.prompts(4, seed=0)) <= set(held_out)
    np.testing.assert_array_equal(train.encode(ANIMALS), train.columns["cond"])
    conditioning = conditioning_of(data(file))  # neither file is needed for it
    np.testing.assert_array_equal(conditioning.null, train.conditioning.null)
    assert train.describe(conditioning.null) == [""]
    with pytest.raises(UserError, match=r"my.txt has no pictures; give every line an .image."):
        train.with_pictures()


def test_describe_knows_a_prompt_as_it_was_written_and_decodes_others(tmp_path, folder):
    file = write(tmp_path / "my.txt", "A  CAT", "the dog")
    found = open_dataset(data(file, folder), "train", "unused", 32)
    assert found.describe(found.encode(["a cat", "red dog"])) == ["A  CAT", "red dog"]


def test_prompts_that_come_again_are_merged_where_there_are_no_pictures(tmp_path):
    file = write(tmp_path / "my.jsonl", *({"prompt": text} for text in ("b", "a", "b ", "b")))
    with pytest.warns(UserWarning, match="2 prompts come again and are left out"):
        assert prompts.read(str(file)).texts == ["b", "a"]


def test_pictures_beside_prompts_are_read_when_asked_for(tmp_path, folder):
    (tmp_path / "pictures").mkdir()
    for number in range(3):
        Image.new("RGB", (20, 10), (10 * number, 0, 0)).save(tmp_path / f"pictures/{number}.png")
    rows = [{"prompt": "cat", "image": f"pictures/{number}.png"} for number in range(3)]
    file = write(tmp_path / "my.jsonl", *rows)
    found = open_dataset(data(file, folder), "train", "unused", 4)
    assert len(found) == 3 and len(np.unique(found.columns["cond"], axis=0)) == 1 and found.with_pictures() is found
    taken = found.take(np.array([2, 0]))
    assert sorted(taken) == ["cond", "image"] and taken["image"].dtype == np.uint8
    np.testing.assert_array_equal(taken["image"], [np.full((4, 4, 3), (red, 0, 0)) for red in (20, 0)])
    assert found.get(1)["image"][0, 0].tolist() == [10, 0, 0]
    # A stage that sees pictures alone needs no tokenizer, and what is only asked for prompts needs no picture.
    alone = open_pictures({"name": str(file)}, "train", "unused", 4)
    assert list(alone.columns) == ["image"] and len(alone) == 3
    (tmp_path / "pictures/1.png").write_bytes(b"no picture")
    assert open_conditions(data(file, folder), "unused", 4).encode(["cat"]).shape == (1, 12)
    with pytest.raises(UserError, match=r"cannot read the picture .*1.png"):
        found.get(1)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([{"prompt": "a"}, "{"], "my.jsonl line 2 is no JSON"),
        (["[1]"], "line 1 is no JSON object"),
        ([{"prompt": "a"}, {"text": "b"}], "line 2 has no prompt"),
        ([{"prompt": " "}], "line 1 has an empty prompt"),
        ([{"prompt": "a", "image": "no.png"}], "line 1 names image 'no.png', which is no file"),
        ([{"prompt": "a", "image": "my.jsonl"}, {"prompt": "b"}], "line 2 has no image, but others have"),
        ([], "is empty; write one prompt a line"),
    ],
)
def test_errors_name_file_and_line(tmp_path, lines, message):
    with pytest.raises(UserError, match=message) as error:
        prompts.read(str(write(tmp_path / "my.jsonl", *lines)))
    assert "\n" not in str(error.value)


def test_files_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*my.txt \(No such file"):
        prompts.read(str(tmp_path / "my.txt"))
    (tmp_path / "my.txt").write_bytes(b"caf\xe9\n")
    with pytest.raises(UserError, match="is no text in UTF-8"):
        prompts.read(str(tmp_path / "my.txt"))
    with pytest.raises(UserError, match="line 2 has an empty prompt"):
        prompts.read(str(write(tmp_path / "my.txt", "cat", "", "dog")))


def test_a_file_too_short_for_a_held_out_quarter_says_so(tmp_path, folder):
    file = write(tmp_path / "my.txt", next(text for text in ANIMALS if not is_held_out(text)))
    with pytest.raises(UserError, match="has 1 prompts, and none of them is held out; give more"):
        open_dataset(data(file, folder), "train", "unused", 32).prompts(2, seed=0)


def test_a_prompt_can_be_asked_for_without_the_file(folder):
    asked = open_conditions(data("gone.txt", folder), "unused", 32)
    assert asked.describe(asked.encode(["cat"])) == ["cat"]
    with pytest.raises(UserError, match="gone.txt is not there to choose prompts from"):
        asked.prompts(2, seed=0)


def test_configs_take_a_file_and_its_tokens():
    config = maskgit.get_config("smoke")
    config.data.update(data("my.jsonl", text_length=77))
    assert conditioning_of(config.data).vocab_size == 49408
    config.task, config.parents.maskgit = "speed_rl", maskgit.get_config("smoke")
    with pytest.raises(UserError, match="data.name of speed_rl is 'my.jsonl', its base was trained with 'shapes'"):
        checks.same_data(config)
    config.parents.maskgit.data.update(config.data)
    checks.same_data(config)


def test_a_judge_that_cannot_read_the_prompts_is_refused_before_anything_is_trained():
    config = maskgit.get_config("smoke")
    checks.judge_reads(config, "caption")
    config.data.update(data("my.jsonl"))
    with pytest.raises(UserError, match="judge reads the captions of shapes, and nothing else, .* data.tokens=clip"):
        checks.judge_reads(config, "caption")
    del config.parents["judge"]
    checks.judge_reads(config, "caption")
    with pytest.raises(UserError, match="judge reads the captions of shapes"):
        checks.judge_reads(maskgit.get_config("smoke"), "class")


def test_stages_of_before_there_were_tokens_have_the_same_data():
    config = maskgit.get_config("smoke")
    config.parents.maskgit = maskgit.get_config("smoke")
    config.parents.maskgit.data = {"name": "shapes", "text_length": 8}
    checks.same_data(config)
    assert settings.filled({"name": "shapes"}) == sizes.data("shapes")
    assert config.data.to_dict() == sizes.data("shapes", **sizes.READING)
