"""Encode an image set once, for training without an encoder (docs/input.md).

python -m maskrl_jax.encode --tokenizer=runs/tokenizer --out=runs/tokens
python -m maskrl_jax.main --config=configs/maskgit.py --config.init.tokenizer=runs/tokenizer --config.data.encoded=runs/tokens

Writes shards of codes (a stage `tokenizer`) or of latents' moments (`kl_vae`). Killed at any moment, the same command
goes on with the first shard that is not complete, and ends in the same files. Several machines share the work by
--jobs=<number of them> --job=<which one, from 0>, each into the same folder.
"""

import contextlib
import fcntl
import os
from collections.abc import Iterator

from absl import flags

from maskrl_jax import command, paths
from maskrl_jax.errors import UserError

TOKENIZER = flags.DEFINE_string("tokenizer", None, "finished run of a tokenizer or kl_vae stage", required=True)
OUT = flags.DEFINE_string("out", None, "folder of the shards", required=True)
DATA = flags.DEFINE_string("data", None, "image set; by default the one that the tokenizer was trained on")
TEXT_LENGTH = flags.DEFINE_integer(
    "text_length", 8, "as data.text_length of the generator; also --tokens, --files, --pad"
)
TOKENS = flags.DEFINE_string("tokens", "", "as data.tokens of the generator")
FILES = flags.DEFINE_string("files", "", "as data.tokenizer of the generator")
PAD = flags.DEFINE_integer("pad", 49407, "as data.pad of the generator")
SPLIT = flags.DEFINE_enum("split", "train", ["train", "validation"], "split of the set")
STORE = flags.DEFINE_string("store", "runs/stages", "where data sets are")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 256, "pictures encoded at a time, of all devices", lower_bound=1)
SHARD_SIZE = flags.DEFINE_integer("shard_size", 10_240, "samples of a shard", lower_bound=1)
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "float16"], "of moments; codes are whole numbers")
WORKERS = flags.DEFINE_integer("workers", 0, "processes that decode pictures; 0: threads of this one", lower_bound=0)
JOBS = flags.DEFINE_integer("jobs", 1, "runs of this command that share the shards", lower_bound=1)
JOB = flags.DEFINE_integer("job", 0, "which of them this one is", lower_bound=0)


def check() -> None:
    """Raise for flags that do not go together."""
    if JOB.value >= JOBS.value:
        raise UserError(f"--job={JOB.value} is not one of --jobs={JOBS.value}; they count from 0")
    if not OUT.value:
        raise UserError("--out is empty; name the folder of the shards")
    if paths.is_remote(OUT.value):
        raise UserError(f"--out={OUT.value} lies in a bucket; shards are written to a local folder, name one")


def main() -> None:
    """Encode as the flags say."""
    from maskrl_jax import checkpoint, runner, shards, stored
    from maskrl_jax.data import encoded
    from maskrl_jax.data.dataset import open_dataset
    from maskrl_jax.parallel import Parallel
    from maskrl_jax.tasks import encoding
    from maskrl_jax.tasks.task import Parent

    config = stored.read_config(TOKENIZER.value)
    if config is None or not stored.is_finished(TOKENIZER.value):
        raise UserError(
            f"--tokenizer={TOKENIZER.value} is no finished run; run its training command first, and see docs/input.md"
        )
    if config.task == "tokenizer" and DTYPE.present:
        raise UserError(f"--dtype={DTYPE.value} is of moments, and {TOKENIZER.value} writes codes; leave it out")
    runner.compilation_cache(STORE.value)
    tokenizer = Parent(config, *checkpoint.load_params(TOKENIZER.value), TOKENIZER.value)
    made = encoding.encoding_of(tokenizer, DTYPE.value)
    parallel = Parallel("pmap")
    parallel.rows(BATCH_SIZE.value)
    data = {"name": DATA.value or config.data.name, "text_length": TEXT_LENGTH.value, "pad": PAD.value}
    data |= {"tokens": TOKENS.value, "tokenizer": FILES.value}
    data_dir = os.path.join(STORE.value, "data")
    dataset = open_dataset(data, SPLIT.value, data_dir, made.image_size).with_pictures()
    made_of = (encoding.identity(tokenizer), dataset, SPLIT.value, SHARD_SIZE.value, encoded.texts_of(data))
    manifest = shards.manifest_of(made, *made_of)
    encoded.begin(OUT.value, manifest)
    with _alone(f".{SPLIT.value}-{JOB.value}-of-{JOBS.value}.lock"):
        mine = [shard for shard in manifest.missing(OUT.value) if shard % JOBS.value == JOB.value]
        print(f"encode: {len(mine)} of {manifest.shards} shards to make, {OUT.value}", flush=True)
        shards.write(made, dataset, manifest, OUT.value, mine, parallel, BATCH_SIZE.value, WORKERS.value)
    left = len(manifest.missing(OUT.value))
    if left:
        print(f"{left} of {manifest.shards} shards are for other jobs", flush=True)
        return
    encoded.Shards(OUT.value, manifest).check()
    print(f"{manifest.count} samples in {manifest.shards} shards, each once, in {OUT.value}", flush=True)


@contextlib.contextmanager
def _alone(name: str) -> Iterator[None]:
    """Keep the same command, started twice, from writing the same shards; a kill frees the lock."""
    with open(os.path.join(OUT.value, name), "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another run of this command writes to {OUT.value}; wait for it") from None
        yield


if __name__ == "__main__":
    command.run(main, check, mistakes=(ValueError, OSError))
