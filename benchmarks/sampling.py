"""What a sampler costs beyond its network calls: T-step sampling against T jitted forwards of the same batch.

python benchmarks/sampling.py --batch=64 --steps=16        # the embedded base's size, random weights, guidance on

Both are timed in one process, interleaved; the smallest of the repeats counts, for it is the least disturbed.
Writes benchmarks/sampling.json.
"""

import json
import pathlib
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from configs import maskgit as maskgit_config  # noqa: E402
from maskrl_jax.data.dataset import conditioning_of  # noqa: E402
from maskrl_jax.evaluate import provenance  # noqa: E402
from maskrl_jax.sampling import draws  # noqa: E402
from maskrl_jax.sampling.maskgit import SamplerConfig, decode, make_plan  # noqa: E402
from maskrl_jax.tasks import forms  # noqa: E402
from maskrl_jax.tasks import maskgit as maskgit_task  # noqa: E402

BATCH = flags.DEFINE_integer("batch", 64, "samples")
STEPS = flags.DEFINE_integer("steps", 16, "T")
REPEATS = flags.DEFINE_integer("repeats", 12, "timed runs of each")
SIZE = flags.DEFINE_string("size", "full", "argument of configs/maskgit.py")


def main(_: list[str]) -> None:
    """Measure and write."""
    config = maskgit_config.get_config(SIZE.value)
    conditioning = conditioning_of(config.data.name)
    sizes = forms.model_config(config, config.parents.tokenizer, conditioning)
    params = maskgit_task.Wiring(config, conditioning).init(jax.random.key(0)).params
    logits_of = forms.generator(sizes).logits
    batch, steps = BATCH.value, STEPS.value
    cond = jnp.ones((batch, *conditioning.null.shape), jnp.int32)
    keys = jax.random.split(jax.random.key(1), batch)
    empty = jnp.full((batch, sizes.num_tokens), sizes.mask_id, jnp.int32)
    plan = make_plan(SamplerConfig(num_steps=steps, max_steps=steps, guidance=2.0), sizes.num_tokens)

    @jax.jit
    def forward(params, ids):
        guided = draws.guided(logits_of(params), conditioning.null)
        return guided(ids, jnp.zeros((batch,), jnp.int32), cond, jnp.full((batch,), 2.0))

    @jax.jit
    def sample(params, plan, keys):
        return decode(logits_of(params), keys, cond, conditioning.null, plan, empty, sizes.mask_id)

    seconds = {"forwards": [], "sampling": []}
    for repeat in range(REPEATS.value + 1):
        began = time.perf_counter()
        for _ in range(steps):
            jax.block_until_ready(forward(params, empty))
        middle = time.perf_counter()
        jax.block_until_ready(sample(params, plan, keys))
        if repeat:  # the first compiles
            seconds["forwards"].append(middle - began)
            seconds["sampling"].append(time.perf_counter() - middle)
    best = {name: float(np.min(values)) for name, values in seconds.items()}
    middle = {name: float(np.median(values)) for name, values in seconds.items()}
    result = {
        "batch": batch,
        "steps": steps,
        "best_seconds": best,
        "median_seconds": middle,
        "ratio_of_best": best["sampling"] / best["forwards"],
        "ratio_of_medians": middle["sampling"] / middle["forwards"],
        "programs": {"sample": sample._cache_size()},
        "commit": provenance.commit_hash(ROOT),
        "machine": provenance.machine(),
    }
    (ROOT / "benchmarks" / "sampling.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    app.run(main)
