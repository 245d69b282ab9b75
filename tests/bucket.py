"""A bucket that is a folder of this machine: gs:// as epath, orbax and tensorboardX ask for it, without a network."""

import os
import sys

import pytest
from etils.epath import backend
from fsspec.implementations.local import LocalFileSystem
from orbax.checkpoint._src.path import gcs_utils


class Folder(LocalFileSystem):
    """gs://<bucket>/<name> as <root>/<bucket>/<name>."""

    protocol = ("gs", "gcs")
    root = ""
    cachable = False

    def __init__(self, **_):
        super().__init__(auto_mkdir=True)

    @classmethod
    def _strip_protocol(cls, path):
        return os.path.join(cls.root, os.fspath(path).removeprefix("gs://"))

    def glob(self, path, **options):
        return [os.path.relpath(found, self.root) for found in super().glob(path, **options)]

    def open(self, path, mode="rb", **options):
        if "a" in mode:
            raise NotImplementedError("objects of a bucket do not grow")
        return super().open(path, mode, **options)


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """Return gs://bucket and the folder that stands for it."""
    monkeypatch.setattr(Folder, "root", str(tmp_path))
    monkeypatch.setitem(sys.modules["fsspec.registry"]._registry, "gcs", Folder)
    backend.fsspec_backend._get_filesystem.cache_clear()

    def on_disk(path):
        return {"driver": "file", "path": Folder._strip_protocol(path)}

    monkeypatch.setattr(gcs_utils, "get_kvstore_for_gcs", on_disk)
    monkeypatch.setattr(gcs_utils, "is_hierarchical_namespace_enabled", lambda path: False)
    (tmp_path / "bucket").mkdir()
    yield "gs://bucket", tmp_path / "bucket"
    backend.fsspec_backend._get_filesystem.cache_clear()
