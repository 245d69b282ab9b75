"""What the input path gives a core and what a chip takes of it, for every config at published size that sees pictures.

python benchmarks/input_path.py      # some minutes on two cores, no accelerator

Supply: 500 synthetic JPEGs each of 256 x 256 and of 500 x 375 pixels (about ImageNet's average) in array_record files are
read in batches as training reads them, by 1 and 2 threads and by 1 and 2 worker processes; so are the embedded sets, and
shards of codes and moments of 256 tokens. A figure is the median of REPEATS passes; images a core-second divide by the
processor time of this process, which other work on the machine disturbs less than the wall clock does.

Demand: operations of an update an image, as traced (recomputation counted), from pictures and from shards. A chip at
its published peak (maskrl_jax/roofline.py: the compute time of --dry_run) takes peak / operations images a second, at
less utilisation in proportion. Writes benchmarks/input_path.json and .md.
"""

import contextlib
import importlib
import io
import json
import os
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable

import jax
import numpy as np
from absl import app, flags, logging
from array_record.python import array_record_data_source, array_record_module
from PIL import Image

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from maskrl_jax import paths, program, roofline  # noqa: E402
from maskrl_jax.data import encoded  # noqa: E402
from maskrl_jax.data.batches import batch_at  # noqa: E402
from maskrl_jax.data.dataset import Dataset, open_dataset  # noqa: E402
from maskrl_jax.data.images import StoredColumn, decoded  # noqa: E402
from maskrl_jax.data.reader import reader  # noqa: E402
from maskrl_jax.evaluate import provenance  # noqa: E402
from maskrl_jax.parallel import Parallel  # noqa: E402

STORE = flags.DEFINE_string("store", "runs/stages", "where the embedded sets are")
OUT = flags.DEFINE_string("out", "benchmarks/input_path", "result files without their ending")

PICTURES, BATCH, BATCHES, REPEATS, QUALITY = 500, 100, 10, 5, 90
SIZES = {"256": (256, 256, 256), "500x375": (500, 375, 256), "500x375 to 512": (500, 375, 512)}
CONFIGS = {
    "maskgit": ("port256", "port512", "google256", "google512"),
    "mar": ("base", "large", "huge"),
    "marval": ("base", "large", "huge"),
}
CHIPS = ("v5e", "v5p", "v6e", "7x")
USED = 0.4  # of a chip's peak: a share that good training programs reach
READ = {256: "500x375, 1 thread", 512: "500x375 to 512, 1 thread"}  # the supply that cores are counted with, by size


def jpeg(rng: np.random.Generator, width: int, height: int) -> bytes:
    """A smooth picture with some noise: 65 kB at 500 x 375, where ImageNet's are larger."""
    small = rng.integers(0, 256, (height // 16, width // 16, 3), np.uint8)
    smooth = np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
    noisy = np.clip(smooth + rng.integers(-12, 13, smooth.shape), 0, 255).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(noisy).save(stream, format="JPEG", quality=QUALITY)
    return stream.getvalue()


class Stored:
    """Records of one array_record file, as `prepare.Records` gives them."""

    def __init__(self, path: str):
        self._source = array_record_data_source.ArrayRecordDataSource([path])

    def __len__(self) -> int:
        return len(self._source)

    def take(self, positions) -> list[dict]:
        """Records at int positions."""
        return [{"image": value} for value in self._source.__getitems__([int(i) for i in positions])]


class Resized:
    """What StoredColumn does with a stored picture; a class, so that workers can be sent it."""

    def __init__(self, side: int):
        self.side = side

    def __call__(self, value: bytes) -> np.ndarray:
        return decoded(value, self.side)


def pictures(folder: str, name: str, threads: int) -> Dataset:
    """The synthetic set of a size, written when first asked for."""
    width, height, side = SIZES[name]
    path = os.path.join(folder, f"{width}x{height}.array_record")
    if not os.path.exists(path):
        rng, writer = np.random.default_rng(0), array_record_module.ArrayRecordWriter(path, "group_size:1")
        for _ in range(PICTURES):
            writer.write(jpeg(rng, width, height))
        writer.close()
    columns = {
        "image": StoredColumn(Stored(path), "image", Resized(side), threads),
        "label": np.zeros(PICTURES, np.int32),
    }
    return Dataset(name, columns, None, None, None)


def shards(folder: str, kind: str) -> Dataset:
    """ImageNet's codes or moments at 256 tokens; numbers are random."""
    count, rng = 20_000 if kind == "tokens" else 4_000, np.random.default_rng(0)
    value = rng.integers(0, 1024, (count, 256)).astype(np.uint16)
    if kind == "moments":
        value = rng.standard_normal((count, 256, 32), np.float32)
    label = np.zeros(count, np.int32)
    rows = {"index": np.arange(count), "cond": label, "label": label, kind: value}
    place = os.path.join(folder, kind)
    manifest = encoded.Manifest("", "", "train", 256, count, count // 4, encoded.fields_of(rows))
    encoded.begin(place, manifest)
    for shard in range(4):
        chosen = np.array(manifest.positions(shard))
        encoded.write_shard(place, manifest, shard, [{name: x[chosen] for name, x in rows.items()}])
    return Dataset(kind, encoded.Shards(place, manifest).columns(), None, None, None)


def measured(read: Callable[[int], dict], batch: int, batches: int = BATCHES) -> dict[str, float]:
    """Images a second and a core-second of batches read in order; the first is not timed."""
    read(0)
    found = {"images_per_second": [], "images_per_core_second": []}
    for repeat in range(REPEATS):
        wall, used = time.monotonic(), time.process_time()
        for step in range(batches):
            read(1 + repeat * batches + step)
        found["images_per_second"].append(batch * batches / (time.monotonic() - wall))
        found["images_per_core_second"].append(batch * batches / (time.process_time() - used))
    return {name: statistics.median(values) for name, values in found.items()}


def supply(folder: str) -> dict[str, dict[str, float]]:
    """Every way to read, by its name."""
    found, rows = {}, slice(0, BATCH)
    for name in SIZES:
        for threads in (1, 2):
            label = f"{name}, {threads} thread" + "s" * (threads > 1)
            found[label] = measured(reader(pictures(folder, name, threads), BATCH, rows, 0), BATCH)
    for workers in (1, 2):
        read = reader(pictures(folder, "500x375", 1), BATCH, rows, 0, workers)
        speed = measured(read, BATCH)
        # The processor time of workers is not this process'.
        found[f"500x375, {workers} worker" + "s" * (workers > 1)] = {"images_per_second": speed["images_per_second"]}
    for name in ("shapes", "digits"):
        train = open_dataset(name, "train", os.path.join(STORE.value, "data"), 32)
        found[f"{name}, in memory"] = measured(reader(train, 512, slice(0, 512), 0), 512)
    for kind in encoded.KINDS:
        one = shards(folder, kind)
        found[f"shards of {kind}"] = measured(lambda step, one=one: batch_at(one, step, 512, slice(0, 512), 0), 512, 4)
    return found


def operations(name: str, argument: str, folder: str) -> float:
    """Of an update an image, as traced."""
    config = importlib.import_module(f"configs.{name}").get_config(argument)
    rows = config.batch_size = 8
    config.evaluation.batch_size, config.data.encoded = 8, folder
    module, parallel = importlib.import_module(f"maskrl_jax.tasks.{name}"), Parallel("sharded", jax.devices()[:1])
    (phase,) = (phase for phase in module.phases(config, parallel) if phase.name == "update")
    state, frozen, batch = phase.args
    arguments = parallel.abstract(state), parallel.abstract(frozen), parallel.abstract_batch(batch)
    return program.operations(parallel.update(phase.fn).jaxpr(*arguments).jaxpr, 1) / rows


def demand() -> list[dict]:
    """One row a config."""
    rows = []
    for name, arguments in CONFIGS.items():
        for argument in arguments:
            row = {"config": f"{name}.py:{argument}"}
            for kind, folder in (("pictures", ""), ("shards", "shards")):
                row[kind] = operations(name, argument, folder)
            print(row, flush=True)
            rows.append(row)
    return rows


def table(facts: dict, found: dict, rows: list[dict]) -> str:
    """Two tables."""
    core = {size: found[name]["images_per_core_second"] for size, name in READ.items()}
    lines = [
        "# The input path",
        "",
        f"Commit {facts['commit']}, {facts['machine']}; protocol: `benchmarks/input_path.py`.",
        "",
    ]
    lines += ["| what is read | images/s | images a core-second |", "|---|---:|---:|"]
    for name, speed in found.items():
        cells = [
            f"{speed[key]:,.0f}" if key in speed else "" for key in ("images_per_second", "images_per_core_second")
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += [
        "",
        f"Images a second that a chip takes at {USED:.0%} of its peak, and host cores that decode as many JPEGs ",
    ]
    lines[-1] += (
        f"({core[256]:,.0f} a core-second, {core[512]:,.0f} to 512 pixels). From shards the encoder's operations are saved, "
        "and reading takes less than a tenth of a core."
    )
    heads = ["config", "GFLOP an image", "from shards"]
    heads += [
        f"{roofline.CHIPS[chip].name}: {what}"
        for chip in CHIPS
        for what in ("images/s", "cores", "images/s from shards")
    ]
    lines += ["", "| " + " | ".join(heads) + " |", "|---|" + "---:|" * (len(heads) - 1)]
    for row in rows:
        supplied = core[512 if "512" in row["config"] else 256]
        cells = [row["config"], f"{row['pictures'] / 1e9:,.0f}", f"{row['shards'] / 1e9:,.0f}"]
        for chip in CHIPS:
            taken, stored_taken = (USED * roofline.CHIPS[chip].flops / row[kind] for kind in ("pictures", "shards"))
            cells += [f"{taken:,.0f}", f"{taken / supplied:.2f}", f"{stored_taken:,.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(_: list[str]) -> None:
    """Measure, trace, write."""
    logging.set_verbosity(logging.WARNING)
    facts = {"machine": provenance.machine(), "commit": provenance.commit_hash(ROOT)}
    with contextlib.ExitStack() as stack:
        found = supply(stack.enter_context(tempfile.TemporaryDirectory()))
    for name, speed in found.items():
        print(name, {key: round(value) for key, value in speed.items()}, flush=True)
    rows = demand()
    out = (ROOT / OUT.value).with_suffix(".json")
    results = {"facts": facts, "supply": found, "demand": rows, "utilisation": USED}
    paths.write(str(out), json.dumps(results, indent=1) + "\n")
    paths.write(str(out.with_suffix(".md")), table(facts, found, rows))
    print(f"wrote {out.with_suffix('.md')}", flush=True)


if __name__ == "__main__":
    app.run(main)
