"""Images to the features that a protocol needs, in batches of one size on all devices."""

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from maskrl_jax.evaluate.measure import System
from maskrl_jax.evaluate.moments import Moments, Stream, merged
from maskrl_jax.evaluate.protocols import FidProtocol
from maskrl_jax.models.inception import SIZE, Features, InceptionV3
from maskrl_jax.models.resize import resize
from maskrl_jax.parallel import Parallel

Sample = tuple[str, np.ndarray]  # key, image [H,W,3] of bytes or of floats in [0, 1]
Network = Callable[[np.ndarray], Features]  # images float32 [B,299,299,3] of 0..255


@dataclasses.dataclass(frozen=True)
class Extracted:
    """What is left of a set of images. Row i of the arrays is image i; groups take images in turn."""

    count: int
    sha256: str  # of keys, sizes and bytes of the images, in order
    pool_groups: list[Moments]
    spatial_groups: list[Moments]
    pool: np.ndarray | None  # float32 [n, 2048] where they are kept
    logits: np.ndarray | None  # float32 [n, 1008] where they are kept
    rounded: bool = False  # whether an image was rounded to bytes as the protocol has it

    @property
    def moments(self) -> tuple[Moments, Moments]:
        """Of the pooled and of the spatial features."""
        return merged(self.pool_groups), merged(self.spatial_groups)


def network(parallel: Parallel, params: dict) -> Network:
    """Return InceptionV3 with converted parameters over the devices; B must be a multiple of their number."""
    model = InceptionV3()
    program = parallel.map(lambda _, params, images, axis: model.apply(params, images))
    params = parallel.replicate(params)
    return lambda images: parallel.get(program({}, params, images))


def generated(
    system: System, setting: float, cond: np.ndarray, seed: int, ids: Iterable[int], batch_size: int
) -> Iterator[Sample]:
    """Yield the samples `ids` of a generator, by the condition [P, ...] of each id; the key is the id.

    Noise depends on (seed, id) alone (see `measure.System`), so that any order, split or batch gives the same set.
    """
    ids = np.asarray(list(ids), np.int32)
    for start in range(0, len(ids), batch_size):
        rows = ids[np.minimum(np.arange(start, start + batch_size), len(ids) - 1)]  # filled up: nothing recompiles
        images = system.generate(setting, cond[rows], rows, seed).images
        yield from ((str(row), image) for row, image in zip(rows[: len(ids) - start], images, strict=False))


def extract(
    samples: Iterable[Sample],
    apply: Network,
    protocol: FidProtocol,
    batch_size: int,
    keep: tuple[str, ...] = (),
    groups: int = 1,
    limit: int | None = None,
) -> Extracted:
    """Run the network over samples, the first `limit` of them.

    Args:
      keep: names of Features to keep for every image, "pool" or "logits"; of the others moments alone remain.
      groups: of a jackknife, see `Stream`.

    Raises:
      ValueError: if a key comes twice, or there is no sample.
    """
    digest, seen, rounded = hashlib.sha256(), set(), False
    streams, kept = {name: Stream(groups) for name in ("pool", "spatial")}, {name: [] for name in keep}
    for batch in _batches(samples, batch_size, limit):
        rounded |= any(protocol.rounds(image) for _, image in batch)
        images = [protocol.pixels(image) for _, image in batch]
        for (key, _), image in zip(batch, images, strict=True):
            if key in seen:
                raise ValueError(f"the sample {key} comes twice: every sample counts once")
            seen.add(key)
            digest.update(f"{key}\0{image.shape}".encode() + image.tobytes())
        features = apply(_resized(images, protocol.resize, batch_size))
        for name, stream in streams.items():
            stream.add(getattr(features, name)[: len(batch)])
        for name, rows in kept.items():
            rows.append(getattr(features, name)[: len(batch)])
    if not seen:
        raise ValueError("there are no samples to measure")
    whole = {name: np.concatenate(rows) for name, rows in kept.items()}
    pool, spatial = (stream.groups() for stream in streams.values())
    return Extracted(len(seen), digest.hexdigest(), pool, spatial, whole.get("pool"), whole.get("logits"), rounded)


def _batches(samples, size, limit):
    batch = []
    for index, sample in enumerate(samples):
        if index == limit:
            break
        batch.append(sample)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _resized(images, kind, batch_size) -> np.ndarray:
    """Resize images, alone where they differ in size, and fill the batch up with the last one."""
    if len({image.shape for image in images}) == 1:
        rows = np.minimum(np.arange(batch_size), len(images) - 1)
        return np.asarray(resize(np.stack(images)[rows], kind, SIZE))
    ready = [np.asarray(resize(image[None], kind, SIZE))[0] for image in images]
    return np.stack(ready + [ready[-1]] * (batch_size - len(images)))
