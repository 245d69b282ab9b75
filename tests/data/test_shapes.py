import hashlib
import subprocess
import sys

import numpy as np

from maskrl_jax.data import scenes, shapes


def test_a_stored_sample_is_the_scene_of_its_index(shapes_dir):
    columns = shapes.load("train", shapes_dir)
    assert columns["image"].shape == (96, 32, 32, 3)
    for index in (0, 17, 95):
        scene = scenes.sample(np.random.default_rng((0, 0, index)))
        np.testing.assert_array_equal(columns["image"][index], scenes.render(scene))
        np.testing.assert_array_equal(columns["label"][index], scenes.cell_map(scene))
        assert columns["caption"][index] == str(scene.caption)
        assert columns["tone"][index] == scene.tone


def test_splits_hold_different_scenes(shapes_dir):
    train, validation = (shapes.load(split, shapes_dir)["image"][:64] for split in ("train", "validation"))
    assert (train == validation).all(axis=(1, 2, 3)).mean() < 0.1


def test_the_pictures_of_a_version_never_change():
    pictures = [scenes.render(shapes.scene_at("train", index)) for index in range(200)]
    digest = hashlib.sha256(np.stack(pictures).tobytes()).hexdigest()[:16]
    # Sets on users' disks are found by version: where the drawing changes, so must VERSION.
    assert (str(shapes.Shapes.VERSION), digest) == ("1.0.0", "bc3b5653f5b9d9a9")


def test_sizes_of_the_splits():
    assert shapes.SPLIT_SIZES == {"train": 24_000, "validation": 2_048}


def test_writing_and_reading_never_loads_tensorflow(tmp_path):
    code = (
        "import sys; from maskrl_jax.data import shapes; shapes.SPLIT_SIZES = {'train': 8, 'validation': 8}\n"
        "from maskrl_jax.data.dataset import open_dataset\n"
        f"assert len(open_dataset('shapes', 'train', {str(tmp_path)!r}, 32)) == 8\n"
        "assert 'tensorflow' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
