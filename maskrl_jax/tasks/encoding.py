"""What may stand for a training picture: codes of a discrete tokenizer, or moments of a KL-VAE's latents.

Moments and not draws, as published for MAR (specs/mar.md section 2): an update draws its tokens itself, with the same
noise as from pictures. There a picture's mirror image is kept too; our stages mirror no pictures.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from maskrl_jax.data import encoded
from maskrl_jax.data.dataset import Dataset
from maskrl_jax.data.reader import reader
from maskrl_jax.errors import UserError
from maskrl_jax.evaluate import measured
from maskrl_jax.tasks import codecs
from maskrl_jax.tasks import kl_vae as kl_vae_task
from maskrl_jax.tasks.task import Parent

Array = jax.Array
TOKENIZERS = ("tokenizer", "kl_vae")


@dataclasses.dataclass(frozen=True)
class Encoding:
    """A trained tokenizer as what it keeps of pictures."""

    kind: str  # `tokens` [N] or `moments` [L,2C]
    dtype: np.dtype
    image_size: int
    params: Any
    encode: Callable[[Any, Array], Array]  # (params, images [B,H,W,3] uint8) -> [B,...] float32 or int32


def encoding_of(parent: Parent, dtype: str = "float32") -> Encoding:
    """Of a trained tokenizer or KL-VAE; `dtype` is that of moments. UserError for another stage."""
    if parent.config.task not in TOKENIZERS:
        raise UserError(f"{parent.workdir} holds a {parent.config.task!r} stage; give a {' or '.join(TOKENIZERS)}")
    if parent.config.task == "kl_vae":
        codec = kl_vae_task.load(parent)
        return Encoding("moments", np.dtype(dtype), codec.config.image_size, codec.params, _moments(codec))
    codec = codecs.load(parent)
    encode = lambda p, images: codec.encode(p, _pixels(images))  # noqa: E731
    return Encoding("tokens", code_dtype(codec.config), codec.config.image_size, codec.params, encode)


def _moments(codec: kl_vae_task.LatentCodec):
    return lambda p, images: jnp.concatenate(codec.moments(p, _pixels(images)), -1)


def _pixels(images: Array) -> Array:
    return images.astype(jnp.float32) / 255


def identity(parent: Parent) -> str:
    """SHA-256 of a trained tokenizer's parameters and their statistics."""
    return measured.identity(parent.params, parent.extra)


def folder_of(config: Any) -> str:
    """Folder of the shards that a stage is trained on; "": it is trained on pictures."""
    return config.data.get("encoded", "")  # stages of before there were shards have no such key


def encoded_set(data: Any, tokenizer: Parent, held_out: Dataset) -> Dataset:
    """The training split in the folder of a stage's `data`; prompts are read as those of the set's other split are.

    Raises UserError where the folder is of another tokenizer, set, size of picture or condition, or way from texts to
    ids, or not complete.
    """
    manifest = encoded.read_manifest(data.encoded, "train")
    _check(manifest, data, tokenizer, held_out)
    return dataclasses.replace(held_out, columns=encoded.Shards(data.encoded, manifest).columns(), verify=None)


def _check(manifest: encoded.Manifest, data: Any, tokenizer: Parent, held_out: Dataset) -> None:
    shapes, folder = {field: shape for field, _, shape in manifest.fields}, data.encoded
    wanted = {
        "tokenizer": (manifest.tokenizer, identity(tokenizer)),
        "set": (manifest.data, encoded.same_name(held_out.name)),
        "image size": (manifest.image_size, tokenizer.config.model.image_size),
        "length of conditions": (shapes.get("cond"), held_out.conditioning.null.shape),
        "way from texts to ids (data.tokens and what goes with it)": (manifest.texts, encoded.texts_of(data)),
    }
    other = [what for what, (found, asked) in wanted.items() if found != asked]
    if other:
        raise UserError(
            f"data.encoded={folder} was made of another {', '.join(other)}; encode into a new folder, or set it to '' "
            "for pictures"
        )


def example(config: Any, sizes: Any, channels: int = 0) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape of what a batch shows of its pictures, for compiling: moments where there are `channels`, else codes."""
    rows, struct = config.batch_size, jax.ShapeDtypeStruct
    if not folder_of(config):
        return {"image": struct((rows, sizes.image_size, sizes.image_size, 3), jnp.uint8)}
    if channels:
        return {"moments": struct((rows, sizes.num_tokens, 2 * channels), jnp.float32)}
    return {"tokens": struct((rows, sizes.num_tokens), code_dtype(sizes))}


def code_dtype(sizes: Any) -> np.dtype:
    """Of stored codes."""
    return np.dtype(np.uint16 if sizes.codebook_size <= np.iinfo(np.uint16).max + 1 else np.int32)


def read_by(config: Any, tokenizer: Any) -> Any:
    """What an update reads of a tokenizer's parameters: of shards the latents' statistics and a text encoder alone."""
    if not folder_of(config):
        return tokenizer
    return {name: tokenizer[name] for name in ("latents", "text") if name in tokenizer}


def pool(train: Dataset, config: Any) -> np.ndarray:
    """Distinct conditions to train a policy on [P, ...], as `Dataset.pool`.

    Classes of shards are counted, since a record's class is read with its moments.
    """
    if folder_of(config) and train.conditioning.kind == "class":
        return np.arange(train.conditioning.null, dtype=np.int32)  # the null id is the one after the last class
    return train.pool(held_out=False)


def examples(train: Dataset, config: Any, rows: slice) -> Callable[[int], dict[str, np.ndarray]]:
    """Batches of a step: images, tokens or moments, whichever the set has, with `cond` and `index`.

    Raises UserError for a set of prompts alone.
    """
    if not any(kind in train.columns for kind in encoded.KINDS):
        train.with_pictures()
    # Stages of before there were workers have no such key.
    read = reader(train, config.batch_size, rows, config.seed, config.data.get("workers", 0))
    names = [name for name in ("image", *encoded.KINDS, "cond") if name in train.columns]
    return lambda step: {name: value for name, value in read(step).items() if name in (*names, "index")}
