"""Stage `tokenizer`: images to a grid of codes and back (VQ with an EMA codebook)."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from maskrl_jax import state as train_state
from maskrl_jax.axis import mean_gradients
from maskrl_jax.errors import UserError
from maskrl_jax.keys import TRAIN, step_key
from maskrl_jax.models.vqgan import Tokenizer
from maskrl_jax.phase import Phase
from maskrl_jax.tasks import codecs, reconstruction
from maskrl_jax.tasks.task import Context, Task

Array = jax.Array
COMMITMENT = 0.25  # van den Oord et al. 2017, eq. 3
DECAY = 0.98  # of the codebook's statistics; ours, short because the stage is
DEAD = 0.02  # a code with less than this share of an even share is restarted; ours


def loss_sums(model: Tokenizer, params: Any, codebook: Array, images: Array) -> tuple[Array, dict]:
    """Reconstruction plus commitment, summed over samples (VQ-VAE; no adversary on the embedded task)."""
    recon, codes, ids = model.apply(params, images, codebook)
    mse = ((recon - images) ** 2).mean((1, 2, 3)).sum()
    commitment = ((codes - codebook[ids]) ** 2).mean((1, 2, 3)).sum()
    return mse + COMMITMENT * commitment, {"mse": mse, "codes": codes, "ids": ids}


def update_codebook(book: dict, codes: Array, ids: Array, row: Array, rows: int, key: Array, axis: Any) -> dict:
    """EMA of every code's members (van den Oord et al. 2017, appendix A.1); dead codes restart.

    A dead code jumps to a code vector of this batch, picked by (row, cell) of the whole batch, so that
    every device picks the same. `row` int32 [b] is each sample's place among the batch's `rows`.
    """
    size, width = book["codes"].shape
    one_hot = jax.nn.one_hot(ids.reshape(-1), size)
    cells = codes.reshape(len(codes), -1, width)
    key_row, key_cell = jax.random.split(key)
    pick_row = jax.random.randint(key_row, (size,), 0, rows)
    pick_cell = jax.random.randint(key_cell, (size,), 0, cells.shape[1])
    mine = (row[:, None] == pick_row[None]).astype(jnp.float32)
    members, sums, spare = axis.all_reduce(
        (
            one_hot.sum(0),
            one_hot.T @ cells.reshape(-1, width),
            jnp.einsum("bk,bke->ke", mine, cells[:, pick_cell]),
        )
    )
    even = members.sum() / size
    counts = DECAY * book["counts"] + (1 - DECAY) * members
    sums = DECAY * book["sums"] + (1 - DECAY) * sums
    dead = counts < DEAD * even
    counts = jnp.where(dead, even, counts)
    sums = jnp.where(dead[:, None], spare * even, sums)
    return {"codes": sums / counts[:, None], "counts": counts, "sums": sums}


def phases(config: Any, parallel: Any) -> list[Phase]:
    """What the stage compiles, with abstract arguments (for the dry run)."""
    return reconstruction.phases(config, Wiring(config))


class Wiring:
    """The stage's pure functions, closed over its static configuration."""

    def __init__(self, config: Any):
        self.config = config
        self.sizes = codecs.sizes(config.model)
        if isinstance(self.sizes, codecs.Published):
            raise UserError(
                f"a tokenizer of model.form={self.sizes.form} is not trained here; convert its published weights with "
                "python -m maskrl_jax.convert"
            )
        self.model = Tokenizer(self.sizes)
        self.optimizer = train_state.optimizer_of(config.optimizer, config.num_steps)
        self.tx = train_state.make_optimizer(self.optimizer)
        self.image_shape = (self.sizes.image_size, self.sizes.image_size, 3)

    def init(self, key: Array) -> train_state.TrainState:
        c = self.sizes
        key_model, key_codes = jax.random.split(key)
        codes = jax.random.normal(key_codes, (c.codebook_size, c.code_width))
        params = self.model.init(key_model, jnp.zeros((1, *self.image_shape)), codes)
        # Equal arrays must be distinct buffers: the state is donated.
        book = {"codes": codes, "counts": jnp.zeros(c.codebook_size), "sums": jnp.zeros_like(codes)}
        return train_state.create(params, self.tx, extra={"codebook": book})

    def update(self, state: Any, frozen: Any, batch: dict, axis: Any) -> tuple[Any, dict]:
        images = batch["image"].astype(jnp.float32) / 255
        book = state.extra["codebook"]

        def loss(params):
            return loss_sums(self.model, params, book["codes"], images)

        grads, aux = jax.grad(loss, has_aux=True)(state.params)
        weight = jnp.float32(len(images))
        grads = mean_gradients(grads, weight, axis)
        key = step_key(self.config.seed, TRAIN, state.step)
        row = batch["index"] % self.config.batch_size
        book = update_codebook(book, aux["codes"], aux["ids"], row, self.config.batch_size, key, axis)
        state, info = train_state.apply_gradients(
            state, grads, self.tx, ema_decay=self.optimizer.ema_decay, extra={"codebook": book}
        )
        mse, weight = axis.all_reduce((aux["mse"], weight))
        used = (book["counts"] > 1e-3).sum().astype(jnp.float32)
        metrics = {"train/mse": (mse, weight), "train/codes_alive": (used, jnp.float32(1))}
        return state, metrics | {f"train/{name}": (value, jnp.float32(1)) for name, value in info.items()}


def build(context: Context) -> Task:
    """Wire the tokenizer stage."""
    wiring = Wiring(context.config)
    tokens = codecs.codec(wiring.sizes, None)
    roundtrip = jax.jit(lambda p, images: (lambda ids: (tokens.decode(p, ids), ids))(tokens.encode(p, images)))

    def rebuild(state, images):
        params = {"model": state.ema, "codebook": state.extra["codebook"]["codes"]}
        rebuilt, ids = jax.device_get(roundtrip(params, images))
        return rebuilt, {"eval/codes_used": float(len(np.unique(ids)))}

    return reconstruction.build(context, wiring, rebuild)
