"""Files of weights as flat state dicts of numpy arrays, and back to safetensors; nothing is unpickled.

Read are safetensors (one file, or a folder of shards), npz, Flax's msgpack, and PyTorch's files through
`torch.load(weights_only=True)`, which builds tensors and plain containers alone.
"""

import contextlib
import hashlib
import json
import pathlib
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ml_dtypes  # gives numpy the bfloat16 that safetensors asks it for
import numpy as np
from flax import serialization, traverse_util
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from maskrl_jax.errors import UserError

TORCH = (".pth", ".pt", ".ckpt", ".bin")
# Where a PyTorch file keeps its weights, the average first.
ENTRIES = ("model_ema", "ema", "model_state_dict", "state_dict", "model")


def read(path: str, entry: str = "") -> dict[str, np.ndarray]:
    """Return {name: array} of a file, or of a folder of safetensors; bfloat16 stays bfloat16.

    Args:
      entry: of a PyTorch file that holds several dicts, which; by default the first of `ENTRIES` that is there. The
        names of nested ones are joined by dots, those of Flax's trees by slashes.

    Raises UserError where there is no such file, it is of another kind, or it holds more than arrays.
    """
    file = pathlib.Path(path)
    if file.is_dir():
        return gather(shards(path))
    if not file.is_file():
        raise UserError(f"there is no {path}; give the file of the weights, or the folder of their shards")
    if entry and file.suffix not in TORCH:
        raise UserError(f"{path} has no entries to choose {entry!r} from; leave --entry out")
    if file.suffix == ".safetensors":
        return gather([file])
    if file.suffix == ".npz":
        return _npz(file)
    if file.suffix in TORCH:
        return _torch(file, entry)
    return _msgpack(file)


def sha256_of(path: str) -> str:
    """Return the SHA-256 of a file in hex; UserError where it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def json_object(path: str | pathlib.Path) -> dict[str, Any]:
    """Return what a JSON file of settings or an index holds; UserError where it cannot be read or is no object."""
    try:
        found = json.loads(pathlib.Path(path).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error})") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} holds no JSON object")
    return found


def shards(folder: str | pathlib.Path, stem: str = "*") -> list[pathlib.Path]:
    """The safetensors files of a folder: those that its index names, or all; UserError where there is none.

    stem: of the file or of the index, where a folder may hold variants of the weights beside them.
    """
    index = sorted(pathlib.Path(folder).glob(f"{stem}.safetensors.index.json"))
    if len(index) > 1:
        raise UserError(f"{folder} has {len(index)} indices of shards; give the folder of one model")
    files = _listed(index[0]) if index else sorted(pathlib.Path(folder).glob(f"{stem}.safetensors"))
    lost = [str(file) for file in files if not file.is_file()]
    if lost or not files:
        raise UserError(f"there is no {lost[0]}" if lost else f"{folder} holds no {stem}.safetensors")
    return files


def shapes(files: Sequence[pathlib.Path]) -> dict[str, tuple[pathlib.Path, tuple[int, ...]]]:
    """{name: (file, shape)} of safetensors from their headers alone; UserError for a name in two of them."""
    found = {}
    for file in files:
        with _opened(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118 - no mapping
                if name in found:
                    raise UserError(f"{name} is both in {found[name][0]} and in {file}")
                found[name] = (file, tuple(tensors.get_slice(name).get_shape()))
    return found


def stream(files: Sequence[pathlib.Path]) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of safetensors files one after another; none is kept here, so that a loop holds those it keeps."""
    for file in files:
        with _opened(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118 - no mapping
                yield name, tensors.get_tensor(name)


def gather(files: Sequence[pathlib.Path]) -> dict[str, np.ndarray]:
    """All tensors of safetensors files; UserError for a name in two of them."""
    shapes(files)
    return dict(stream(files))


def write(path: str | pathlib.Path, state: Mapping[str, np.ndarray]) -> None:
    """Write a state dict as safetensors, by rename; `path` must end so."""
    file = pathlib.Path(path)
    if file.suffix != ".safetensors":
        raise UserError(f"{path} would be safetensors; let its name end so")
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_name(f"{file.name}.tmp")
    save_file({name: np.asarray(array, order="C") for name, array in state.items()}, aside, {"format": "pt"})
    aside.replace(file)


@contextlib.contextmanager
def _opened(file: pathlib.Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="np") as tensors:
            yield tensors
    except (SafetensorError, OSError, AttributeError) as error:  # the last for a type that numpy lacks
        raise UserError(f"{file} cannot be read as safetensors ({error})") from error


def _listed(index: pathlib.Path) -> list[pathlib.Path]:
    """The files that an index names, which must lie beside it."""
    names = json_object(index).get("weight_map")
    if not isinstance(names, dict):
        raise UserError(f"{index} holds no weight_map")
    if any(pathlib.PurePath(name).name != name for name in names.values()):
        raise UserError(f"{index} names files of other folders; nothing was read")
    return [index.with_name(name) for name in sorted(set(names.values()))]


def _npz(file: pathlib.Path) -> dict[str, np.ndarray]:
    if not zipfile.is_zipfile(file):
        raise UserError(f"{file} is no npz, or is cut short; copy it again")
    try:
        with np.load(file, allow_pickle=False) as arrays:
            return dict(arrays)
    except ValueError as error:
        raise UserError(
            f"{file} holds objects, or is damaged, and nothing of it was run; save its arrays alone"
        ) from error
    except (OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{file} cannot be read as npz ({error}); copy it again") from error


def _msgpack(file: pathlib.Path) -> dict[str, np.ndarray]:
    """Flax's msgpack; files of others in this format often have no ending at all."""
    try:
        tree = serialization.msgpack_restore(file.read_bytes())
    except Exception as error:  # whatever bytes of another kind raise
        kinds = ", ".join((".safetensors", ".npz", *TORCH))
        raise UserError(f"{file} is no msgpack of Flax ({type(error).__name__}); other kinds end in {kinds}") from error
    return _arrays(file, traverse_util.flatten_dict(tree, sep="/") if isinstance(tree, dict) else {"": tree})


def _torch(file: pathlib.Path, entry: str) -> dict[str, np.ndarray]:
    try:
        import torch
    except ImportError as error:
        raise UserError(f"{file} is PyTorch's: install the extra, pip install '.[convert]'") from error
    try:
        found = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as error:  # UnpicklingError, RuntimeError for a file that is not a zip, ...
        raise UserError(
            f"{file} holds more than tensors, or is damaged ({type(error).__name__}), and nothing of it was run; save its "
            "state dict as safetensors where you trust it"
        ) from error
    names = [name for name in ([entry] if entry else ENTRIES) if isinstance(found, dict) and name in found]
    if entry and not names:
        some = ", ".join(list(map(str, found))[:8]) if isinstance(found, dict) else type(found).__name__
        raise UserError(f"{file} has no entry {entry!r}; it holds {some}")
    found = found[names[0]] if names else found
    flat = traverse_util.flatten_dict(found, sep=".") if isinstance(found, dict) else {"": found}
    return _arrays(file, {name: _numpy(value, torch) for name, value in flat.items()})


def _numpy(value: Any, torch: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    if value.dtype == torch.bfloat16:  # numpy has no such type of its own
        return value.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return value.numpy()


def _arrays(file: pathlib.Path, flat: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The arrays among the values; numbers and strings beside them are left out."""
    found = {name: value for name, value in flat.items() if isinstance(value, np.ndarray)}
    if not found:
        raise UserError(f"{file} holds no arrays")
    return found
