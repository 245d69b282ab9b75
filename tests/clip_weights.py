"""A small CLIP with weights from a fixed stream, in the layout of Hugging Face, and a small tokenizer for it."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from maskrl_jax.convert import clip as convert
from maskrl_jax.models.clip import AestheticHead, Clip, ClipConfig, PictureConfig, TextConfig

WORDS = ("cat", "dog", "red")  # that the small tokenizer knows as one token each
OWN = {"projection": 6, "activation": "quick_gelu"}
SMALL = ClipConfig(
    text=TextConfig(width=12, depth=3, heads=3, mlp_width=20, vocabulary=521, length=9, end=520, **OWN),
    picture=PictureConfig(width=16, depth=2, heads=2, mlp_width=24, image_size=12, patch=4, **OWN),
)
GELU = ClipConfig(*(dataclasses.replace(tower, activation="gelu") for tower in (SMALL.text, SMALL.picture)))


def state(config: ClipConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Weights of `config` as a state dict, filled in the order of the names."""
    size = config.picture.image_size
    inputs = jnp.zeros((1, size, size, 3)), jnp.zeros((1, config.text.length), jnp.int32)
    shapes = jax.eval_shape(Clip(config).init, jax.random.key(0), *inputs)
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), shapes)
    draw = np.random.RandomState(seed)
    filled = {}
    for name, x in sorted(convert.state_of(zeros, config).items()):
        centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        filled[name] = np.asarray(centre + 0.3 * draw.standard_normal(x.shape), np.float32)
    return filled


def hugging_face(config: ClipConfig) -> dict:
    """What a config.json says of `config`."""

    def tower(c):
        return {
            "hidden_size": c.width,
            "num_hidden_layers": c.depth,
            "num_attention_heads": c.heads,
            "intermediate_size": c.mlp_width,
            "hidden_act": c.activation,
        }

    text, picture = config.text, config.picture
    places = {"vocab_size": text.vocabulary, "max_position_embeddings": text.length, "eos_token_id": text.end}
    return {
        "projection_dim": text.projection,
        "text_config": tower(text) | places | {"bos_token_id": text.end - 1, "projection_dim": text.projection},
        "vision_config": tower(picture) | {"image_size": picture.image_size, "patch_size": picture.patch},
    }


def texts(config: ClipConfig) -> np.ndarray:
    """Token ids [3,L]: a full row, one with padding by the end token, and one with padding by 0."""
    ids = np.random.RandomState(1).randint(1, config.text.end - 1, (3, config.text.length)).astype(np.int32)
    ids[:, 0] = config.text.end - 1
    ids[0, -1], ids[1, 4:], ids[2, 6], ids[2, 7:] = config.text.end, config.text.end, config.text.end, 0
    return ids


def pictures(config: ClipConfig, count: int = 3) -> np.ndarray:
    """Normalised pictures float32 [count,H,W,3]."""
    size = config.picture.image_size
    return np.float32(np.random.RandomState(2).standard_normal((count, size, size, 3)))


def write_tokenizer(folder: pathlib.Path) -> None:
    """Write vocab.json and merges.txt: the alphabet of bytes, alone and at a word's end, and `WORDS`."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    alphabet = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    merges = [pair for word in WORDS for pair in ((word[0], word[1]), (word[:2], word[2] + "</w>"))]
    entries = [*alphabet, *(sign + "</w>" for sign in alphabet), *("".join(pair) for pair in merges)]
    entries += ["unused", "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({entry: i for i, entry in enumerate(entries)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))


def head() -> dict[str, np.ndarray]:
    """Layers of an aesthetic predictor over the features of `SMALL`."""
    draw, widths = np.random.RandomState(4), (6, *AestheticHead.widths)
    layers = zip(convert.HEAD_LAYERS, widths[:-1], widths[1:], strict=True)
    shapes = {f"layers.{i}": (b, a) for i, a, b in layers}
    found = {f"{name}.weight": np.float32(draw.standard_normal(x) / 6) for name, x in shapes.items()}
    return found | {f"{name}.bias": np.float32(draw.standard_normal(x[0])) for name, x in shapes.items()}


def write_reward(folder: pathlib.Path, seed: int = 0) -> None:
    """Fill a folder as every reward of a CLIP wants it: weights of `SMALL`, sizes, predictor, tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder)
    save_file(state(SMALL, seed), folder / "model.safetensors")
    save_file(head(), folder / "aesthetic.safetensors")
    (folder / "config.json").write_text(json.dumps(hugging_face(SMALL)))
