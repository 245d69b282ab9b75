"""Fake and tabular generators: a few lines each, so that a test knows what a network call must give."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from maskrl_jax.rl.token_terms import Model


@functools.cache
def confident(codes):
    """Return a model that is sure that position i holds code (i + cond) mod K."""

    def logits(ids_BN, timestep_B, cond_B):
        wanted = (jnp.arange(ids_BN.shape[1])[None] + cond_B[:, None]) % codes
        return 50.0 * jax.nn.one_hot(wanted, codes)

    return logits


@functools.cache
def undecided(codes):
    """Return a model that gives every code the same probability."""
    return lambda ids_BN, timestep_B, cond_B: jnp.zeros((*ids_BN.shape, codes))


@functools.cache
def contextual(codes, scale=2.0):
    """Return a model that depends on the whole grid, the timestep and the condition, sample by sample."""
    table = (scale * np.random.default_rng(11).normal(size=(codes + 1, codes))).astype(np.float32)

    def logits(ids_BN, timestep_B, cond_B):
        own = jnp.asarray(table)[ids_BN]
        phase = (ids_BN.sum(-1) + timestep_B + 3 * cond_B)[:, None, None] + jnp.arange(codes)[None, None]
        place = jnp.arange(ids_BN.shape[1])[None, :, None]
        return own + jnp.sin(phase.astype(jnp.float32) * (1 + place))

    return logits


def tabular_params(num_tokens, codes, classes, width=4):
    """Return random parameters of `tabular`; the last class is the null condition."""
    keys = jax.random.split(jax.random.key(5), 4)
    shapes = {"tokens": (codes + 1, width), "place": (num_tokens, width), "cond": (classes, width)}
    params = {name: jax.random.normal(key, shape) for key, (name, shape) in zip(keys[:3], shapes.items(), strict=True)}
    return params | {"head": jax.random.normal(keys[3], (width, codes))}


@functools.cache
def tabular(classes):
    """Return a small network in the form that policy gradients take: features and head."""

    def features(params):
        def fn(ids_BN, timestep_B, cond_B):
            own = params["tokens"][ids_BN]
            others = own.mean(1, keepdims=True) + params["cond"][cond_B][:, None]
            return jnp.tanh(own + others + params["place"][None] + 0.01 * timestep_B[:, None, None])

        return fn

    return Model(features, lambda params: lambda x: x @ params["head"], np.int32(classes - 1))


def logits_of(model, params):
    """Return the model as the samplers take it: (ids, timestep, cond) -> logits."""
    return lambda ids, timestep, cond: model.head(params)(model.features(params)(ids, timestep, cond))
