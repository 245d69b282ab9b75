"""Stage `kl_vae`: images to a grid of Gaussian latents and back, for MAR (specs/mar.md section 2)."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from maskrl_jax import state as train_state
from maskrl_jax.axis import mean_gradients
from maskrl_jax.keys import TRAIN, sample_keys
from maskrl_jax.models.conv_autoencoder import ConvSizes
from maskrl_jax.models.kl_vae import KLVAE, KLVAEConfig, Moments
from maskrl_jax.phase import Phase
from maskrl_jax.tasks import reconstruction
from maskrl_jax.tasks.task import Context, Parent, Task

Array = jax.Array
DECAY = 0.98  # of the latents' statistics; ours


@dataclasses.dataclass(frozen=True)
class LatentCodec:
    """A trained VAE as two functions of its parameters: tokens are latents of mean 0 and unit deviation by channel."""

    config: KLVAEConfig
    params: Any  # {"model": ..., "latents": {"mean": [C], "square": [C]}}
    encode: Callable[[Any, Array, Array], Array]  # (params, images [B,H,W,3] in [0,1], noise [B,L,C]) -> tokens [B,L,C]
    moments: Callable[[Any, Array], Moments]  # (params, images) -> posterior of the latents
    draw: Callable[[Any, Moments, Array], Array]  # (params, moments, noise) -> tokens; reads params["latents"] alone
    decode: Callable[
        [Any, Array], Array
    ]  # (params, tokens [B,L,C]) -> images [B,H,W,3] in [0,1], straight-through clip


def model_config(settings: Any) -> KLVAEConfig:
    """Sizes that a config's `model` names."""
    own = dict(settings)
    levels = own.pop("conv", None)
    return KLVAEConfig(**own, conv=ConvSizes(**levels) if levels else None)


def load(parent: Parent) -> LatentCodec:
    """Open a trained VAE."""
    return codec(model_config(parent.config.model), {"model": parent.params, "latents": parent.extra["latents"]})


def codec(config: KLVAEConfig, params: Any) -> LatentCodec:
    """Encode and decode functions of a VAE's sizes, around the given parameters."""
    model = KLVAE(config)

    def scale(p):
        mean = p["latents"]["mean"]
        return mean, jnp.sqrt(p["latents"]["square"] - mean**2)

    def moments(p, images):
        return model.apply(p["model"], images, method="encode")

    def draw(p, moments, noise):
        mean, deviation = (x[None, None] for x in scale(p))
        return (moments.sample(noise) - mean) / deviation

    def encode(p, images, noise):
        return draw(p, moments(p, images), noise)

    def decode(p, tokens):
        mean, deviation = (x[None, None] for x in scale(p))
        images = model.apply(p["model"], tokens * deviation + mean, method="decode")
        # A reward's gradient must not end where a picture leaves its range.
        return images + jax.lax.stop_gradient(jnp.clip(images, 0.0, 1.0) - images)

    return LatentCodec(config, params, encode, moments, draw, decode)


def abstract_codec(config: Any) -> Any:
    """Shapes of a VAE's parameters, without training one."""
    state = jax.eval_shape(Wiring(config).init, jax.random.key(0))
    return {"model": state.params, "latents": state.extra["latents"]}


def token_noise(keys_B: Array, config: KLVAEConfig) -> Array:
    """Normal noise [B,L,C], a sample from its own key."""
    return jax.vmap(lambda key: jax.random.normal(key, (config.num_tokens, config.channels)))(keys_B)


class Wiring:
    """The stage's pure functions, closed over its static configuration."""

    def __init__(self, config: Any):
        self.config = config
        self.sizes = model_config(config.model)
        self.model = KLVAE(self.sizes)
        self.optimizer = train_state.optimizer_of(config.optimizer, config.num_steps)
        self.tx = train_state.make_optimizer(self.optimizer)
        self.image_shape = (self.sizes.image_size, self.sizes.image_size, 3)

    def init(self, key: Array) -> train_state.TrainState:
        c = self.sizes
        params = self.model.init(key, jnp.zeros((1, *self.image_shape)), jnp.zeros((1, c.num_tokens, c.channels)))
        latents = {"mean": jnp.zeros(c.channels), "square": jnp.ones(c.channels)}
        return train_state.create(params, self.tx, extra={"latents": latents})

    def update(self, state: Any, frozen: Any, batch: dict, axis: Any) -> tuple[Any, dict]:
        """One optimizer step on images [b,H,W,3] uint8: squared error, and a weighted KL by latent."""
        images = batch["image"].astype(jnp.float32) / 255
        noise = token_noise(sample_keys(self.config.seed, TRAIN, state.step, batch["index"]), self.sizes)
        latents = self.sizes.num_tokens * self.sizes.channels

        def loss(params):
            rebuilt, moments = self.model.apply(params, images, noise)
            mse = jnp.square(rebuilt - images).mean((1, 2, 3)).sum()
            divergence = moments.divergence().sum() / latents
            return mse + self.config.kl_weight * divergence, (mse, divergence, moments.sample(noise))

        grads, (mse, divergence, drawn) = jax.grad(loss, has_aux=True)(state.params)
        weight = jnp.float32(len(images))
        grads = mean_gradients(grads, weight, axis)
        sums = axis.all_reduce((drawn.sum((0, 1)), jnp.square(drawn).sum((0, 1)), weight * self.sizes.num_tokens))
        now = {"mean": sums[0] / sums[2], "square": sums[1] / sums[2]}
        # The first batch stands for all before it.
        keep = jnp.minimum(DECAY, state.step / (state.step + 1))
        kept = jax.tree.map(lambda old, new: keep * old + (1 - keep) * new, state.extra["latents"], now)
        state, info = train_state.apply_gradients(
            state, grads, self.tx, ema_decay=self.optimizer.ema_decay, extra={"latents": kept}
        )
        metrics = {"train/mse": axis.all_reduce((mse, weight)), "train/kl": axis.all_reduce((divergence, weight))}
        return state, metrics | {f"train/{name}": (value, jnp.float32(1)) for name, value in info.items()}


def phases(config: Any, parallel: Any) -> list[Phase]:
    """What the stage compiles, with abstract arguments (for the dry run)."""
    return reconstruction.phases(config, Wiring(config))


def build(context: Context) -> Task:
    """Wire the stage."""
    wiring = Wiring(context.config)
    latent = codec(wiring.sizes, None)
    quiet = jnp.zeros((1, wiring.sizes.num_tokens, wiring.sizes.channels))
    roundtrip = jax.jit(lambda p, x: latent.decode(p, latent.encode(p, x, quiet)))

    def rebuild(state, images):
        latents = state.extra["latents"]
        rebuilt = jax.device_get(roundtrip({"model": state.ema, "latents": latents}, images))
        mean, square = jax.device_get((latents["mean"], latents["square"]))
        return rebuilt, {"eval/deviation": float(np.sqrt(square - mean**2).mean())}

    return reconstruction.build(context, wiring, rebuild)
