import re

import hashed
import numpy as np
import pytest
from PIL import Image

from maskrl_jax.errors import UserError
from maskrl_jax.evaluate.image_set import open_images

BATCH = hashed.images(3, 4, 5)


def refused(path, message):
    with pytest.raises(UserError, match=f"^{re.escape(str(message))}") as error:
        list(open_images(str(path)).read())
    assert "\n" not in str(error.value)


def same(found, keys, images):
    found = list(found)
    assert [key for key, _ in found] == keys
    for (_, image), expected in zip(found, images, strict=True):
        np.testing.assert_array_equal(image, expected)


def test_pictures_of_a_folder_come_in_order_of_their_names(tmp_path):
    (tmp_path / "b").mkdir()
    for name, image in zip(("2.PNG", "10.png", "b/1.bmp"), BATCH, strict=True):
        Image.fromarray(image).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no picture")
    opened = open_images(str(tmp_path))
    assert opened.count == 3
    same(opened.read(), ["10", "2", "b/1"], BATCH[[1, 0, 2]])


def test_grey_and_transparent_pictures_become_rgb(tmp_path):
    Image.fromarray(BATCH[0, ..., 0]).save(tmp_path / "grey.png")
    ((_, image),) = open_images(str(tmp_path)).read()
    np.testing.assert_array_equal(image, np.repeat(BATCH[0, ..., :1], 3, axis=-1))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("kind", [np.uint8, np.float32])
def test_images_of_an_npz_come_row_by_row_and_again(tmp_path, save, kind):
    save(tmp_path / "a.npz", BATCH.astype(kind), np.arange(3))
    opened = open_images(str(tmp_path / "a.npz"))
    for _ in range(2):
        same(opened.read(), ["0", "1", "2"], BATCH.astype(kind))


def test_index_names_the_images_of_an_npz(tmp_path):
    np.savez(tmp_path / "a.npz", arr_0=BATCH, index=[7, 5, 6])
    same(open_images(str(tmp_path / "a.npz")).read(), ["7", "5", "6"], BATCH)


def test_what_holds_no_images_is_refused(tmp_path):
    refused(tmp_path, f"{tmp_path} holds no images (.bmp")
    refused(tmp_path / "nowhere", f"cannot read {tmp_path}/nowhere as a folder or npz of images: ")
    (tmp_path / "a.npz").write_bytes(b"garbage")
    refused(tmp_path / "a.npz", f"cannot read {tmp_path}/a.npz as a folder or npz of images: ")
    np.savez(tmp_path / "b.npz", mu=np.zeros(3))
    refused(tmp_path / "b.npz", f"{tmp_path}/b.npz holds no images: there is no arr_0")
    np.savez(tmp_path / "c.npz", arr_0=BATCH, index=[1, 2])
    refused(tmp_path / "c.npz", f"{tmp_path}/c.npz holds 3 images and 2 entries of index")
    np.savez(tmp_path / "d.npz", arr_0=np.array([{}], object))
    refused(tmp_path / "d.npz", f"{tmp_path}/d.npz: arr_0 must be images [n, H, W, 3] of bytes or floats, not object")


@pytest.mark.parametrize("wrong", [BATCH[..., 0], BATCH.astype(int), BATCH[:0], np.asfortranarray(BATCH)])
def test_arrays_that_are_no_images_are_refused(tmp_path, wrong):
    np.savez(tmp_path / "a.npz", wrong)
    refused(tmp_path / "a.npz", f"{tmp_path}/a.npz: arr_0 must be images [n, H, W, 3]")


def test_a_damaged_picture_is_named(tmp_path):
    (tmp_path / "x.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    refused(tmp_path, f"cannot read the image {tmp_path}/x.png: ")


def test_a_damaged_archive_is_named(tmp_path):
    large = hashed.images(3, 64, 64)
    np.savez(tmp_path / "a.npz", large)
    content = bytearray((tmp_path / "a.npz").read_bytes())
    content[content.index(large[1].tobytes())] ^= 1
    (tmp_path / "a.npz").write_bytes(content)
    refused(tmp_path / "a.npz", f"{tmp_path}/a.npz is damaged at image")
