"""What the `data` of a config says: which set, and how its texts become token ids."""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

PROMPT_FILES = (".txt", ".jsonl")


@dataclasses.dataclass(frozen=True)
class DataSettings:
    """The `data` mapping of a stage; stages of before there were tokens lack all but the first two keys."""

    name: str  # shapes, digits, a file of prompts, a folder of images, or a TFDS set
    text_length: int = 8  # ids of a condition, where it is a text
    tokens: str = ""  # how texts become ids: "" words of shapes, "clip" or "dimoo"
    tokenizer: str = ""  # folder of the tokenizer's files
    pad: int = 49407  # "clip": id behind the end token

    @property
    def is_prompts(self) -> bool:
        """Whether the set is a file of prompts."""
        return self.name.endswith(PROMPT_FILES)

    @property
    def is_folder(self) -> bool:
        """Whether the set is a folder of images; a name without "/" is one of a set, whatever lies here."""
        is_path = "/" in self.name and not self.is_prompts
        return is_path and (self.name.endswith("/") or os.path.isdir(self.name))


def settings_of(data: Mapping[str, Any] | str) -> DataSettings:
    """Read a `data` mapping, or the name of a set alone; other keys of the mapping are left to others."""
    if isinstance(data, str):
        return DataSettings(data)
    known = [field.name for field in dataclasses.fields(DataSettings)]
    return DataSettings(**{key: data[key] for key in known if key in data})


def filled(data: Mapping[str, Any]) -> dict[str, Any]:
    """The mapping with the defaults of what it lacks: equal for stages that see the same data."""
    return {**dict(data), **dataclasses.asdict(settings_of(data))}


def read_keys(data: Mapping[str, Any]) -> dict[str, Any]:
    """The mapping without keys that change nothing: without `tokens` nobody reads the rest of them."""
    unread = () if data.get("tokens") else ("tokens", "tokenizer", "pad")
    return {key: value for key, value in data.items() if key not in unread}
