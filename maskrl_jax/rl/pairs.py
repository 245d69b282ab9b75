"""Pack the (rollout, call) pairs that exist into micro-batches, so that padding costs no network calls."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array


def accumulate(fn: Callable[[Array, Array], tuple[Any, Any]], valid_BT: Array, micro_batch: int) -> tuple[Any, Any]:
    """Run fn over all valid pairs, `micro_batch` at a time: (sum of sums, maximum of maxima).

    The number of passes is data, so one compiled program serves every number of calls and takes no
    longer than the pairs need (specs/speed_rl.md 5.4).

    Args:
      fn: (pair int32 [M], real bool [M]) -> (sums, maxima); pair = rollout * T + call. Entries that are
        not real must contribute 0.
      valid_BT: bool [B,T].
      micro_batch: M; fewer where there are not so many pairs.
    """
    flat = valid_BT.reshape(-1)
    micro_batch = min(micro_batch, flat.size)
    order = jnp.argsort(~flat, stable=True).astype(jnp.int32)
    order = jnp.pad(order, (0, -len(order) % micro_batch))
    count = flat.sum()

    def body(index, total):
        start = index * micro_batch
        pair = jax.lax.dynamic_slice(order, (start,), (micro_batch,))
        sums, maxima = fn(pair, start + jnp.arange(micro_batch) < count)
        return jax.tree.map(jnp.add, total[0], sums), jax.tree.map(jnp.maximum, total[1], maxima)

    shapes = jax.eval_shape(fn, order[:micro_batch], jnp.ones((micro_batch,), bool))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return jax.lax.fori_loop(0, (count + micro_batch - 1) // micro_batch, body, zeros)
