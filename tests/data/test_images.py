import io
import shutil
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from configs import maskgit
from maskrl_jax import runner
from maskrl_jax.data import images
from maskrl_jax.data.dataset import conditioning_of, open_conditions, open_dataset
from maskrl_jax.errors import UserError

COLOURS = {"red": (200, 0, 0), "blue": (0, 0, 200)}


def png(colour):
    """A wide picture of one colour whose left and right ends are white: a centre cut loses the ends."""
    pixels = np.full((10, 20, 3), 255, np.uint8)
    pixels[:, 5:15] = colour
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format="PNG")
    return io.BytesIO(stream.getvalue())


class TinyPictures(tfds.core.GeneratorBasedBuilder):
    """Forty one-coloured pictures with a class, train split only."""

    VERSION = tfds.core.Version("1.0.0")

    def features(self):
        return {"image": tfds.features.Image(), "label": tfds.features.ClassLabel(names=list(COLOURS))}

    def _info(self):
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(self.features()))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for i in range(40):
            name = list(COLOURS)[i % 2]
            yield i, {"image": png(COLOURS[name]), "label": name}


class TinyNumbers(TinyPictures):
    """A set without pictures."""

    def features(self):
        return {"label": tfds.features.ClassLabel(names=list(COLOURS))}

    def _generate_examples(self):
        for i in range(4):
            yield i, {"label": "red"}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return str(tmp_path_factory.mktemp("tfds"))


def test_a_set_is_cut_labelled_and_split(data_dir):
    train = open_dataset("tiny_pictures", "train", data_dir, 8)
    validation = open_dataset("tiny_pictures", "validation", data_dir, 8)
    assert (len(train), len(validation)) == (38, 2)  # 95 % of 40, for want of a second split
    for position in range(38):
        sample = train.get(position)
        colour = list(COLOURS.values())[sample["label"]]
        assert sample["cond"] == sample["label"]
        np.testing.assert_array_equal(sample["image"], np.full((8, 8, 3), colour))
    assert train.encode(["blue", "0"]).tolist() == [1, 0]


def test_a_large_set_stays_on_disk_and_reads_the_same(data_dir, monkeypatch):
    kept = open_dataset("tiny_pictures", "train", data_dir, 8)
    images.load.cache_clear()
    monkeypatch.setattr(images, "MEMORY_LIMIT", 0)
    stored = open_dataset("tiny_pictures", "train", data_dir, 8)
    assert isinstance(stored.columns["image"], images.StoredColumn)
    labels = stored.columns["cond"]
    assert "in_memory" not in vars(labels)  # not read before somebody looks for a class
    np.testing.assert_array_equal(stored.positions_of(["blue"], 3), kept.positions_of(["blue"], 3))
    monkeypatch.setattr(images.StoredColumn, "__getitem__", lambda *_: pytest.fail("read once more"))
    np.testing.assert_array_equal(stored.pool(held_out=False), kept.pool(held_out=False))
    monkeypatch.undo()
    for name, values in stored.take(np.array([5, 3])).items():
        np.testing.assert_array_equal(values, kept.take(np.array([5, 3]))[name])
    np.testing.assert_array_equal(stored.get(7)["image"], kept.get(7)["image"])
    images.load.cache_clear()


@pytest.mark.parametrize(
    "name, message",
    [
        ("no_such_set_at_all", "unknown data set 'no_such_set_at_all'"),
        ("tiny_numbers", "has no image feature"),
        ("coco_captions", "needs a missing package"),
        ("coco_captions", "sets that TFDS reads with TensorFlow cannot be used here"),
        ("imagenet2012", "is to be downloaded by hand, into .*downloads/manual: .*ILSVRC2012_img_train.tar"),
    ],
)
def test_unusable_sets_are_refused_in_one_line(data_dir, name, message):
    with pytest.raises(UserError, match=message) as error:
        open_dataset(name, "train", data_dir, 8)
    assert "\n" not in str(error.value)


def test_what_needs_tensorflow_is_refused_before_there_is_data(capfd):
    with pytest.raises(UserError, match="needs a missing package, tensorflow"):
        conditioning_of("coco_captions")
    assert capfd.readouterr().out == ""


def test_classes_can_be_asked_for_without_the_pictures(tmp_path):
    found = open_conditions("imagenet2012", str(tmp_path), 256)
    assert found.describe(found.encode(["n01440764", "999"])) == ["n01440764", found.describe(np.array(999))[0]]
    assert len(found.pool(held_out=True)) == 1000 and not list(tmp_path.iterdir())


def test_a_copy_in_another_file_format_is_refused(data_dir, tmp_path):
    open_dataset("tiny_pictures", "train", data_dir, 8)
    copy = shutil.copytree(Path(data_dir) / "tiny_pictures", tmp_path / "tiny_pictures")
    info = copy / "1.0.0" / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(UserError, match="use another data_dir"):
        open_dataset("tiny_pictures", "train", str(tmp_path), 8)


def test_configs_take_any_set_by_its_name():
    config = maskgit.get_config("tfds-tiny_pictures")
    stages = (config, *config.parents.values())
    assert {stage.data.name for stage in stages} == {"tiny_pictures"}
    assert config.parents.judge.model.kind == "class" and config.parents.judge.model.num_classes == 2
    runner.check(config)
