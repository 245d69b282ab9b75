"""What a generator is told of a picture."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Conditioning:
    """What a generator is told of a picture.

    kind is `caption` (a row of `length` token ids) or `class` (one id, `length` 0). `vocab_size` counts every id a
    model can meet, the null one included; `null` (int32, shape of one condition) stands for "not told": only pads, the
    tokens of no text, or the id after the last class. Pads of Lumina-DiMOO's prompts are -1, which is no id.
    """

    kind: str
    vocab_size: int
    length: int
    null: np.ndarray
