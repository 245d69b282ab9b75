"""A small prepared copy of shapes, shared by the tests of the data room."""

import pytest

from maskrl_jax.data import shapes


@pytest.fixture(scope="session")
def shapes_dir(tmp_path_factory):
    """Directory with a shapes set of 96 training and 64 validation pictures."""
    data_dir = str(tmp_path_factory.mktemp("shapes"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shapes, "SPLIT_SIZES", {"train": 96, "validation": 64})
        for split in ("train", "validation"):
            shapes.load(split, data_dir)
    return data_dir
