"""What the stages of tokenizers share: they see pictures alone, and are judged by what they make of them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from maskrl_jax.data.dataset import open_pictures
from maskrl_jax.data.reader import reader
from maskrl_jax.evaluate.grid import image_grid
from maskrl_jax.phase import Phase
from maskrl_jax.tasks.task import Context, Task


def phases(config: Any, wiring: Any) -> list[Phase]:
    """What such a stage compiles, with abstract arguments (for the dry run)."""
    image = jax.ShapeDtypeStruct((config.batch_size, *wiring.image_shape), jnp.uint8)
    index = jax.ShapeDtypeStruct((config.batch_size,), jnp.int32)
    state = jax.eval_shape(wiring.init, jax.random.key(0))
    return [Phase("update", wiring.update, (state, {}, {"image": image, "index": index}), kind="update")]


def build(context: Context, wiring: Any, rebuild: Callable[[Any, np.ndarray], tuple[Any, dict]]) -> Task:
    """A stage around its `wiring` (init, update, image_shape).

    `rebuild(state, images [B,H,W,3] in [0,1])` gives the reconstructions and what else is to be logged, by tag.
    """
    config, parallel, size = context.config, context.parallel, wiring.image_shape[0]
    train, held_out = (open_pictures(config.data, split, context.data_dir, size) for split in ("train", "validation"))
    rows, update = parallel.rows(config.batch_size), parallel.update(wiring.update)
    # Stages of before there were workers have no such key.
    read = reader(train, config.batch_size, rows, config.seed, config.data.get("workers", 0))

    def batch(step):
        example = read(step)
        return {"image": example["image"], "index": example["index"]}

    def evaluate(state, step):
        examples = [held_out.get(i) for i in range(min(config.eval_samples, len(held_out)))]
        images = np.stack([e["image"] for e in examples]).astype(np.float32) / 255
        rebuilt, scalars = rebuild(state, images)
        scalars = {"eval/psnr": float(-10 * np.log10(((rebuilt - images) ** 2).mean())), **scalars}
        if held_out.verify is not None:
            captions = held_out.describe(np.stack([e["cond"] for e in examples]))
            verdict = held_out.verify(rebuilt, captions)
            scalars |= {f"eval/verifier_{name}": float(verdict[name].mean()) for name in ("graded", "strict")}
        pairs = np.concatenate([images[:16], rebuilt[:16]])
        return scalars, {"samples/reconstructions": image_grid(pairs, columns=16)}

    return Task(
        init=lambda key: parallel.init(wiring.init, key),
        batch=batch,
        step=lambda state, b: update(state, {}, b),
        evaluate=evaluate,
    )
