"""Stage `mar`: masked autoregression over continuous tokens with a diffusion head (arXiv 2406.11838).

specs/mar.md says what of it is published, what is read from the official code and what is our choice.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from maskrl_jax import state as train_state
from maskrl_jax.axis import mean_gradients
from maskrl_jax.data.dataset import Conditioning, conditioning_of
from maskrl_jax.distill import diffusion
from maskrl_jax.evaluate.bench import Evaluation, read_sampler
from maskrl_jax.evaluate.measure import System
from maskrl_jax.keys import EVALUATE, TRAIN, sample_keys, step_key
from maskrl_jax.models.kl_vae import Moments
from maskrl_jax.models.mar import Mar
from maskrl_jax.phase import Phase
from maskrl_jax.sampling.mar import orders, to_order
from maskrl_jax.tasks import checks, continuous, encoding, generators
from maskrl_jax.tasks import kl_vae as kl_vae_task
from maskrl_jax.tasks.continuous import MarSampler
from maskrl_jax.tasks.task import Context, Task

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Masking:
    """How many tokens are masked in training: the share is 1 - deviation |normal|, at least `least`.

    Published: .25 and .7, with one draw for a whole batch; here every sample has its own.
    """

    least: float = 0.7
    deviation: float = 0.25

    def __post_init__(self):
        if not 0 < self.least <= 1 or self.deviation <= 0:
            raise ValueError(f"masking.least {self.least} must be in (0, 1] and deviation {self.deviation} above 0")

    def fewest(self, num_tokens: int) -> int:
        return max(int(np.ceil(num_tokens * self.least)), 1)

    def counts(self, keys_B: Array, num_tokens: int) -> Array:
        """Masked tokens of each sample, int32 [B]."""
        lowest = (self.least - 1) / self.deviation
        draws = jax.vmap(lambda key: jax.random.truncated_normal(key, lowest, 0.0))(keys_B)
        counts = jnp.ceil(num_tokens * (1 + self.deviation * draws)).astype(jnp.int32)
        return jnp.clip(counts, self.fewest(num_tokens), num_tokens)


class Wiring:
    """The stage's pure functions, closed over its static configuration."""

    def __init__(self, config: Any, conditioning: Conditioning):
        self.config, self.null = config, conditioning.null
        latents = kl_vae_task.model_config(config.parents.tokenizer.model)
        self.codec = kl_vae_task.codec(latents, None)
        self.sizes = continuous.model_config(config, latents, conditioning)
        self.network = continuous.Network(Mar(self.sizes))
        self.masking = Masking(**config.masking)
        self.process = diffusion.make_process(continuous.DIFFUSION_STEPS)
        if config.repeats < 1:
            raise ValueError(f"repeats {config.repeats} must be at least 1")
        continuous.check_steps(Evaluation(**config.evaluation), MarSampler(**config.sampler), self.sizes.num_tokens)
        self.optimizer = train_state.optimizer_of(config.optimizer, config.num_steps)
        self.tx = train_state.make_optimizer(self.optimizer)

    def init(self, key: Array) -> train_state.TrainState:
        c = self.sizes
        cond = jnp.broadcast_to(jnp.asarray(self.null), (1, *self.null.shape))
        tokens, order = jnp.zeros((1, c.num_tokens, c.channels)), jnp.arange(c.num_tokens)[None]
        return train_state.create(self.network.model.init(key, tokens, order, cond), self.tx)

    def examples(
        self, keys_B: Array, frozen: Any, batch: dict, masking: Masking | None = None
    ) -> tuple[Array, Array, Array]:
        """Tokens [B,L,C] of a batch in a random generation order, that order, and masked counts [B]."""
        order_keys_B, count_keys_B, noise_keys_B = (
            jax.vmap(jax.random.fold_in, (0, None))(keys_B, i) for i in range(3)
        )
        noise = kl_vae_task.token_noise(noise_keys_B, self.codec.config)
        tokens = self.codec.draw(frozen["tokenizer"], self.moments(frozen, batch), noise)
        order_BL = orders(order_keys_B, self.sizes.num_tokens)
        masked_B = (masking or self.masking).counts(count_keys_B, self.sizes.num_tokens)
        return to_order(tokens, order_BL), order_BL, masked_B

    def moments(self, frozen: Any, batch: dict) -> Moments:
        """Posterior of a batch's latents: as stored, or of its uint8 images."""
        if "moments" in batch:
            return Moments(*jnp.split(batch["moments"].astype(jnp.float32), 2, -1))
        return self.codec.moments(frozen["tokenizer"], batch["image"].astype(jnp.float32) / 255)

    def conditions(
        self, params: Any, tokens, order_BL, cond, masked_B, masking: Masking | None = None, dropout: Any = None
    ) -> Array:
        """z [B,L,D] from the visible ones of tokens in generation order; with a key it drops out."""
        first = (masking or self.masking).fewest(self.sizes.num_tokens)
        rngs = None if dropout is None else {"dropout": dropout}
        inputs = (tokens[:, first:], order_BL, cond, masked_B, dropout is not None)
        return self.network.model.apply(params, *inputs, method="backbone", rngs=rngs)

    def draws(self, keys_B: Array, repeats: int) -> tuple[Array, Array]:
        """Times int32 [M,B,L] and noise [M,B,L,C] of every repetition of every token.

        A token's M times are uniform, as published, one in each M-th of the process: their mean varies less (ours).
        """
        c = self.sizes
        shape, last = (repeats, c.num_tokens), len(self.process) - 1
        times = lambda key: diffusion.spread_times(jax.random.fold_in(key, 3), shape, 0, last)  # noqa: E731
        step = jax.vmap(times, out_axes=1)
        noise = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, 4), (*shape, c.channels)), out_axes=1)
        return step(keys_B), noise(keys_B)

    def losses(self, params: Any, keys_B: Array, tokens, z, masked_B, repeats: int) -> tuple[Array, Array, Array]:
        """(squared error, bound) sums over masked rows, and their number."""
        step, noise = self.draws(keys_B, repeats)
        state = diffusion.noised(self.process, tokens[None], step, noise)
        out = self.network.head(params, state, step, self.network.condition(params, z)[None])
        error, bound = diffusion.row_losses(self.process, tokens[None], step, noise, out)
        if self.sizes.prediction == "velocity":
            error = diffusion.velocity_error(self.process, step, error)
        counted = (jnp.arange(self.sizes.num_tokens)[None] < masked_B[:, None])[None]
        return *(jnp.where(counted, x, 0).sum() for x in (error, bound)), (counted.sum() * repeats).astype(jnp.float32)

    def held_out_loss(
        self, params: Any, frozen: Any, images: Array, cond: Array, first: Any = 0
    ) -> tuple[Array, Array]:
        """Squared error of what the head predicts (sum, weight) of held-out images, always under the same draws."""
        keys_B = sample_keys(self.config.seed, EVALUATE, 0, first + jnp.arange(len(images)))
        tokens, order_BL, masked_B = self.examples(keys_B, frozen, {"image": images})
        z = self.conditions(params, tokens, order_BL, cond, masked_B)
        error, _, count = self.losses(params, keys_B, tokens, z, masked_B, 1)
        return error, count

    def update(self, state: Any, frozen: Any, batch: dict, axis: Any) -> tuple[Any, dict]:
        """One optimizer step on images [b,H,W,3] uint8, or their moments [b,L,2C], with conditions."""
        config = self.config
        keys_B = sample_keys(config.seed, TRAIN, state.step, batch["index"])
        tokens, order_BL, masked_B = self.examples(keys_B, frozen, batch)
        dropped = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, 5)))(keys_B)
        keep = (dropped >= config.cond_drop).reshape(-1, *[1] * self.null.ndim)
        cond = jnp.where(keep, batch["cond"], jnp.asarray(self.null)[None])
        # Of a device's samples together: dropout alone depends on how a batch is spread over devices.
        dropout = jax.random.fold_in(step_key(config.seed, TRAIN, state.step), batch["index"][0])

        def loss(params):
            z = self.conditions(params, tokens, order_BL, cond, masked_B, dropout=dropout)
            error, bound, count = self.losses(params, keys_B, tokens, z, masked_B, config.repeats)
            return error + bound, (error, bound, count)

        (_, (error, bound, count)), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
        grads = mean_gradients(grads, count, axis)
        state, info = train_state.apply_gradients(state, grads, self.tx, ema_decay=self.optimizer.ema_decay)
        sums = {"train/mse": (error, count), "train/bound": (bound, count)}
        metrics = {name: axis.all_reduce(pair) for name, pair in sums.items()}
        return state, metrics | {f"train/{name}": (value, jnp.float32(1)) for name, value in info.items()}


def phases(config: Any, parallel: Any) -> list[Phase]:
    """What the stage compiles, with abstract arguments (for the dry run)."""
    conditioning = conditioning_of(config.data)
    checks.judge_reads(config, conditioning.kind)
    wiring = Wiring(config, conditioning)
    parallel.rows(config.evaluation.batch_size)  # refused here rather than when training is over
    struct, latents = jax.ShapeDtypeStruct, wiring.codec.config
    batch = {
        **encoding.example(config, latents, latents.channels),
        "cond": struct((config.batch_size, *conditioning.null.shape), jnp.int32),
        "index": struct((config.batch_size,), jnp.int32),
    }
    frozen = {"tokenizer": encoding.read_by(config, kl_vae_task.abstract_codec(config.parents.tokenizer))}
    state = jax.eval_shape(wiring.init, jax.random.key(0))
    return [Phase("update", wiring.update, (state, frozen, batch), kind="update")]


def engine_of(context: Context, wiring: Wiring) -> continuous.Engine:
    """What systems of this stage and of those above it generate with."""
    codec = kl_vae_task.load(context.parents["tokenizer"])
    tokenizer = context.parallel.replicate(codec.params)
    return continuous.Engine(context.parallel, wiring.network, codec, tokenizer, wiring.null)


def studio(context: Context, params: Any) -> continuous.Studio:
    """The trained network as a user samples from it."""
    held_out = generators.conditions_of(context)
    engine = engine_of(context, Wiring(context.config, held_out.conditioning))
    sampler = read_sampler(context.workdir, MarSampler(**context.config.sampler))
    params = context.parallel.replicate(params)
    system = lambda chosen: continuous.chain_system(engine, params, chosen, "fixed", "MAR")  # noqa: E731
    return continuous.Studio(engine, held_out, sampler, system)


def build(context: Context) -> Task:
    """Wire the stage."""
    train = generators.training_set(context)
    wiring = Wiring(context.config, train.conditioning)
    engine = engine_of(context, wiring)

    def system(params: Any, chosen: MarSampler) -> System:
        return continuous.chain_system(engine, params, chosen, "base", "MAR")

    def facts(best):
        return {
            "network calls": "iterations of the backbone, its second branch of guidance not counted; each also runs "
            f"{best.inner_steps} calls of the head",
            "sampler": best.in_words(),
        }

    sampler = MarSampler(**context.config.sampler)
    return generators.base_task(context, wiring, engine.tokenizer, train, system, sampler, facts)
