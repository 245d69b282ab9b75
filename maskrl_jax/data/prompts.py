"""Prompts of the user's own: a file with one a line, as text or as JSON with a picture beside it."""

import json
import pathlib
import warnings
from dataclasses import dataclass

from maskrl_jax.errors import UserError


@dataclass(frozen=True)
class Prompts:
    """What a file says: its prompts, and the pictures' paths, one for each prompt or none at all."""

    texts: list[str]
    pictures: list[str]


def read(file: str) -> Prompts:
    """Read a `.txt` or `.jsonl` file; prompts that come again are dropped, unless each has a picture.

    Raises UserError with file and line for what is no JSON object, has no prompt or an empty one, or has no picture
    where others have one, or a picture that is not there.
    """
    path = pathlib.Path(file)
    try:
        with open(path, encoding="utf-8-sig") as lines:
            found = [_row(path, number, line) for number, line in enumerate(lines, 1)]
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is no text in UTF-8 ({error}); save it as such") from None
    except OSError as error:
        raise UserError(f"cannot read {file} ({error.strerror}); data.name is to be a file of prompts") from None
    if not found:
        raise UserError(f"{file} is empty; write one prompt a line")
    texts, pictures = ([row[i] for row in found] for i in range(2))
    if any(pictures):
        if None in pictures:
            raise UserError(f"{file} line {pictures.index(None) + 1} has no image, but others have; give all or none")
        return Prompts(texts, pictures)
    distinct = list(dict.fromkeys(texts))
    if len(distinct) < len(texts):
        warnings.warn(f"{file}: {len(texts) - len(distinct)} prompts come again and are left out", stacklevel=2)
    return Prompts(distinct, [])


def _row(path: pathlib.Path, number: int, line: str) -> tuple[str, str | None]:
    """Prompt and picture of a line."""
    row = _parsed(path, number, line) if path.suffix == ".jsonl" else {"prompt": line}
    text, picture = row.get("prompt"), row.get("image")
    if not isinstance(text, str):
        raise UserError(f'{path} line {number} has no prompt; write {{"prompt": "..."}}')
    if not text.strip():
        raise UserError(f"{path} line {number} has an empty prompt; write one, or remove the line")
    if picture is None:
        return text.strip(), None
    place = path.parent / str(picture)
    if not isinstance(picture, str) or not place.is_file():
        raise UserError(f"{path} line {number} names image {picture!r}, which is no file; its place is {place}")
    return text.strip(), str(place)


def _parsed(path: pathlib.Path, number: int, line: str) -> dict:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"{path} line {number} is no JSON ({error}); write one object a line") from None
    if not isinstance(row, dict):
        raise UserError(f'{path} line {number} is no JSON object; write {{"prompt": "..."}}')
    return row
