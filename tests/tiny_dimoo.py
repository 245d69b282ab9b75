"""A small DiMOO with its shortcut, compiled once for each way of sampling, and samplers that draw from tables."""

import functools

import jax
import jax.numpy as jnp

from maskrl_jax.models.dimoo import Dimoo, DimooConfig
from maskrl_jax.models.dimoo_shortcut import DimooShortcut, DimooShortcutConfig
from maskrl_jax.sampling import dimoo, draws, maskgit, refresh, shortcut
from maskrl_jax.sampling.dimoo_sequence import Layout, left_padded

LAYOUT = Layout(3, 4, mask=9, newline=8, boa=7, boi=6, eoi=5, eoa=4, code_offset=10, codebook_size=6)
BASE = DimooConfig(vocab_size=16, codebook_size=6, width=16, depth=2, heads=2, kv_heads=2, mlp_width=12)
LIGHT = DimooShortcutConfig(width=16, heads=2, mlp_width=12, zero_init_out=False)
PROMPTS, NULL = ([1, 2, 3], [3, 1, 0, 2, 1]), [2, 0]
N, K, STEPS = LAYOUT.num_tokens, LAYOUT.codebook_size, 6
EMPTY = jnp.full((2, N), K)
RATIO = 0.6  # of the cache


def bound(model, params):
    return lambda *args, **options: model.apply(params, *args, **options)


@functools.cache
def weights():
    """Return parameters of a backbone and of a shortcut whose logits are a few units wide."""
    rows, places = jnp.ones((1, 3, 16)), jnp.zeros((1, 3), jnp.int32)
    params = jax.jit(Dimoo(BASE).init)(jax.random.key(0), places)
    moved = jax.jit(DimooShortcut(LIGHT).init)(jax.random.key(1), rows, rows, places, places == 0, jnp.ones(1))
    return jax.tree.map(lambda x: 2.0 * x, params), moved


def small(params=None):
    """Return (base, move) of the parameters; those of a program are arguments, as XLA folds constants, slowly."""
    params = params or weights()
    return bound(Dimoo(BASE), params[0]), bound(DimooShortcut(LIGHT), params[1])


def conditions(prompts=PROMPTS, null=NULL, multiple=8):
    """Return (cond, null_cond), padded to one length."""
    both = left_padded([*prompts, null], multiple)
    return both.replace(ids=both.ids[:-1], real=both.real[:-1]), both.replace(ids=both.ids[-1], real=both.real[-1])


def keys(*index):
    return jax.vmap(lambda i: jax.random.fold_in(jax.random.key(5), i))(jnp.asarray(index))


def even(budget):
    return refresh.scheduled(refresh.even_steps(STEPS, budget), STEPS)


@jax.jit
def _plain(params, plan, cond, null, keys_B, given):
    return maskgit.decode(dimoo.logits_fn(small(params)[0], LAYOUT), keys_B, cond, null, plan, given, K)


@functools.partial(jax.jit, static_argnames="most")
def _light(params, plan, asks, cond, null, keys_B, given, first, most):
    parts = dimoo.parts(small(params)[0], LAYOUT, null, small(params)[1])
    return shortcut.decode(parts, keys_B, cond, null, plan, asks, given, K, most=most, first=first)


@functools.partial(jax.jit, static_argnames="ratio")
def _cached(params, plan, full, ratio, cond, null, keys_B, given):
    return dimoo.decode_cached(small(params)[0], LAYOUT, keys_B, cond, null, plan, full, ratio, given)


def plain(plan, cond, null, keys_B, given=EMPTY):
    return _plain(weights(), plan, cond, null, keys_B, given[: len(keys_B)])


def light(plan, asks, cond, null, keys_B, given=EMPTY, first=None):
    most = shortcut.most_controls(plan, N)
    return _light(weights(), plan, asks, cond, null, keys_B, given[: len(keys_B)], first, most)


def cached(plan, full, cond, null, keys_B, given=EMPTY, ratio=RATIO):
    return _cached(weights(), plan, full, ratio, cond, null, keys_B, given[: len(keys_B)])


def freeze(monkeypatch, drawn, order):
    """Let samplers draw from tables [T,N,K] and [T,N] of Gumbel noise; "keys" are step numbers then."""
    drawn, order = jnp.asarray(drawn), jnp.asarray(order)

    def draw(steps_B, logp):
        ids = (logp + drawn[steps_B[0]][None]).argmax(-1).astype(jnp.int32)
        return ids, jnp.take_along_axis(logp, ids[..., None], axis=-1)[..., 0]

    monkeypatch.setattr(draws, "step_keys", lambda keys, step, _: jnp.full(len(keys), step))
    monkeypatch.setattr(draws, "draw_tokens", draw)
    monkeypatch.setattr(draws, "gumbel", lambda steps_B, _: jnp.tile(order[steps_B[0]][None], (len(steps_B), 1)))
