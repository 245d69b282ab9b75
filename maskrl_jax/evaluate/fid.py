"""Frechet Inception Distance of images: `python -m maskrl_jax.evaluate.fid --samples=<> --reference=<> --weights=<>`.

Prints and writes one JSON: the protocol, every metric that is published under its name, and SHA-256 sums of weights,
statistics and images, without which two such numbers cannot be compared.
"""

import dataclasses
import json
import pathlib

from absl import flags

from maskrl_jax import command
from maskrl_jax.errors import UserError, unknown

SAMPLES = flags.DEFINE_string("samples", None, "folder of pictures, or npz with images in arr_0", required=True)
REFERENCE = flags.DEFINE_string(
    "reference", None, "npz of statistics (mu, sigma), or folder or npz of real images", required=True
)
WEIGHTS = flags.DEFINE_string(
    "weights", None, "the public FID checkpoint, pt_inception-2015-12-05-6726825d.pth, or its tensors as .safetensors",
    required=True,
)  # fmt: skip
WEIGHTS_SHA256 = flags.DEFINE_string(
    "weights_sha256", None, "SHA-256 that the file of weights must have, where it is not the published file"
)
PROTOCOL = flags.DEFINE_string("protocol", "torch_fidelity", "adm, torch_fidelity, clean or stretch")
NUM_SAMPLES = flags.DEFINE_integer("num_samples", None, "measure the first so many samples", lower_bound=2)
BATCH_SIZE = flags.DEFINE_integer("batch_size", 64, "images of one call of the network", lower_bound=1)
GROUPS = flags.DEFINE_integer(
    "groups", 10, "groups of the jackknife behind standard errors; a distance each; 0 for none", lower_bound=0
)
SAVE = flags.DEFINE_string(
    "save_statistics", None, "npz to write with the statistics of --samples, and how they were made"
)
OUT = flags.DEFINE_string("out", None, "JSON file to write")


def main() -> None:
    """Measure as the flags say."""
    import jax

    from maskrl_jax.evaluate import extract, image_set, inception_metrics, statistics
    from maskrl_jax.evaluate.protocols import PROTOCOLS
    from maskrl_jax.evaluate.provenance import commit_hash, machine
    from maskrl_jax.parallel import Parallel

    if PROTOCOL.value not in PROTOCOLS:
        raise unknown("protocol", PROTOCOL.value, PROTOCOLS)
    protocol = PROTOCOLS[PROTOCOL.value]
    images = image_set.open_images(SAMPLES.value)
    if NUM_SAMPLES.value and NUM_SAMPLES.value > images.count:
        raise UserError(f"--num_samples={NUM_SAMPLES.value}: {SAMPLES.value} holds {images.count} images")
    for flag in (OUT, SAVE):
        if flag.value and not pathlib.Path(flag.value).parent.is_dir():
            raise UserError(f"--{flag.name} {flag.value}: there is no such folder")
    try:
        params, weights = inception_metrics.read_weights(WEIGHTS.value, WEIGHTS_SHA256.value)
    except ValueError as error:
        raise UserError(
            f"--weights {WEIGHTS.value}: {error}; give the InceptionV3 of the public FID checkpoint"
        ) from None
    parallel = Parallel("pmap")
    network = extract.network(parallel, params)
    batch_size = -(-BATCH_SIZE.value // parallel.num_devices) * parallel.num_devices

    def run(images, keep, groups=1, limit=None):
        return extract.extract(images.read(), network, protocol, batch_size, keep, groups, limit)

    reference, known = inception_metrics.read_reference(REFERENCE.value, protocol, run)
    keep = inception_metrics.kept(protocol, reference)
    samples = run(images, keep, max(GROUPS.value, 1), NUM_SAMPLES.value)
    if SAVE.value:
        statistics.write(SAVE.value, *samples.moments, protocol, samples.rounded)
    result = {
        "protocol": {"name": PROTOCOL.value} | dataclasses.asdict(protocol),
        "metrics": inception_metrics.measure(samples, reference, protocol),
        "remarks": inception_metrics.remarks(samples, reference, protocol),
        "samples": {"path": SAMPLES.value, "sha256": samples.sha256, "count": samples.count},
        "reference": known,
        "weights": weights,
        "software": {
            "commit": commit_hash(pathlib.Path(__file__).parent),
            "jax": jax.__version__,
            "machine": machine(),
        },
    }
    text = json.dumps(result, indent=1, allow_nan=False)
    if OUT.value:
        pathlib.Path(OUT.value).write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    command.run(main, mistakes=(ValueError, OSError))
