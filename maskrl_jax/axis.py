"""The devices as a pure function sees them: what to sum over them, and how rows are cut among them."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXIS = "devices"


@dataclasses.dataclass(frozen=True)
class Axis:
    """Stand for the devices inside a pure function.

    size: shards that the leading axis of the batch still stands for: 1 under pmap, where the function sees
    one device's rows, and the number of devices under sharded, where it sees all rows.
    """

    size: int
    mesh: Mesh | None = None  # None under pmap

    def all_reduce(self, tree: Any) -> Any:
        """Sum over the devices; the identity under sharded, where a sum over rows is global already."""
        # Leaf by leaf, for then a constant is multiplied and not sent; the compiler sends the others together.
        return jax.tree.map(lambda x: jax.lax.psum(x, AXIS), tree) if self.mesh is None else tree

    def largest(self, value: jax.Array) -> jax.Array:
        """Return the maximum over the devices of a scalar; the identity under sharded.

        As a sum of one slot a device: the compiler fuses it with the other sums into one message.
        """
        if self.mesh is not None:
            return value
        slots = jnp.arange(jax.lax.axis_size(AXIS)) == jax.lax.axis_index(AXIS)
        return self.all_reduce(jnp.where(slots, value, 0)).max()

    def in_parts(self, fn: Callable, rows: Any, at_once: int | None, group: int = 1) -> Any:
        """fn(rows [B,...]) -> [B,...], of at most so many rows a device at a time, one part after the other; None: all.

        A part is the largest divisor of a device's rows that is small enough and holds whole groups of neighbours, or
        one group. Every part holds rows of every device.
        """
        own = len(jax.tree.leaves(rows)[0]) // self.size
        if at_once is None or own <= at_once:
            return fn(rows)
        part = max([count for count in range(group, at_once + 1, group) if own % count == 0], default=group)

        def cut(x):
            x = self.split(x.reshape(self.size, -1, part, *x.shape[1:]))
            return x.swapaxes(0, 1).reshape(own // part, self.size * part, *x.shape[3:])

        def joined(x):
            x = x.reshape(own // part, self.size, part, *x.shape[2:]).swapaxes(0, 1)
            return self.split(x.reshape(self.size * own, *x.shape[3:]))

        return jax.tree.map(joined, jax.lax.map(lambda x: fn(self.split(x)), jax.tree.map(cut, rows)))

    def split(self, tree: Any) -> Any:
        """Keep dim 0 of every array spread over the devices; the identity under pmap."""
        if self.mesh is None:
            return tree
        return jax.lax.with_sharding_constraint(tree, NamedSharding(self.mesh, P(AXIS)))


def gathered(weights: Any) -> Any:
    """The same, whole on every device in an update under sharded; of no effect elsewhere.

    For models, which know no axis: the mesh is that of the program that is traced (`Parallel.update`).
    """
    if jax.sharding.get_abstract_mesh().empty:
        return weights
    return jax.lax.with_sharding_constraint(weights, P())


def mean_gradients(grads_sum: Any, weight: jax.Array, axis: Axis) -> Any:
    """Turn the gradient of a weighted sum into the gradient of the mean over all devices.

    Both are all-reduced together and divided once; total weight 0 gives zeros.
    """
    grads_sum, weight = axis.all_reduce((grads_sum, weight))
    scale = jnp.where(weight > 0, 1.0 / jnp.where(weight > 0, weight, 1.0), 0.0)
    return jax.tree.map(lambda g: (g * scale).astype(g.dtype), grads_sum)
