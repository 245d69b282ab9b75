"""State dicts that others published, from a file; nothing is unpickled."""

import hashlib
import os

import numpy as np

from maskrl_jax.errors import UserError

EXTRA = "pip install 'maskrl_jax[convert]'"


def sha256_of(path: str | os.PathLike) -> str:
    """Return the SHA-256 of a file in hex; UserError where it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def read(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Return the tensors of a `.safetensors` file, or of a `.pth`, `.pt` or `.bin` one (tensors alone), by name.

    UserError where the file cannot be read, holds anything else than tensors, or needs a package that is not there.
    """
    reader = _safetensors if str(path).endswith(".safetensors") else _torch
    try:
        return reader(path)
    except ImportError as error:
        raise UserError(f"reading {path} needs {error.name}: {EXTRA}") from None
    except UserError:
        raise
    except Exception as error:  # whatever the two packages raise on a damaged or foreign file
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"cannot read {path} as a state dict: {reason}") from None


def _safetensors(path):
    from safetensors.numpy import load_file

    return load_file(path)


def _torch(path):
    import torch

    state = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise UserError(f"{path} is no plain state dict: it must hold names and tensors alone")
    return {name: value.numpy() for name, value in state.items()}
