"""Shards: what is written is read, by position; what is not whole, or not of the folder, is refused."""

import dataclasses
import json
import os
import pathlib
import platform
import subprocess

import numpy as np
import pytest

from maskrl_jax.data import encoded
from maskrl_jax.data.batches import batch_at
from maskrl_jax.data.dataset import Dataset
from maskrl_jax.errors import UserError

COUNT, SHARD = 23, 5


def columns_of(positions):
    positions = np.asarray(positions)
    return {
        "index": positions.astype(np.int64),
        "cond": positions[:, None].repeat(3, 1).astype(np.int32),
        "label": (positions * 2).astype(np.int32),
        "tokens": (positions[:, None] * 4 + np.arange(4)).astype(np.uint16),
    }


MANIFEST = encoded.Manifest("abc", "toy", "train", 8, COUNT, SHARD, encoded.fields_of(columns_of([0])))


def batches(shard):
    positions = MANIFEST.positions(shard)
    return [columns_of(positions[i : i + 2]) for i in range(0, len(positions), 2)]


def write_all(folder):
    encoded.begin(folder, MANIFEST)
    for shard in range(MANIFEST.shards):
        encoded.write_shard(folder, MANIFEST, shard, batches(shard))


@pytest.fixture
def folder(tmp_path):
    write_all(str(tmp_path))
    return str(tmp_path)


def test_shards_hold_every_sample_once(folder):
    assert MANIFEST.shards == 5 and len(MANIFEST.positions(4)) == 3
    assert sorted(name for name in os.listdir(folder) if name.endswith("record")) == [
        f"train-{i:05d}-of-00005.array_record" for i in range(5)
    ]
    shards = encoded.Shards(folder, encoded.read_manifest(folder, "train"))
    shards.check()
    order = np.random.default_rng(0).permutation(COUNT)
    for name, column in shards.columns().items():
        expected = columns_of(order)[name]
        assert column[order].dtype == expected.dtype and len(column) == COUNT
        np.testing.assert_array_equal(column[order], expected)
        np.testing.assert_array_equal(column[7], columns_of([7])[name][0])
        np.testing.assert_array_equal(np.asarray(column), columns_of(range(COUNT))[name])


def test_batches_of_shards_are_those_of_the_set_and_every_process_reads_its_rows(folder, monkeypatch):
    kept = {name: value for name, value in columns_of(range(COUNT)).items() if name != "index"}
    shards = encoded.Shards(folder, MANIFEST)
    read = []
    stored = shards._source
    monkeypatch.setattr(
        shards, "_source", type("Noting", (), {"__getitems__": lambda _, p: read.extend(p) or stored.__getitems__(p)})()
    )
    sets = [Dataset("toy", columns, None, None, None) for columns in (shards.columns(), kept)]
    for step in (0, 9):
        read.clear()
        found, expected = (batch_at(one, step, 8, slice(4, 8), 3) for one in sets)
        assert len(read) == 4  # once for all columns, and no row of another process
        for name, value in expected.items():
            np.testing.assert_array_equal(found[name], value)


def test_a_shard_is_made_of_the_same_bytes_and_a_half_one_has_no_name(folder, tmp_path):
    path = pathlib.Path(MANIFEST.path(folder, 1))
    before = path.read_bytes()
    path.unlink()

    def torn():
        yield batches(1)[0]
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError):
        encoded.write_shard(folder, MANIFEST, 1, torn())
    assert not list(tmp_path.glob("*.tmp"))
    assert MANIFEST.missing(folder) == [1]
    with pytest.raises(UserError, match="lacks 1 of 5 shards of train; run its encode command again"):
        encoded.Shards(folder, MANIFEST)
    encoded.write_shard(folder, MANIFEST, 1, batches(1))
    assert path.read_bytes() == before and MANIFEST.missing(folder) == []
    assert not list(tmp_path.glob("*.tmp"))


def test_two_may_write_a_shard_at_once_and_leftovers_of_the_dead_are_removed(folder, tmp_path):
    path = pathlib.Path(MANIFEST.path(folder, 1))
    before = path.read_bytes()
    path.unlink()
    with subprocess.Popen(["true"]) as ended:
        pass
    other, dead, far = (
        f"{path.name}.{name}.tmp"
        for name in (f"{platform.node()}-{os.getppid()}", f"{platform.node()}-{ended.pid}", "far-1")
    )
    for name in (other, dead, far):
        (tmp_path / name).write_bytes(b"half")
    encoded.write_shard(folder, MANIFEST, 1, batches(1))
    assert path.read_bytes() == before
    assert {left.name for left in tmp_path.glob("*.tmp")} == {other, far}


@pytest.mark.parametrize("change", [{"tokenizer": "other"}, {"data": "digits"}, {"shard_size": 6}, {"image_size": 16}])
def test_a_folder_of_others_is_refused_in_one_line(folder, change):
    (name,) = change
    with pytest.raises(UserError, match=f"holds shards of another {name}.*; give what it was begun with, or a new"):
        encoded.begin(folder, dataclasses.replace(MANIFEST, **change))
    encoded.begin(folder, MANIFEST)  # its own is not
    same = [dataclasses.replace(MANIFEST, data=name).data for name in ("here/toy", "here/toy/", "here//toy")]
    assert len(set(same)) == 1  # a folder in other words
    assert dataclasses.replace(MANIFEST, data="digits/").data != "digits"  # a folder, and a set of that name


def test_texts_are_the_same_where_their_ids_are(tmp_path):
    places = [tmp_path / name for name in "abc"]
    for place, merges in zip(places, ("x", "x", "y"), strict=True):
        place.mkdir()
        (place / "vocab.json").write_text("{}")
        (place / "merges.txt").write_text(merges)
    (places[1] / "tokenizer.json").write_text("unread beside the two others")
    data = {"name": "my.jsonl", "tokens": "clip", "text_length": 12, "pad": 0, "tokenizer": str(places[0])}
    texts = encoded.texts_of(data)
    assert encoded.texts_of(data | {"tokenizer": str(places[1]), "encoded": "x"}) == texts
    for change in ({"tokenizer": str(places[2])}, {"pad": 49407}, {"text_length": 11}, {"tokens": "dimoo"}):
        assert encoded.texts_of(data | change) != texts
    assert encoded.texts_of("shapes") == "" == MANIFEST.texts


def test_a_manifest_of_before_texts_were_kept_is_of_words(folder, tmp_path):
    stored = json.loads((tmp_path / "train.json").read_text())
    assert stored.pop("texts") == ""
    (tmp_path / "train.json").write_text(json.dumps(stored))
    assert encoded.read_manifest(folder, "train") == MANIFEST


def test_a_folder_without_a_manifest_and_a_damaged_one_are_told(folder, tmp_path):
    with pytest.raises(UserError, match="has no validation.json; make it with python -m maskrl_jax.encode"):
        encoded.read_manifest(folder, "validation")
    (tmp_path / "train.json").write_text('{"tokenizer": 1}')
    with pytest.raises(UserError, match="is no manifest of shards"):
        encoded.read_manifest(folder, "train")


def test_records_in_the_wrong_place_and_cut_files_are_told(folder):
    paths = [pathlib.Path(MANIFEST.path(folder, shard)) for shard in (0, 1, 4)]
    contents = [path.read_bytes() for path in paths]
    paths[0].write_bytes(contents[1])
    with pytest.raises(
        UserError, match="train-00000-of-00005.array_record is damaged .a record is not where it should be"
    ):
        encoded.Shards(folder, MANIFEST).check()
    paths[0].write_bytes(contents[2])
    with pytest.raises(UserError, match="train-00000-of-00005.array_record is damaged .3 records for 5 samples"):
        encoded.Shards(folder, MANIFEST)
    paths[0].write_bytes(contents[0][: len(contents[0]) // 2])
    with pytest.raises(UserError, match="train-00000-of-00005.array_record is damaged"):
        encoded.Shards(folder, MANIFEST).check()
    paths[0].write_bytes(contents[0])
    shards = encoded.Shards(folder, MANIFEST)
    middle = len(contents[2]) // 2
    paths[2].write_bytes(contents[2][:middle] + bytes([contents[2][middle] ^ 255]) + contents[2][middle + 1 :])
    with pytest.raises(UserError, match="train-00004-of-00005.array_record is damaged"):
        shards.check()
