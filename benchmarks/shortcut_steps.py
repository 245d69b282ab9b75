"""What the steps of a feature shortcut cost, by the depth of the base, and what its sampling modes save.

The width of the embedded base at several depths, then the published scale, all with random weights:
python benchmarks/shortcut_steps.py --depths=4 --depths=6 --depths=8
python benchmarks/shortcut_steps.py --config=maskgit512 --batch=16 --out=benchmarks/shortcut_steps_512

Per depth of the base: a full step, c (a shortcut step over a full one, as a report has it: of loops of N steps, all of
them full or the first alone), and loops of B full steps in `scan` and `unrolled` form and with step 0 kept; all in
turn, median of 20 after 3. Writes <out>.json.
"""

import json
import pathlib
import sys

import jax
import jax.numpy as jnp
from absl import app, flags

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from configs import shortcut as shortcut_config  # noqa: E402
from maskrl_jax.data.dataset import conditioning_of  # noqa: E402
from maskrl_jax.evaluate import latency, provenance  # noqa: E402
from maskrl_jax.sampling import maskgit, refresh  # noqa: E402
from maskrl_jax.sampling import shortcut as sampling  # noqa: E402
from maskrl_jax.sampling.maskgit import SamplerConfig  # noqa: E402
from maskrl_jax.tasks import maskgit as maskgit_task  # noqa: E402
from maskrl_jax.tasks import shortcut  # noqa: E402

CONFIG = flags.DEFINE_enum("config", "", ("", "maskgit512"), "argument of configs/shortcut.py")
DEPTHS = flags.DEFINE_multi_integer("depths", [], "blocks of the base; without it as many as the config says")
BATCH = flags.DEFINE_integer("batch", 64, "images of a batch")
BUDGET = flags.DEFINE_integer("budget", 8, "B")
OUT = flags.DEFINE_string("out", "benchmarks/shortcut_steps", "result file without its ending")
REPEATS = flags.DEFINE_integer("repeats", latency.REPEATS, "timed runs of each")


def loops(depth: int) -> dict:
    """Closures of one depth: name -> run(repeat)."""
    config, batch = shortcut_config.get_config(CONFIG.value), BATCH.value
    config.parents.maskgit.model.depth, steps = depth, config.curve.num_steps
    conditioning = conditioning_of(config.data.name, config.data.text_length)
    sampler = SamplerConfig(**{**config.parents.maskgit.sampler, "num_steps": steps, "max_steps": steps})
    wiring = shortcut.Wiring(config, conditioning, sampler)
    base = maskgit_task.Wiring(config.parents.maskgit, conditioning).init(jax.random.key(0)).params
    params, plan, sizes = wiring.init(jax.random.key(1)).params, wiring.plan(steps), wiring.sizes
    cond, null = jnp.ones((batch, *conditioning.null.shape), jnp.int32), conditioning.null
    empty = jnp.full((batch, sizes.num_tokens), sizes.mask_id, jnp.int32)
    most = sampling.most_controls(plan, sizes.num_tokens)

    def keys(repeat):
        return jax.random.split(jax.random.key(repeat), batch)

    @jax.jit
    def plain(base, keys_B, plan):
        logits = wiring.base.logits(base)
        return maskgit.decode(logits, keys_B, cond, null, plan, empty, sizes.mask_id).ids

    @jax.jit
    def looped(base, params, keys_B, plan, asks, first=None):
        parts = wiring.parts(params, base)
        options = {"most": most, "first": first}
        return sampling.decode(parts, keys_B, cond, null, plan, asks, empty, sizes.mask_id, **options)[0].ids

    @jax.jit
    def unrolled(base, params, keys_B, first=None):
        parts, full = wiring.parts(params, base), refresh.even_steps(steps, BUDGET.value)
        return sampling.decode_unrolled(
            parts, keys_B, cond, null, plan, full, sizes.num_tokens, sizes.mask_id, first=first
        ).ids

    first = jax.jit(
        lambda base, params: sampling.empty_features(
            wiring.parts(params, base), cond, null, plan, sizes.num_tokens, sizes.mask_id
        )
    )(base, params)
    every, one, some = (refresh.scheduled(refresh.even_steps(steps, b), steps) for b in (steps, 1, BUDGET.value))
    return {
        "all full": lambda r: plain(base, keys(r), plan),
        "all full, the shortcut's loop": lambda r: looped(base, params, keys(r), plan, every),
        "first full": lambda r: looped(base, params, keys(r), plan, one),
        "scan": lambda r: looped(base, params, keys(r), plan, some),
        "unrolled": lambda r: unrolled(base, params, keys(r)),
        "scan, step 0 kept": lambda r: looped(base, params, keys(r), plan, some, first),
        "unrolled, step 0 kept": lambda r: unrolled(base, params, keys(r), first),
    }


def main(_: list[str]) -> None:
    """Measure and write."""
    config = shortcut_config.get_config(CONFIG.value)
    steps = config.curve.num_steps
    result = {"config": config.name, "batch": BATCH.value, "steps": steps, "budget": BUDGET.value, "depths": {}}
    for depth in DEPTHS.value or [config.parents.maskgit.model.depth]:
        seconds = {name: spread.median for name, spread in latency.measure(loops(depth), repeats=REPEATS.value).items()}
        full = seconds["all full"] / steps
        result["depths"][depth] = {
            "full_step_ms": 1000 * full,
            "c": (seconds["first full"] - seconds["all full, the shortcut's loop"] / steps) / (steps - 1) / full,
            "loop_ms": {name: 1000 * value for name, value in seconds.items()},
        }
        print(depth, json.dumps(result["depths"][depth]), flush=True)
    result |= {"commit": provenance.commit_hash(ROOT), "machine": provenance.machine()}
    (ROOT / OUT.value).with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    app.run(main)
