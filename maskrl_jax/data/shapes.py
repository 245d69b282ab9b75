"""The embedded set `shapes` as a TFDS builder: procedural, the same on every machine, no download."""

import functools
import io

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from maskrl_jax.data import scenes
from maskrl_jax.data.prepare import Records, prepared

SPLIT_SIZES = {"train": 24_000, "validation": 2_048}
SEED = 0


class Shapes(tfds.core.GeneratorBasedBuilder):
    """One or two coloured shapes on a plain background, each picture with its caption and cell map."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        """Describe the stored features."""
        return self.dataset_info_from_configs(
            description="Procedural pictures of one or two coloured shapes with captions.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(scenes.IMAGE_SIZE, scenes.IMAGE_SIZE, 3)),
                    "caption": tfds.features.Text(),
                    "label": tfds.features.Tensor(shape=(scenes.GRID, scenes.GRID), dtype=np.int32),
                    "tone": tfds.features.Scalar(dtype=np.int32),
                    "index": tfds.features.Scalar(dtype=np.int32),
                }
            ),
        )

    def _split_generators(self, dl_manager):
        """Give each split its generator; nothing is downloaded."""
        return {split: self._generate_examples(split) for split in SPLIT_SIZES}

    def _generate_examples(self, split: str):
        """Yield (index, example); images as PNG bytes, because TFDS encodes arrays with TensorFlow."""
        for index in range(SPLIT_SIZES[split]):
            scene = scene_at(split, index)
            example = {
                "image": io.BytesIO(_png(scenes.render(scene))),
                "caption": str(scene.caption),
                "label": scenes.cell_map(scene),
                "tone": scene.tone,
                "index": index,
            }
            yield index, example


def scene_at(split: str, index: int) -> scenes.Scene:
    """Return the scene of a position in a split: a function of (SEED, split, index) alone."""
    return scenes.sample(np.random.default_rng((SEED, list(SPLIT_SIZES).index(split), index)))


def _png(image: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, format="PNG", compress_level=1)
    return stream.getvalue()


@functools.lru_cache(maxsize=4)
def load(split: str, data_dir: str) -> dict[str, np.ndarray]:
    """Return a split in memory, written to `data_dir` first if need be.

    image uint8 [n, 32, 32, 3], caption str [n], label int32 [n, 8, 8], tone int32 [n]; in the order of the
    index, which differs from the order on disk.
    """

    def make() -> Shapes:
        return Shapes(data_dir=data_dir, file_format="array_record")

    decoders = {"image": tfds.decode.SkipDecoding()}
    stored = Records(prepared(make, "shapes", data_dir), split, decoders)
    records = sorted(stored.take(range(len(stored))), key=lambda record: record["index"])
    columns = {
        "image": np.stack([np.asarray(Image.open(io.BytesIO(record["image"]))) for record in records]),
        "caption": np.array([record["caption"].decode() for record in records]),
        "label": np.stack([record["label"] for record in records]),
        "tone": np.array([record["tone"] for record in records], np.int32),
    }
    for column in columns.values():
        column.setflags(write=False)  # shared by all who open the set
    return columns
