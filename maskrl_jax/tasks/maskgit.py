"""Stage `maskgit`: the base generator, a bidirectional transformer trained on masked tokens."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from maskrl_jax import state as train_state
from maskrl_jax.axis import Axis, mean_gradients
from maskrl_jax.data.dataset import Conditioning, conditioning_of
from maskrl_jax.evaluate.bench import Evaluation, read_sampler
from maskrl_jax.evaluate.measure import System
from maskrl_jax.evaluate.studio import Studio
from maskrl_jax.evaluate.systems import fixed_program, fixed_system
from maskrl_jax.keys import EVALUATE, TRAIN, sample_keys
from maskrl_jax.phase import Phase
from maskrl_jax.sampling.draws import commit_top
from maskrl_jax.sampling.maskgit import SamplerConfig
from maskrl_jax.tasks import checks, codecs, encoding, forms, generators
from maskrl_jax.tasks.task import Context, Task

Array = jax.Array


def mask_tokens(keys_B: Array, ids_BN: Array, mask_id: int) -> tuple[Array, Array]:
    """Mask ceil(N * 2/pi*arccos(u)) random tokens a sample, u ~ U(0,1): (inputs, masked) [B,N].

    The masking law is form A's (specs/maskgit.md section 6) with an exact count instead of
    independent coins: our choice.
    """
    batch, num_tokens = ids_BN.shape
    level = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, 0)))(keys_B)
    score = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, 1), (num_tokens,)))(keys_B)
    count_B = jnp.maximum(jnp.ceil(num_tokens * 2 / jnp.pi * jnp.arccos(level)), 1)
    masked = commit_top(score, jnp.ones((batch, num_tokens), bool), count_B)
    return jnp.where(masked, mask_id, ids_BN), masked


def masked_cross_entropy(logits_BNK: Array, ids_BN: Array, masked_BN: Array) -> tuple[Array, Array]:
    """Cross-entropy over masked positions as (sum, weight)."""
    logp = jax.nn.log_softmax(logits_BNK)
    token = jnp.take_along_axis(logp, ids_BN[..., None], axis=-1)[..., 0]
    return -(token * masked_BN).sum(), masked_BN.sum().astype(jnp.float32)


def timestep_of(masked_BN: Array, convention: str = "clock") -> Array:
    """What a network that knows its timestep is told of partly masked grids [B,N], [B] (specs/meissonic.md section 6).

    The time of the cosine clock at which so many tokens are masked, by the sampler's convention; a countdown, which a
    training has not, is the clock's, equal at 64 steps.
    """
    share_B = jnp.clip(masked_BN.mean(-1, dtype=jnp.float32), 0.0, 1.0)
    if convention == "mask_ratio":
        return 1000 * share_B
    if convention == "const":
        return jnp.zeros(share_B.shape, jnp.int32)
    done_B = 2 / jnp.pi * jnp.arccos(share_B)
    return jnp.clip(jnp.ceil(64 * (1 - done_B)) - 1, 0, 63).astype(jnp.int32)


class Wiring:
    """The stage's pure functions, closed over its static configuration."""

    def __init__(self, config: Any, conditioning: Conditioning):
        self.config = config
        self.tokens = codecs.sizes(config.parents.tokenizer.model)
        self.codec = codecs.codec(self.tokens, None)
        self.sizes = forms.model_config(config, config.parents.tokenizer, conditioning)
        self.model, self.weights = forms.generator(self.sizes), config.model.get("weights", "float32")
        self.timesteps = config.sampler.get("timesteps", "clock")
        self.null = conditioning.null
        settings = Evaluation(**config.evaluation)
        asked = {"steps": settings.steps, "glance_steps": [settings.glance_steps]}
        generators.check_steps(SamplerConfig(**config.sampler), self.sizes.num_tokens, **asked)
        self.optimizer = train_state.optimizer_of(config.optimizer, config.num_steps)
        self.tx = train_state.make_optimizer(self.optimizer)

    def init(self, key: Array) -> train_state.TrainState:
        params = jax.tree.map(lambda x: x.astype(self.weights), self.model.init(key))
        return train_state.create(params, self.tx)

    def logits(self, params: Any, frozen: Any, inputs_BN: Array, masked_BN: Array, cond: Array) -> Array:
        """Logits [B,N,K] of partly masked tokens."""
        cond, _ = self.codec.told(frozen["tokenizer"], cond, self.null)
        return self.model.logits(params)(inputs_BN, timestep_of(masked_BN, self.timesteps), cond)

    def codes(self, frozen: Any, batch: dict, axis: Axis) -> Array:
        """Codes int32 [b,N] of a batch: as stored, or of its uint8 images."""
        if "tokens" in batch:
            return batch["tokens"].astype(jnp.int32)
        encode = lambda images: self.codec.encode(frozen["tokenizer"], images.astype(jnp.float32) / 255)  # noqa: E731
        return axis.in_parts(encode, batch["image"], self.codec.at_once)

    def held_out_loss(
        self, params: Any, frozen: Any, images: Array, cond: Array, first: Any = 0
    ) -> tuple[Array, Array]:
        """Masked cross-entropy (sum, weight) of held-out images, always under the same masks."""
        keys_B = sample_keys(self.config.seed, EVALUATE, 0, first + jnp.arange(len(images)))
        ids = self.codes(frozen, {"image": images}, Axis(1))
        inputs, masked = mask_tokens(keys_B, ids, self.sizes.mask_id)
        return masked_cross_entropy(self.logits(params, frozen, inputs, masked, cond), ids, masked)

    def update(self, state: Any, frozen: Any, batch: dict, axis: Any) -> tuple[Any, dict]:
        """One optimizer step on images [b,H,W,3] uint8, or their tokens [b,N], with conditions."""
        keys_B = sample_keys(self.config.seed, TRAIN, state.step, batch["index"])
        ids = self.codes(frozen, batch, axis)
        inputs, masked = mask_tokens(keys_B, ids, self.sizes.mask_id)
        dropped = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, 2)))(keys_B)
        keep = (dropped >= self.config.cond_drop).reshape(-1, *[1] * self.null.ndim)
        cond = jnp.where(keep, batch["cond"], jnp.asarray(self.null)[None])

        def loss(params):
            return masked_cross_entropy(self.logits(params, frozen, inputs, masked, cond), ids, masked)

        (total, weight), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
        grads = mean_gradients(grads, weight, axis)
        state, info = train_state.apply_gradients(state, grads, self.tx, ema_decay=self.optimizer.ema_decay)
        metrics = {"train/loss": axis.all_reduce((total, weight))}
        return state, metrics | {f"train/{name}": (value, jnp.float32(1)) for name, value in info.items()}


def phases(config: Any, parallel: Any) -> list[Phase]:
    """What the stage compiles, with abstract arguments (for the dry run)."""
    conditioning = conditioning_of(config.data)
    checks.judge_reads(config, conditioning.kind)
    checks.kept_exactly(config)
    wiring = Wiring(config, conditioning)
    parallel.rows(config.evaluation.batch_size)  # refused here rather than when training is over
    struct = jax.ShapeDtypeStruct
    batch = {
        **encoding.example(config, wiring.codec.config),
        "cond": struct((config.batch_size, *conditioning.null.shape), jnp.int32),
        "index": struct((config.batch_size,), jnp.int32),
    }
    frozen = {"tokenizer": encoding.read_by(config, codecs.abstract(config.parents.tokenizer.model))}
    state = jax.eval_shape(wiring.init, jax.random.key(0))
    return [Phase("update", wiring.update, (state, frozen, batch), kind="update")]


def abstract_params(config: Any, conditioning: Conditioning) -> Any:
    """Shapes of a base model's parameters, without training one."""
    return jax.eval_shape(Wiring(config, conditioning).init, jax.random.key(0)).params


def studio(context: Context, params: Any) -> Studio:
    """The trained base as a user samples from it."""
    held_out = generators.conditions_of(context)
    sizes = forms.model_config(context.config, context.config.parents.tokenizer, held_out.conditioning)
    codec = codecs.load(context.parents["tokenizer"])
    return Studio(
        engine=generators.engine_of(context, sizes, held_out.conditioning.null),
        params=context.parallel.replicate(params),
        dataset=held_out,
        sampler=read_sampler(context.workdir, SamplerConfig(**context.config.sampler)),
        encode=functools.partial(jax.jit(codec.encode), codec.params),
        image_size=codec.config.image_size,
        guided=forms.knows_null(sizes),
    )


def build(context: Context) -> Task:
    """Wire the base-model stage."""
    train = generators.training_set(context)
    wiring = Wiring(context.config, train.conditioning)
    engine = generators.engine_of(context, wiring.sizes, wiring.null)
    program = fixed_program(engine)

    def system(params: Any, chosen: SamplerConfig) -> System:
        return fixed_system(engine, program, params, chosen, "base", "base")

    def facts(best):
        return {
            "sampler": f"{best.mode}, Gumbel {best.gumbel:g}, guidance {best.guidance:g} ({best.guidance_schedule}), "
            f"temperature {best.temperature:g}"
        }

    sampler = SamplerConfig(**context.config.sampler)
    return generators.base_task(context, wiring, engine.tokenizer, train, system, sampler, facts)
