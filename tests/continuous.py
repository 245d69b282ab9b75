"""Random weights that do something, and pictures, for stages of the continuous-token family."""

import jax
import jax.numpy as jnp
import numpy as np

from maskrl_jax.models.judge import Judge, JudgeConfig
from maskrl_jax.tasks import kl_vae

MADE = {}


def moved(tree, seed):
    """Every array with noise added: what starts at 0 says nothing."""
    leaves, kind = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    noisy = [x + 0.05 * jax.random.normal(key, x.shape) for x, key in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(kind, noisy)


def random_networks(wiring):
    """(network, what is frozen) of a wiring of `marval` or `marval_rl`; made once for each size."""
    parents = wiring.config.parents
    name = str(parents)
    if name not in MADE:
        network, side = moved(jax.jit(wiring.base.init)(jax.random.key(0)).params, 1), side_of(wiring)
        judge = Judge(JudgeConfig(**parents.judge.model))
        judge = jax.jit(judge.init)(jax.random.key(2), jnp.zeros((1, side, side, 3)))
        made = jax.jit(kl_vae.Wiring(parents.tokenizer).init)(jax.random.key(3))
        tokenizer = {"model": made.params, "latents": made.extra["latents"]}
        MADE[name] = network, {"tokenizer": tokenizer, "judge": judge, "teacher": network, "student": network}
    return MADE[name]


def images(wiring, rows):
    return np.random.default_rng(0).integers(0, 255, (rows, side_of(wiring), side_of(wiring), 3), np.uint8)


def side_of(wiring):
    return wiring.base.codec.config.image_size
