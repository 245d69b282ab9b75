"""What was measured once is read again, unless anything that it depends on changed."""

import numpy as np
import pytest

from maskrl_jax.evaluate import measured


def made(value, calls):
    def make():
        calls.append(value)
        return {"value": np.float32(value)}

    return make


@pytest.mark.parametrize("garbage", [b"", b"garbage", b"PK\x03\x04 half"])
def test_a_damaged_file_is_measured_anew(tmp_path, garbage):
    calls = []
    measured.once(tmp_path, "reference", "key", made(1, calls))
    (file,) = tmp_path.glob("reference-*.npz")
    file.write_bytes(garbage)
    assert measured.once(tmp_path, "reference", "key", made(2, calls))["value"] == 2
    assert measured.once(tmp_path, "reference", "key", made(3, calls))["value"] == 2


def test_a_second_run_reads_what_the_first_measured(tmp_path):
    calls = []
    for value in (1, 2):
        assert measured.once(tmp_path / "new", "reference", "key", made(value, calls))["value"] == 1
    assert calls == [1]
    assert [path.suffix for path in (tmp_path / "new").iterdir()] == [".npz"]  # renamed, nothing left aside


def test_another_key_name_or_code_measures_anew(tmp_path, monkeypatch):
    calls = []
    measured.once(tmp_path, "reference", "key", made(1, calls))
    measured.once(tmp_path, "reference", "other", made(2, calls))
    measured.once(tmp_path, "base", "key", made(3, calls))
    monkeypatch.setattr(measured, "code", lambda: "changed")
    assert measured.once(tmp_path, "reference", "key", made(4, calls))["value"] == 4
    assert calls == [1, 2, 3, 4]


def test_processes_of_a_cluster_measure_each(tmp_path, monkeypatch):
    calls = []
    measured.once(tmp_path, "reference", "key", made(1, calls))
    monkeypatch.setattr(measured.jax, "process_count", lambda: 2)
    assert measured.once(tmp_path, "reference", "key", made(2, calls))["value"] == 2


ARRAY = np.arange(6, dtype=np.float32)


@pytest.mark.parametrize(
    "parts",
    [(ARRAY + 1, "a"), (ARRAY.reshape(2, 3), "a"), (ARRAY.astype(int), "a"), (ARRAY, "b"), ({"x": ARRAY}, "a")],
)
def test_an_identity_tells_values_shapes_dtypes_and_structure_apart(parts):
    assert measured.identity(ARRAY.copy(), "a") == measured.identity(ARRAY, "a")
    assert measured.identity(*parts) != measured.identity(ARRAY, "a")
