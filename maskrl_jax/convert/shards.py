"""Published weights in one or many safetensors files: their headers first, then one tensor at a time."""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

DTYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "BOOL": np.bool_,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8,
}  # fmt: skip


class Tensor(NamedTuple):
    """Where a tensor lies: nothing of it is read before `array`."""

    file: Path
    offset: int  # bytes from the start of the file
    shape: tuple[int, ...]
    dtype: np.dtype

    def array(self) -> np.ndarray:
        """Map the tensor into memory, read-only: the system loads its pages as they are read and may drop them."""
        if not math.prod(self.shape):
            return np.zeros(self.shape, self.dtype)
        return np.memmap(self.file, self.dtype, "r", self.offset, self.shape)


class Shards(Mapping[str, Tensor]):
    """The tensors of a folder by name, in the order in which its files hold them.

    Read by hand, as safetensors before 0.6 has no bfloat16 in numpy. Files are those of the index
    (`*.safetensors.index.json`) or, without one, all `*.safetensors` of the folder.

    Raises:
      ValueError: one line that names the file that is missing or no safetensors file, or the tensor that is there
        twice, or of an unknown type.
    """

    def __init__(self, folder: Path | str):
        self._tensors: dict[str, Tensor] = {}
        for file in _files(Path(folder)):
            for name, tensor in _header(file).items():
                if name in self._tensors:
                    raise ValueError(f"{file} holds {name}, which {self._tensors[name].file.name} holds too")
                self._tensors[name] = tensor

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def _files(folder: Path) -> list[Path]:
    indices = sorted(folder.glob("*.safetensors.index.json"))
    if len(indices) > 1:
        raise ValueError(f"{folder} has {len(indices)} indices of safetensors files; leave one")
    if indices:
        names = sorted(set(json.loads(indices[0].read_text())["weight_map"].values()))
        files = [folder / Path(name).name for name in names]  # an index of others may not lead out of its folder
    else:
        files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder} holds no safetensors file")
    for file in files:
        if not file.is_file():
            raise ValueError(f"{indices[0].name} names {file.name}, which is not in {folder}")
    return files


def _header(file: Path) -> dict[str, Tensor]:
    """The tensors of one file: eight bytes that give the header's length, the header in JSON, the data."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = 8 + int.from_bytes(stream.read(8), "little")
        if not 8 < start <= size:
            raise ValueError(f"{file} is no safetensors file, or is cut short")
        try:
            header = json.loads(stream.read(start - 8))
        except ValueError as error:
            raise ValueError(f"{file} is no safetensors file") from error
    header.pop("__metadata__", None)
    return {name: _tensor(file, size, start, name, entry) for name, entry in header.items()}


def _tensor(file: Path, size: int, start: int, name: str, entry: dict) -> Tensor:
    if entry["dtype"] not in DTYPES:
        raise ValueError(f"{name} of {file} has the unknown type {entry['dtype']}")
    dtype, (first, end) = np.dtype(DTYPES[entry["dtype"]]), entry["data_offsets"]
    if end - first != dtype.itemsize * math.prod(entry["shape"]) or not 0 <= first <= end <= size - start:
        raise ValueError(f"{file} is cut short: {name} does not lie in it")
    return Tensor(file, start + first, tuple(entry["shape"]), dtype)
