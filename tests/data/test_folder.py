"""Folders of images, with a subfolder a class."""

import numpy as np
import pytest
from PIL import Image

from maskrl_jax.data import images
from maskrl_jax.data.dataset import conditioning_of, open_conditions, open_dataset
from maskrl_jax.data.settings import DataSettings
from maskrl_jax.errors import UserError

CLASSES = {"owl": (200, 0, 0), "bee": (0, 0, 200)}


def write(folder, counts):
    """Wide pictures, white at both ends: a centre cut loses them."""
    for name, count in counts.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            picture = Image.new("RGB", (20, 10), "white")
            picture.paste(CLASSES.get(name, "black"), (5, 0, 15, 10))
            picture.save(folder / name / f"{number:02}.png")
    return f"{folder}/"


@pytest.fixture(scope="module")
def name(tmp_path_factory):
    return write(tmp_path_factory.mktemp("mine"), {"owl": 12, "bee": 8})


def test_subfolders_are_classes_and_every_tenth_file_is_held_out(name):
    train, validation = (open_dataset(name, split, "unused", 8) for split in ("train", "validation"))
    assert (len(train), len(validation)) == (18, 2)
    assert train.encode(["bee", "owl"]).tolist() == [0, 1]
    assert validation.columns["label"].tolist() == [1, 1]  # the 10th and 20th of eight bees and twelve owls
    for position in (0, 17):
        sample = train.get(position)
        colour = CLASSES[train.describe(sample["cond"])[0]]
        np.testing.assert_array_equal(sample["image"], np.full((8, 8, 3), colour, np.uint8))
    assert train.take(np.array([3, 5]))["image"].dtype == np.uint8


def test_pictures_are_decoded_by_as_many_threads_as_those_of_other_sets(name):
    assert open_dataset(name, "train", "unused", 8).columns["image"]._threads == images.THREADS


def test_a_bare_name_is_of_a_set_whatever_lies_here(tmp_path, monkeypatch):
    (tmp_path / "cifar10").mkdir()
    monkeypatch.chdir(tmp_path)
    found = {name: DataSettings(name).is_folder for name in ("cifar10", "cifar10/", "./cifar10", "other/", "a/b")}
    assert list(found.values()) == [False, True, True, True, False]


def test_conditions_are_those_of_a_labelled_set(name):
    conditioning = conditioning_of({"name": name.rstrip("/"), "text_length": 8})
    assert (conditioning.kind, conditioning.vocab_size, conditioning.length) == ("class", 3, 0)
    asked = open_conditions(name, "unused", 8)
    assert asked.encode(["owl"]) == [1] and set(asked.prompts(4, seed=0)) == {"owl", "bee"}
    assert not asked.has_pictures
    with pytest.raises(UserError, match="is conditioned on classes, which need no data.tokens='clip'"):
        conditioning_of({"name": name, "tokens": "clip"})


def test_own_splits_are_kept(tmp_path):
    write(tmp_path / "train", {"owl": 2, "bee": 1})
    name = write(tmp_path / "validation", {"owl": 1}).removesuffix("validation/")
    assert len(open_dataset(name, "train", "unused", 8)) == 3
    assert open_dataset(name, "validation", "unused", 8).columns["label"].tolist() == [1]
    write(tmp_path / "validation", {"fox": 1})
    with pytest.raises(UserError, match="fox is no class of the training pictures; those are: bee, owl"):
        open_dataset(name, "validation", "unused", 8)


def test_a_folder_without_subfolders_is_one_class(tmp_path):
    write(tmp_path, {"owl": 10})
    found = open_dataset(str(tmp_path / "owl"), "train", "unused", 8)
    assert len(found) == 9 and found.encode(["owl"]) == [0] and found.conditioning.vocab_size == 2


def test_a_picture_lies_as_its_camera_says(tmp_path):
    write(tmp_path, {"owl": 10})
    picture, exif = Image.new("RGB", (8, 8), "white"), Image.Exif()
    picture.paste("black", (0, 0, 8, 4))
    exif[0x0112] = 3  # upside down
    picture.save(tmp_path / "owl" / "00.png", exif=exif)
    image = open_dataset(str(tmp_path), "train", "unused", 8).get(0)["image"]
    assert (image[:4] == 255).all() and (image[4:] == 0).all()


def test_what_is_no_set_of_pictures_is_refused_in_one_line(tmp_path):
    cases = [("missing/", "missing/ is no folder")]
    write(tmp_path / "few", {"owl": 9})
    cases.append(("few/", "has fewer than 10 pictures"))
    write(tmp_path / "empty", {"owl": 0, "bee": 3})
    cases.append(("empty/", "owl has no pictures"))
    write(tmp_path / "stray", {"owl": 12})
    Image.new("RGB", (4, 4)).save(tmp_path / "stray" / "x.jpg")
    cases.append(("stray/", "x.jpg lies beside the subfolders"))
    for name, message in cases:
        with pytest.raises(UserError, match=message) as error:
            open_dataset(f"{tmp_path}/{name}", "validation", "unused", 8)
        assert "\n" not in str(error.value)


def test_pictures_that_cannot_be_read_are_named(tmp_path):
    name = write(tmp_path, {"owl": 12})
    (tmp_path / "owl" / "00.png").write_bytes((tmp_path / "owl" / "01.png").read_bytes()[:60])
    Image.new("I;16", (8, 8)).save(tmp_path / "owl" / "01.png")
    found = open_dataset(name, "train", "unused", 8)
    for position, message in ((0, "00.png"), (1, "01.png: its channels have more than 8 bits")):
        with pytest.raises(UserError, match=f"cannot read the picture .*{message}"):
            found.get(position)
