"""How much of a MaskFocus gradient is signal, by the sampling step it is of and by how the image is masked anew.

python benchmarks/focus_signal.py --workdir=runs/maskfocus      # a finished run of configs/maskfocus.py

Rollouts of the run's base are scored with its rewards and cut into parts of whole groups; each part gives the gradient
of the policy loss of one step, all advantages at full weight. What two parts share is signal: the mean product of
different parts' gradients is its square (unbiased), and what a part's own square has beyond that is noise, which falls
with the number of rollouts.
The table says after how many rollouts the two are equal; "none" where the parts share nothing that can be told from
zero (one standard error over pairs of parts). Writes benchmarks/focus_signal.{json,md}.
"""

import dataclasses
import itertools
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from jax.sharding import Mesh

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from maskrl_jax import paths, runner  # noqa: E402
from maskrl_jax.axis import AXIS, Axis  # noqa: E402
from maskrl_jax.evaluate import provenance  # noqa: E402
from maskrl_jax.rl import critical_steps  # noqa: E402
from maskrl_jax.rl.advantages import group_advantage  # noqa: E402
from maskrl_jax.sampling import routing  # noqa: E402
from maskrl_jax.tasks import generators, maskfocus  # noqa: E402
from maskrl_jax.tasks.rollouts import Rollouts  # noqa: E402

WORKDIR = flags.DEFINE_string("workdir", "runs/maskfocus", "a finished run")
BATCHES = flags.DEFINE_integer("batches", 12, "batches of rollouts")
PARTS = 6
LEARN = ("ids", "commit_step", "cond", "index", "advantage")
MASKS = ("random_group", "random_per_sample", "trajectory")
OUT = ROOT / "benchmarks/focus_signal.json"


def main(_: list[str]) -> None:
    """Roll out, differentiate, write."""
    context, _ = runner.open_workdir(WORKDIR.value)
    train = generators.dataset_of(context, "train")
    wiring = maskfocus.Wiring(context.config, train.conditioning)
    rows, steps = _rolled_out(context, wiring, train), range(wiring.choice.num_steps - 1)
    counts = routing.mask_counts(wiring.choice.num_tokens, wiring.choice.num_steps)
    gain = critical_steps.information_gain(rows["similarity"].mean(0)[None])[0]
    found = {}
    for masks in MASKS:
        gradient = _gradient(context, wiring, masks)
        found[masks] = [_signal(gradient, rows, step) for step in steps]
    done = {
        "config": context.config.name,
        "rollouts": len(rows["ids"]),
        "parts": PARTS,
        "masked": [int(counts[step + 1]) for step in steps],
        "information_gain": [*np.round(np.float64(gain), 4).tolist(), None],
        "rollouts_until_signal_is_noise": found,
        "commit": provenance.commit_hash(ROOT),
        "machine": provenance.machine(),
    }
    paths.write(str(OUT), json.dumps(done, indent=1) + "\n")
    OUT.with_suffix(".md").write_text(_table(done))
    print(_table(done))


def _rolled_out(context, wiring, train) -> dict[str, np.ndarray]:
    """Rollouts of the base with their advantages."""
    engine = generators.engine_of(context, wiring.base.sizes, wiring.base.null)
    none = np.zeros(len(train.pool(held_out=False)), np.float32)
    rollouts = Rollouts(context, wiring, train, wiring.base.frozen(engine, context), none)
    start = context.parallel.replicate(context.parents["maskgit"].params)
    made = []
    for number in range(BATCHES.value):
        batch = rollouts.batch(number)
        out = rollouts.generate(start, batch, number)
        kept = {name: out[name] for name in ("ids", "commit_step", "similarity", "quality")}
        made.append(kept | {name: batch[name] for name in ("cond", "index")})
    rows = {name: np.concatenate([batch[name] for batch in made]) for name in made[0]}
    size = len(rows["ids"]) // PARTS // context.config.group * context.config.group * PARTS
    rows = {name: value[:size] for name, value in rows.items()}
    quality = jnp.asarray(rows["quality"].reshape(-1, context.config.group))
    return rows | {"advantage": np.asarray(group_advantage(quality, jnp.ones(quality.shape, bool))).reshape(-1)}


def _gradient(context, wiring, masks: str):
    """Compile the gradient of the policy loss at the base, flat, float64, of a part of the rollouts."""
    focus = dataclasses.replace(wiring.focus, remask=masks, kl_coefficient=0.0, negative_weight=1.0)
    axis = Axis(1, Mesh(np.array(jax.devices()[:1]), (AXIS,)))

    @jax.jit
    def gradient(params, part):
        grads, _, _ = focus.gradients(params, None, None, part, jnp.zeros(1, jnp.int32), axis)
        return jnp.concatenate([leaf.reshape(-1) for leaf in jax.tree.leaves(grads)])

    return lambda part: np.asarray(gradient(context.parents["maskgit"].params, part), np.float64)


def _signal(gradient, rows, step: int) -> float | None:
    """Rollouts at which signal and noise of the gradient of one step are equal."""
    parts, size = [], len(rows["ids"]) // PARTS
    for number in range(PARTS):
        part = {name: rows[name][number * size : (number + 1) * size] for name in LEARN}
        part |= {"keep": np.ones(size, np.float32), "round": np.zeros(size, np.int32)}
        parts.append(gradient(part | {"steps": np.full((size, 1), step, np.int32)}))
    shared = np.array([a @ b for a, b in itertools.combinations(parts, 2)])
    signal, error = shared.mean(), shared.std(ddof=1) / np.sqrt(len(shared))
    if signal <= error:
        return None
    return float(size * (np.mean([a @ a for a in parts]) - signal) / signal)


def _table(done: dict) -> str:
    lines = [
        "# MaskFocus: rollouts until the gradient's signal is as large as its noise",
        "",
        f"Config {done['config']}, its base before tuning, {done['rollouts']} rollouts in {done['parts']} parts. Commit "
        f"{done['commit']}, {done['machine']}.",
        "",
        f"| step | masked tokens | information gain | {' | '.join(MASKS)} |",
        "|---:|---:|---:|" + "---:|" * len(MASKS),
    ]
    for step, count in enumerate(done["masked"]):
        gain = done["information_gain"][step]
        cells = [done["rollouts_until_signal_is_noise"][masks][step] for masks in MASKS]
        shown = ["none" if cell is None else f"{cell:,.0f}" for cell in cells]
        lines.append(f"| {step} | {count} | {'' if gain is None else f'{gain:.3f}'} | {' | '.join(shown)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    app.run(main)
