"""Stage `judge`: a classifier of image content; gives the training reward and the Frechet features.

Rewards that are a CLIP are such a stage too, one that is converted and never trained (`clip_rewards`).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from maskrl_jax import state as train_state
from maskrl_jax.axis import mean_gradients
from maskrl_jax.data import captions
from maskrl_jax.data.batches import batch_at, positions_at
from maskrl_jax.data.dataset import Dataset, conditioning_of, open_dataset
from maskrl_jax.data.settings import settings_of
from maskrl_jax.errors import UserError
from maskrl_jax.keys import EVALUATE, TRAIN, sample_keys
from maskrl_jax.models.judge import Judge, JudgeConfig
from maskrl_jax.models.vqgan import to_patches
from maskrl_jax.phase import Phase
from maskrl_jax.rewards.judges import ClipJudge, TrainedJudge, judge_of
from maskrl_jax.tasks.task import Context, Parent, Task

Array = jax.Array


def load(parent: Parent) -> TrainedJudge | ClipJudge:
    """The judge of a stage that is there, which can make targets; its parameters are the parent's."""
    return judge_of(parent.config.model, parent.workdir)


def stitch(
    keys_B: Array, images: Array, cells: Array, other_images: Array, other_cells: Array, patch: int
) -> tuple[Array, Array, Array]:
    """Paste cells of another picture into half of the samples: (images, cells, mixed [B,S,S]).

    Generators make torn objects, duplicates and patchwork backgrounds; a judge that has seen only
    clean pictures scores those at random. An object's label survives where its whole 3x3 stamp looks as
    in one of the two pictures; `mixed` marks cells whose 3x3 neighbourhood looks as in neither. Our choice.
    """
    side = cells.shape[1]

    def paste_mask(key):
        k_use, k_box, k_rate, k_cell = jax.random.split(key, 4)
        corners = jax.random.randint(k_box, (2, 2), 0, side + 1)
        low, high = corners.min(0), corners.max(0)
        grid = jnp.arange(side)
        box = ((grid >= low[0]) & (grid < high[0]))[:, None] & ((grid >= low[1]) & (grid < high[1]))[None]
        rate = jax.random.choice(k_rate, jnp.array([0.0, 0.05, 0.2, 0.5]))
        specks = jax.random.uniform(k_cell, (side, side)) < rate
        return (box ^ specks) & (jax.random.uniform(k_use) < 0.5)

    paste = jax.vmap(paste_mask)(keys_B)
    pixels = jnp.repeat(jnp.repeat(paste, patch, axis=1), patch, axis=2)[..., None]
    stitched = jnp.where(pixels, other_images, images)
    not_self, not_other = _changed(stitched, images, patch), _changed(stitched, other_images, patch)
    label = jnp.where(not_self, jnp.where(not_other, 0, other_cells), cells)
    return stitched, label, not_self & not_other


def _partners(train: Dataset, step: int, batch_size: int, rows: slice, seed: int) -> np.ndarray:
    """Positions of the pictures to paste from: every second one shows the same caption.

    Tokens drawn in one call are a patchwork of pictures that the same caption allows.
    """
    own, samples = positions_at(len(train), step, batch_size, rows, seed)
    any_other, _ = positions_at(len(train), step, batch_size, rows, seed + 1)
    return np.where(samples % 2 == 0, train.alike(own, any_other), any_other)


def _changed(images: Array, origin: Array, patch: int) -> Array:
    """Cells whose 3x3 neighbourhood differs from the origin's anywhere, [B,S,S] bool."""
    differs = (to_patches(images, patch) != to_patches(origin, patch)).any(-1)
    padded = jnp.pad(differs, ((0, 0), (1, 1), (1, 1)))
    side = differs.shape[1]
    return jnp.stack([padded[:, i : i + side, j : j + side] for i in range(3) for j in range(3)]).any(0)


class Wiring:
    """The stage's pure functions, closed over its static configuration."""

    def __init__(self, config: Any):
        self.config = config
        if config.model.kind == "clip":
            raise UserError(
                "a judge of model.kind=clip is not trained here; convert its published weights with "
                "python -m maskrl_jax.convert --from=clip-rewards, and set init.judge to what that makes"
            )
        self.sizes = JudgeConfig(**config.model)
        _check_data(self.sizes, config.data.name)
        self.model = Judge(self.sizes)
        self.optimizer = train_state.optimizer_of(config.optimizer, config.num_steps)
        self.tx = train_state.make_optimizer(self.optimizer)
        self.image_shape = (config.data.image_size, config.data.image_size, 3)

    def init(self, key: Array) -> train_state.TrainState:
        return train_state.create(self.model.init(key, jnp.zeros((1, *self.image_shape))), self.tx)

    def loss(self, params: Any, images: Array, batch: dict, keys_B: Array) -> tuple[Array, dict]:
        """Summed loss and (sum, weight) metrics."""
        if self.sizes.kind == "class":
            logits = self.model.apply(params, images)["class"]
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
            right = (logits.argmax(-1) == batch["label"]).sum().astype(jnp.float32)
            return losses.sum(), {"train/accuracy": (right, jnp.float32(len(images)))}
        other = batch["other_image"].astype(jnp.float32) / 255
        images, cells, mixed = stitch(keys_B, images, batch["label"], other, batch["other_label"], self.sizes.patch)
        out = self.model.apply(params, images)
        cell_loss = optax.softmax_cross_entropy_with_integer_labels(out["cells"], cells).sum((1, 2))
        mixed_loss = optax.sigmoid_binary_cross_entropy(out["mixed"], mixed.astype(jnp.float32)).mean((1, 2))
        whole = ~mixed.any((1, 2))
        tone_loss = whole * optax.sigmoid_binary_cross_entropy(out["tone"], batch["tone"].astype(jnp.float32))
        objects = (cells > 0).sum().astype(jnp.float32)
        found = ((out["cells"].argmax(-1) == cells) & (cells > 0)).sum().astype(jnp.float32)
        return (cell_loss + mixed_loss + tone_loss).sum(), {"train/recall": (found, objects)}

    def update(self, state: Any, frozen: Any, batch: dict, axis: Any) -> tuple[Any, dict]:
        images = batch["image"].astype(jnp.float32) / 255
        keys_B = sample_keys(self.config.seed, TRAIN, state.step, batch["index"])
        (total, metrics), grads = jax.value_and_grad(self.loss, has_aux=True)(state.params, images, batch, keys_B)
        weight = jnp.float32(len(images))
        state, info = train_state.apply_gradients(
            state, mean_gradients(grads, weight, axis), self.tx, ema_decay=self.optimizer.ema_decay
        )
        metrics = axis.all_reduce(metrics | {"train/loss": (total, weight)})
        return state, metrics | {f"train/{name}": (value, jnp.float32(1)) for name, value in info.items()}


def _check_data(sizes: JudgeConfig, name: str) -> None:
    """Raise UserError where the judge cannot read what the set's labels say."""
    if settings_of(name).is_prompts:
        raise UserError(f"a judge reads classes or the captions of shapes, not {name}; name another set")
    conditioning = conditioning_of(name)
    kind = "cells" if conditioning.kind == "caption" else "class"
    known = int(conditioning.null) if kind == "class" else 1 + len(captions.SHAPES) * len(captions.COLOURS)
    if sizes.kind != kind or sizes.num_classes != known:
        raise UserError(
            f"a judge of {name!r} has model.kind={kind} and model.num_classes={known}, "
            f"not {sizes.kind} and {sizes.num_classes}; set both"
        )


def phases(config: Any, parallel: Any) -> list[Phase]:
    """What the stage compiles, with abstract arguments (for the dry run)."""
    wiring = Wiring(config)
    struct = jax.ShapeDtypeStruct
    size, rows = config.data.image_size, config.batch_size
    batch = {"image": struct((rows, size, size, 3), jnp.uint8), "index": struct((rows,), jnp.int32)}
    if wiring.sizes.kind == "cells":
        side = size // wiring.sizes.patch
        batch |= {"label": struct((rows, side, side), jnp.int32), "tone": struct((rows,), jnp.int32)}
        batch |= {"other_image": batch["image"], "other_label": batch["label"]}
    else:
        batch |= {"label": struct((rows,), jnp.int32)}
    state = jax.eval_shape(wiring.init, jax.random.key(0))
    return [Phase("update", wiring.update, (state, {}, batch), kind="update")]


def build(context: Context) -> Task:
    """Wire the judge stage."""
    config, parallel = context.config, context.parallel
    wiring = Wiring(config)
    train = open_dataset(config.data, "train", context.data_dir, config.data.image_size)
    held_out = open_dataset(config.data, "validation", context.data_dir, config.data.image_size)
    rows = parallel.rows(config.batch_size)
    update = parallel.update(wiring.update)
    names = ("image", "index", "label") + (("tone",) if wiring.sizes.kind == "cells" else ())
    read = jax.jit(wiring.model.apply)
    patchwork = jax.jit(functools.partial(stitch, patch=wiring.sizes.patch))

    def batch(step):
        example = batch_at(train, step, config.batch_size, rows, config.seed)
        chosen = {name: example[name] for name in names}
        if wiring.sizes.kind == "cells":
            other = train.take(_partners(train, step, config.batch_size, rows, config.seed))
            chosen |= {"other_image": other["image"], "other_label": other["label"]}
        return chosen

    def evaluate(state, step):
        examples = held_out.take(np.arange(min(config.eval_samples, len(held_out))))
        images, label = examples["image"].astype(np.float32) / 255, examples["label"]
        out = jax.device_get(read(state.ema, images))
        if wiring.sizes.kind == "class":
            return {"eval/accuracy": float((out["class"].argmax(-1) == label).mean())}, {}
        keys_B = sample_keys(config.seed, EVALUATE, 0, jnp.arange(len(images)))
        torn, cells, mixed = jax.device_get(
            patchwork(keys_B, images, label, np.roll(images, 1, 0), np.roll(label, 1, 0))
        )
        seen = jax.device_get(read(state.ema, torn))
        return {
            "eval/exact": float((out["cells"].argmax(-1) == label).all((1, 2)).mean()),
            "eval/tone": float(((out["tone"] > 0) == examples["tone"]).mean()),
            "eval/exact_stitched": float((seen["cells"].argmax(-1) == cells).all((1, 2)).mean()),
            "eval/mixed_accuracy": float(((seen["mixed"] > 0) == mixed).mean()),
        }, {}

    return Task(
        init=lambda key: parallel.init(wiring.init, key),
        batch=batch,
        step=lambda state, b: update(state, {}, b),
        evaluate=evaluate,
    )
