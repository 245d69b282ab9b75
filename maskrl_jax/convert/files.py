"""Files of weights as flat state dicts of numpy arrays, and back to safetensors; nothing is unpickled.

Read are safetensors (one file, or a folder of shards), npz, Flax's msgpack, and PyTorch's files through
`torch.load(weights_only=True)`, which builds tensors and plain containers alone.
"""

import hashlib
import json
import pathlib
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np
from flax import serialization, traverse_util
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

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
        return {name: array for shard in shards(path) for name, array in _safetensors(shard).items()}
    if not file.is_file():
        raise UserError(f"there is no {path}; give the file of the weights, or the folder of their shards")
    if entry and file.suffix not in TORCH:
        raise UserError(f"{path} has no entries to choose {entry!r} from; leave --entry out")
    if file.suffix == ".safetensors":
        return _safetensors(file)
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


def shards(folder: str) -> list[pathlib.Path]:
    """The safetensors files of a folder: those that its index names, or all; UserError where there is none."""
    index = sorted(pathlib.Path(folder).glob("*.safetensors.index.json"))
    if len(index) > 1:
        raise UserError(f"{folder} has {len(index)} indices of shards; give the folder of one model")
    if index:
        names = sorted(set(json.loads(index[0].read_text())["weight_map"].values()))
        if any(pathlib.PurePath(name).name != name for name in names):
            raise UserError(f"{index[0]} names files of other folders; nothing was read")
        files = [pathlib.Path(folder, name) for name in names]
    else:
        files = sorted(pathlib.Path(folder).glob("*.safetensors"))
    lost = [str(file) for file in files if not file.is_file()]
    if lost or not files:
        raise UserError(f"there is no {lost[0]}" if lost else f"{folder} holds no .safetensors file")
    return files


def shapes(files: list[pathlib.Path]) -> dict[str, tuple[pathlib.Path, tuple[int, ...]]]:
    """{name: (file, shape)} of safetensors from their headers alone; UserError for a name in two of them."""
    found = {}
    for file in files:
        with _opened(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118 - no mapping
                if name in found:
                    raise UserError(f"{name} is both in {found[name][0]} and in {file}")
                found[name] = (file, tuple(tensors.get_slice(name).get_shape()))
    return found


def stream(files: list[pathlib.Path]) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of safetensors files one after another; each is let go before the next is read."""
    for file in files:
        with _opened(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118 - no mapping
                yield name, tensors.get_tensor(name)


def write(path: str, state: Mapping[str, np.ndarray]) -> None:
    """Write a state dict as safetensors, by rename; `path` must end so."""
    file = pathlib.Path(path)
    if file.suffix != ".safetensors":
        raise UserError(f"{path} would be safetensors; let its name end so")
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_name(f"{file.name}.tmp")
    save_file({name: np.asarray(array, order="C") for name, array in state.items()}, aside, {"format": "pt"})
    aside.replace(file)


def _opened(file):
    try:
        return safe_open(file, framework="np")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} cannot be read as safetensors ({error})") from error


def _safetensors(file: pathlib.Path) -> dict[str, np.ndarray]:
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} cannot be read as safetensors ({error})") from error


def _npz(file: pathlib.Path) -> dict[str, np.ndarray]:
    try:
        with np.load(file, allow_pickle=False) as arrays:
            return dict(arrays)
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read as npz, or holds objects ({error})") from error


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
            f"{file} holds more than tensors, or is damaged, and nothing of it was run; save its state dict as "
            f"safetensors where you trust it ({_first_line(error)})"
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


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
