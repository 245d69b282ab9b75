"""Writing the shards of an encoded split: what is not there yet, a batch at a time, pictures read ahead."""

import contextlib
import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from maskrl_jax.data import encoded
from maskrl_jax.data.dataset import Dataset
from maskrl_jax.data.reader import InOrder, is_on_disk
from maskrl_jax.errors import UserError
from maskrl_jax.loop import Prefetch
from maskrl_jax.parallel import Parallel
from maskrl_jax.tasks.encoding import Encoding
from maskrl_jax.writers import Progress


def manifest_of(
    made: Encoding, tokenizer: str, dataset: Dataset, split: str, shard_size: int, texts: str = ""
) -> encoded.Manifest:
    """What the shards of a split will be; `tokenizer` is its identity, `texts` are `encoded.texts_of` the set."""
    first = dataset.take(np.arange(1))
    value = jax.eval_shape(made.encode, made.params, first["image"])
    columns = {"index": np.zeros(1, np.int64)} | {name: first[name] for name in _told(dataset.columns)}
    columns[made.kind] = np.zeros(value.shape, made.dtype)
    fields = encoded.fields_of(columns)
    return encoded.Manifest(tokenizer, dataset.name, split, made.image_size, len(dataset), shard_size, fields, texts)


def write(
    made: Encoding,
    dataset: Dataset,
    manifest: encoded.Manifest,
    folder: str,
    shards: Sequence[int],
    parallel: Parallel,
    batch_size: int,
    workers: int = 0,
) -> None:
    """Encode some shards of a split into a folder, with a line of progress now and then.

    A shard begins with a batch of its own, so that what it holds does not depend on where a run was cut off.
    """
    told = _told(dataset.columns)
    plan = _Plan(dataset.columns, tuple(c for shard in shards for c in _batches(manifest.positions(shard), batch_size)))
    program = parallel.map(lambda params, _, batch, axis: made.encode(params, batch["image"]))
    params = parallel.replicate(made.params)
    with contextlib.ExitStack() as stack:
        progress = stack.enter_context(contextlib.closing(Progress("encode", len(plan.batches))))
        read = plan
        if workers and is_on_disk(dataset):
            read = stack.enter_context(contextlib.closing(InOrder(plan, workers, len(plan.batches))))
        pictures = stack.enter_context(contextlib.closing(Prefetch(read, 0, len(plan.batches))))

        def rows(number: int) -> dict[str, np.ndarray]:
            found, chosen = pictures.next(), plan.batches[number]
            fill = np.arange(batch_size) % len(chosen)  # one shape, one program
            value = parallel.get(program(params, {}, {"image": found["image"][fill]}))[: len(chosen)]
            progress.update(number + 1)
            kept = {name: found[name] for name in told}
            return {"index": chosen, **kept, made.kind: _exact(value, made.dtype)}

        first = 0
        for shard in shards:
            last = first + len(_batches(manifest.positions(shard), batch_size))
            encoded.write_shard(folder, manifest, shard, map(rows, range(first, last)))
            first = last


def _told(columns: dict) -> list[str]:
    """What is stored beside a picture; a set of prompts has no label."""
    return [name for name in ("cond", "label") if name in columns]


def _batches(positions: range, batch_size: int) -> list[np.ndarray]:
    return [np.array(positions[i : i + batch_size], np.int64) for i in range(0, len(positions), batch_size)]


@dataclasses.dataclass(frozen=True)
class _Plan:
    """The batches to be read, by number; what a worker gets, so only what it needs."""

    columns: dict
    batches: tuple[np.ndarray, ...]

    def __call__(self, number: int) -> dict[str, np.ndarray]:
        chosen = self.batches[int(number)]
        return {name: np.asarray(self.columns[name][chosen]) for name in ("image", *_told(self.columns))}


def _exact(value: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Values in the dtype that they are stored in; UserError where it does not hold them."""
    stored = np.asarray(value).astype(dtype)
    if not np.isfinite(stored).all():
        raise UserError(f"latents are not finite in {dtype}; encode with --dtype=float32")
    return stored
