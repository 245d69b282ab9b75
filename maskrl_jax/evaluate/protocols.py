"""Published ways to measure a Frechet Inception Distance, by name: their numbers do not mix.

Sources, read as code: the evaluator of openai/guided-diffusion (`adm`), torch-fidelity 0.4 (`torch_fidelity`),
clean-fid 0.1.35 (`clean`), the metrics of Maskgit-pytorch (`stretch`). Each takes its resize and its splits from there.
Not reproduced, and said so where it matters: the evaluator of ADM compares neighbours in float16 where that stays
finite, we in float64; torch-fidelity's own precision and recall are of VGG-16 features, so that protocol has none here.
"""

import dataclasses

import numpy as np

from maskrl_jax.evaluate.inception_score import even_splits, sized_splits
from maskrl_jax.models.resize import RESIZES

VALUES, ROUNDING = ("clip", "stretch"), ("nearest", "down")
METRICS = ("fid", "sfid", "inception_score", "precision", "recall")


@dataclasses.dataclass(frozen=True)
class FidProtocol:
    """Everything between images and numbers that publications do differently."""

    resize: str  # of models/resize.py, to 299 x 299, not rounded afterwards
    metrics: tuple[str, ...]  # those that are published under this name
    values: str = (
        "clip"  # images in [0, 1] are cut there, or "stretch": each runs from its own least value to its largest
    )
    rounding: str = "nearest"  # of such images to 0..255, or "down"; images of bytes come as they are
    splits: int = 0  # even parts of the Inception Score
    split_size: int = 0  # or parts of this many samples
    shuffle_seed: int | None = None  # of the even parts
    samples: int = 50_000  # that published numbers use

    def __post_init__(self):
        for name, known in (("resize", tuple(RESIZES)), ("values", VALUES), ("rounding", ROUNDING)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} {getattr(self, name)!r} is not one of {', '.join(known)}")
        if not self.metrics or set(self.metrics) - set(METRICS):
            raise ValueError(f"metrics {self.metrics} are not among {', '.join(METRICS)}")
        if "inception_score" in self.metrics and (self.splits > 0) == (self.split_size > 0):
            raise ValueError("an Inception Score needs splits or split_size, one of them")
        if self.samples < 2:
            raise ValueError(f"samples {self.samples} must be at least 2")

    def rounds(self, images: np.ndarray) -> bool:
        """Tell whether `rounding` has a part in `pixels` of these: bytes come as they are unless they are stretched."""
        return images.dtype != np.uint8 or self.values == "stretch"

    def pixels(self, images: np.ndarray) -> np.ndarray:
        """Return images [..., H, W, 3], of bytes or of floats in [0, 1], as the bytes that are measured.

        "stretch" stretches bytes, too.

        Raises:
          ValueError: for another kind of number, or values that are not finite.
        """
        if not self.rounds(images):
            return images
        if images.dtype != np.uint8 and not np.issubdtype(images.dtype, np.floating):
            raise ValueError(f"images must be of bytes or of floats in [0, 1], not of {images.dtype}")
        if not np.isfinite(images).all():
            raise ValueError("images hold values that are not finite")
        scaled = images.astype(np.float32) / (255 if images.dtype == np.uint8 else 1)
        if self.values == "stretch":
            low, high = (extreme(scaled, axis=(-3, -2, -1), keepdims=True) for extreme in (np.min, np.max))
            scaled = (scaled - low) / np.where(high > low, high - low, 1)
        scaled = np.clip(scaled, 0, 1) * 255
        return (np.round(scaled) if self.rounding == "nearest" else scaled).astype(np.uint8)

    def score_splits(self, count: int) -> list[np.ndarray]:
        """Return the rows of each part of the Inception Score of `count` samples."""
        if self.split_size:
            return sized_splits(count, self.split_size)
        return even_splits(count, self.splits, self.shuffle_seed)


PROTOCOLS = {
    # Samples of ADM were rounded down by its own sampler.
    "adm": FidProtocol("bilinear_tf1", METRICS, rounding="down", split_size=5000),
    # MAR's evaluation, too, which rounds to the nearest byte.
    "torch_fidelity": FidProtocol("bilinear_tf1", ("fid", "inception_score"), splits=10, shuffle_seed=2020),
    "clean": FidProtocol("bicubic_pil", ("fid",)),
    # Form A of MaskGIT (specs/maskgit.md section 7); its Inception Score is not listed, whose order we have not verified.
    "stretch": FidProtocol("bilinear_tf1", ("fid", "precision", "recall"), values="stretch", rounding="down"),
}
