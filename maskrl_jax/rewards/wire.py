"""What a reward service and its client say to each other: JSON, with pictures as PNG in base64.

Asked by POST: {"images": [base64 of a PNG, ...], "prompts": [text, ...]}, pictures of one size. Answered:
{"scores": [number or null, ...]} in the same order, null for a picture that could not be scored; or, with a status
other than 200, {"error": text}.
"""

import base64
import binascii
import dataclasses
import io
import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from maskrl_jax.data.pixels import rgb

TYPE = "application/json"


@dataclasses.dataclass(frozen=True)
class Bounds:
    """The most that a service takes in one request."""

    bytes: int = 64 * 2**20  # of the body
    images: int = 256
    pixels: int = 2**24  # of all pictures, 16 of 1024 x 1024: a small PNG may hold many
    prompt: int = 2000  # characters
    seconds: int = 60  # until all of it has come

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if getattr(self, field.name) < 1:
                raise ValueError(f"{field.name} {getattr(self, field.name)} must be at least 1")


def request(images: np.ndarray, prompts: Sequence[str]) -> bytes:
    """Write finite pictures [B,H,W,3] in [0,1], rounded to bytes, and their prompts."""
    pixels = np.round(255 * np.clip(images, 0, 1)).astype(np.uint8)
    return json.dumps({"images": [_png(x) for x in pixels], "prompts": list(prompts)}).encode()


def read_request(body: bytes, bounds: Bounds) -> tuple[np.ndarray, list[str]]:
    """Read a request: (pictures float32 [B,H,W,3] in [0,1], prompts). ValueError of one line for what is not one."""
    # Values of JSON take far more memory than their text; a request has two lists of strings, with commas in prompts.
    if sum(map(body.count, (b",", b"[", b"{"))) > bounds.images * (bounds.prompt + 2) + 4:
        raise ValueError("the request holds too many values")
    found = _parsed(body, "the request")
    images, prompts = (found.get(name) for name in ("images", "prompts"))
    for name, values in (("images", images), ("prompts", prompts)):
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            raise ValueError(f"{name} must be a list of strings")
    if len(images) != len(prompts) or not 1 <= len(images) <= bounds.images:
        raise ValueError(f"{len(images)} images and {len(prompts)} prompts; wanted are 1..{bounds.images} of both")
    if max(map(len, prompts)) > bounds.prompt:
        raise ValueError(f"a prompt has more than {bounds.prompt} characters")
    opened = [_opened(text) for text in images]
    size = opened[0].size
    if any(image.size != size for image in opened):
        raise ValueError("images differ in size; send one size a request")
    if len(opened) * size[0] * size[1] > bounds.pixels:
        raise ValueError(f"{len(opened)} images of {size[0]} x {size[1]} exceed {bounds.pixels} pixels")
    pictures = np.empty((len(opened), size[1], size[0], 3), np.float32)
    for picture, image in zip(pictures, opened, strict=True):
        picture[:] = _pixels(image)
    return pictures, prompts


def answer(scores: np.ndarray) -> bytes:
    """Write scores float [B]; what is not finite becomes null."""
    return json.dumps({"scores": [x if math.isfinite(x) else None for x in map(float, scores)]}).encode()


def read_answer(body: bytes, count: int) -> np.ndarray:
    """Read `count` scores: float32 [count], NaN for null and what is not finite. ValueError for anything else.

    Nothing is mended: true, "1" or a number too many makes the whole answer wrong, as it may mean any order.
    """
    scores = _parsed(body, "the answer").get("scores")
    if not isinstance(scores, list):
        raise ValueError("the answer has no list of scores")
    if len(scores) != count:
        raise ValueError(f"the answer has {len(scores)} scores for {count} pictures")
    wrong = [x for x in scores if x is not None and (isinstance(x, bool) or not isinstance(x, int | float))]
    if wrong:
        raise ValueError(f"{str(wrong[0])[:40]!r} is no score")
    try:
        with np.errstate(over="ignore"):
            found = np.array([np.nan if x is None else float(x) for x in scores], np.float64).astype(np.float32)
    except OverflowError as error:
        raise ValueError("a score is too large for a number") from error
    return np.where(np.isfinite(found), found, np.float32(np.nan))


def _parsed(body: bytes, what: str) -> dict[str, Any]:
    try:
        found = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what} is no JSON: {str(error)[:80]}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{what} is no JSON object")
    return found


def _png(pixels: np.ndarray) -> str:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", compress_level=1)
    return base64.b64encode(file.getvalue()).decode()


def _opened(text: str) -> Image.Image:
    """Read the head of a PNG alone; its size is looked at before its pixels are made."""
    try:
        return Image.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=("PNG",))
    except (binascii.Error, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"an image is no base64 of a PNG: {str(error)[:80]}") from error


def _pixels(image: Image.Image) -> np.ndarray:
    try:
        return rgb(image).astype(np.float32) / 255
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"an image is a PNG that cannot be read: {str(error)[:80]}") from error
