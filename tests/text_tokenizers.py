"""Small tokenizers whose special tokens have the published ids."""

import json
import pathlib

import clip_weights

DIMOO_MARKS = {"<system>": 126332, "</system>": 126333, "<user>": 126334, "</user>": 126335, "<uncondition>": 126351}
DIMOO_WORDS = {"a": 1, "r": 2, "e": 3, "d": 4, "c": 5, "t": 6, "Ġ": 7, "re": 8, "red": 9, "ca": 10, "cat": 11}


def write_clip(folder: pathlib.Path) -> pathlib.Path:
    """The byte pairs of `clip_weights`, filled up so that start and end are 49406 and 49407."""
    folder.mkdir(exist_ok=True)
    clip_weights.write_tokenizer(folder)
    known = list(json.loads((folder / "vocab.json").read_text()))
    ids = {entry: i for i, entry in enumerate(known[:-2])} | {known[-2]: 49406, known[-1]: 49407}
    (folder / "vocab.json").write_text(json.dumps(ids))
    return folder


def write_dimoo(folder: pathlib.Path, **marks: int) -> pathlib.Path:
    """Byte pairs that know `red`, `cat` and their letters, and the template's marks; `marks` move some elsewhere."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    folder.mkdir(exist_ok=True)
    merges = [("r", "e"), ("re", "d"), ("c", "a"), ("ca", "t")]
    vocabulary = DIMOO_WORDS | DIMOO_MARKS | {f"<{name}>": number for name, number in marks.items()}
    found = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = decoders.ByteLevel()
    found.add_special_tokens(sorted(DIMOO_MARKS))
    found.save(str(folder / "tokenizer.json"))
    return folder
