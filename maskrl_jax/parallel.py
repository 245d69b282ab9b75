"""Devices, and how work is spread over them; no other file knows how many there are.

A pure function `fn(state, frozen, batch, axis)` runs under two strategies without knowing which:
`pmap` replicates state and lets every device see its part of the batch; `sharded` is one jitted program over
global arrays, the large ones split over the devices (FSDP). `axis` hides the difference.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from maskrl_jax.axis import AXIS, Axis
from maskrl_jax.errors import UserError, unknown

STRATEGIES = ("pmap", "sharded")
FSDP_MIN_SIZE = 2**16  # smaller arrays cost more to gather than to keep


class Compiled:
    """Call a pure function on placed state and frozen arrays and on a batch of numpy or device arrays.

    `lower(state, frozen, batch)` lowers it for abstract arguments instead (see `Parallel.abstract`).
    """

    def __init__(self, parallel: "Parallel", program: Callable):
        self._parallel = parallel
        self._program = program
        self._jitted = None

    def _jit(self, state):
        # Under sharded, the new state is placed as the old one, and that is known with the first call only.
        if self._jitted is None:
            self._jitted = self._program(state)
        return self._jitted

    def __call__(self, state: Any, frozen: Any, batch: Any) -> Any:
        return self._jit(state)(state, (frozen, self._parallel.put(batch)))

    def lower(self, state: Any, frozen: Any, batch: Any) -> Any:
        """Lower for `jax.ShapeDtypeStruct` arguments."""
        return self._jit(state).lower(state, (frozen, batch))

    def jaxpr(self, state: Any, frozen: Any, batch: Any) -> Any:
        """Trace for the same arguments as `lower`."""
        return jax.make_jaxpr(self._jit(state))(state, (frozen, batch))


class Parallel:
    """Spread work over devices with one strategy; built once per run.

    num_devices: of all processes; num_local: of this one. Devices are ordered by process, so that the rows
    of one process are contiguous.
    """

    def __init__(self, strategy: str, devices: Sequence[jax.Device] | None = None):
        if strategy not in STRATEGIES:
            raise unknown("parallel strategy", strategy, STRATEGIES)
        devices = list(jax.devices() if devices is None else devices)
        self.strategy = strategy
        self.devices = sorted(devices, key=lambda d: (d.process_index, d.id))
        # One process may compile for a topology that belongs to none: then all its devices count as local.
        alone = jax.process_count() == 1
        self._local = [d for d in self.devices if alone or d.process_index == jax.process_index()]
        self.num_devices = len(self.devices)
        self.num_local = len(self._local)
        self._pmap = strategy == "pmap"
        self._global_mesh = Mesh(np.array(self.devices), (AXIS,))
        # pmap takes and returns arrays of this process only; a sharded program takes global arrays.
        self._mesh = Mesh(np.array(self._local), (AXIS,)) if self._pmap else self._global_mesh
        self._axis = Axis(1) if self._pmap else Axis(self.num_devices, self._mesh)
        self._rows = NamedSharding(self._mesh, P(AXIS))
        self._replicated = NamedSharding(self._mesh, P())

    # Programs

    def update(self, fn: Callable) -> Compiled:
        """Compile fn(state, frozen, batch, axis) -> (state, metrics); the old state is donated.

        metrics: dict of scalars or (sum, weight) pairs that fn has all-reduced.
        """
        return Compiled(self, lambda state: self._compile_update(fn, state))

    def map(self, fn: Callable) -> Compiled:
        """Compile fn(state, frozen, batch, axis) -> per-sample pytree (leading axis samples), left on device.

        The result is opaque: feed it to another program as (part of) a batch, or read it with `get`.
        """
        return Compiled(self, lambda state: self._compile_map(fn))

    def _compile_update(self, fn, state):
        if self._pmap:
            return self._pmapped(fn, (None, None), donate_argnums=(0,))
        placed = jax.tree.map(lambda x: getattr(x, "sharding", None), state)
        program = _bind(self._on_mesh(fn), self._axis)
        return jax.jit(program, donate_argnums=(0,), out_shardings=(placed, self._replicated))

    def _compile_map(self, fn):
        if self._pmap:
            return self._pmapped(fn, 0)
        return jax.jit(_bind(self._gathering(fn), self._axis), out_shardings=self._rows)

    def _on_mesh(self, fn):
        """The same, with the mesh known to models that gather their weights block by block."""

        @functools.wraps(fn)
        def known(*args):
            with jax.sharding.use_abstract_mesh(self._mesh.abstract_mesh):
                return fn(*args)

        return known

    def _gathering(self, fn):
        """The same with whole weights on every device: split, they make the compiler split channels and not rows.

        It then holds the activations of all rows (Meissonic's decoder: 16 pictures in the place of one).
        """

        def gathered(state, frozen, batch, axis):
            state, frozen = jax.lax.with_sharding_constraint((state, frozen), self._replicated)
            return fn(state, frozen, batch, axis)

        return gathered

    def _pmapped(self, fn, out_axes, **options):
        return jax.pmap(
            _bind(fn, self._axis),
            axis_name=AXIS,
            # Nested, not flat (None, None, 0): jax 0.10 takes flat axes for those of the leaves where the
            # arguments happen to have as many leaves as there are arguments.
            in_axes=(None, (None, 0)),
            out_axes=out_axes,
            devices=self.devices,
            **options,
        )

    # State

    def init(self, fn: Callable, *args: Any) -> Any:
        """Run fn(*args) and return its tree placed for the strategy; under sharded no device holds it all."""
        shapes = jax.eval_shape(fn, *args)
        return jax.jit(fn, out_shardings=self.shardings(shapes))(*args)

    def replicate(self, tree: Any) -> Any:
        """Place a tree of host or device arrays as constants of programs, split as state is."""
        return jax.tree.map(_place, tree, self.shardings(tree))

    def shardings(self, tree: Any) -> Any:
        """Return where every array of a state lies: replicated, or its largest divisible axis split."""
        return jax.tree.map(self._sharding, tree)

    def _sharding(self, x):
        if self._pmap or np.size(x) < FSDP_MIN_SIZE:
            return self._replicated
        split = [d for d in np.argsort(x.shape)[::-1] if x.shape[d] % self.num_devices == 0]
        spec = [AXIS if d in split[:1] else None for d in range(x.ndim)]
        return NamedSharding(self._mesh, P(*spec))

    # Batches

    def rows(self, global_batch: int) -> slice:
        """Return which rows of a global batch this process feeds; UserError if they do not divide."""
        if global_batch % self.num_devices:
            raise UserError(
                f"batch of {global_batch} does not divide by {self.num_devices} devices; "
                f"use a multiple of {self.num_devices}"
            )
        per_device = global_batch // self.num_devices
        first = self.devices.index(self._local[0])
        return slice(first * per_device, (first + self.num_local) * per_device)

    def put(self, batch: Any) -> Any:
        """Place this process' rows [b, ...] on its devices; results of `map` pass through unchanged."""
        return jax.tree.map(self._put, batch)

    def _put(self, x):
        if isinstance(x, jax.Array) and _split_in_rows(x.sharding):
            return x
        x = np.asarray(jax.device_get(x))
        if x.ndim == 0 or x.shape[0] % self.num_local:
            raise UserError(
                f"batch of shape {x.shape} does not divide by {self.num_local} devices; "
                f"use a batch size that is a multiple of {self.num_local}"
            )
        if self._pmap:
            return jax.device_put(x.reshape(self.num_local, x.shape[0] // self.num_local, *x.shape[1:]), self._rows)
        with jax.transfer_guard_host_to_device("allow"):  # asked for, unlike what a guard looks for
            return jax.make_array_from_process_local_data(self._rows, x)

    def get(self, outputs: Any) -> Any:
        """Return this process' rows of a result of `map` as numpy, in order."""
        return jax.tree.map(self._get, outputs)

    def _get(self, x):
        if self._pmap:
            x = jax.device_get(x)
            return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])  # -1 would be ambiguous for empty rows
        if x.is_fully_addressable:
            return jax.device_get(x)
        shards = sorted(x.addressable_shards, key=lambda shard: shard.index[0].start)
        return np.concatenate(jax.device_get([shard.data for shard in shards]))

    def gather(self, outputs: Any) -> Any:
        """Return the rows of all processes as numpy, in global order."""
        rows = self.get(outputs)
        if jax.process_count() == 1:
            return rows
        return jax.tree.map(lambda x: multihost_utils.process_allgather(x, tiled=True), rows)

    def of_first(self, numbers: np.ndarray) -> np.ndarray:
        """Return process 0's numbers: what was measured on a clock differs, and all processes must go one way."""
        return numbers if jax.process_count() == 1 else multihost_utils.broadcast_one_to_all(numbers)

    def whole(self, tree: Any) -> Any:
        """Return a state's arrays as numpy, whole on every process."""
        return jax.tree.map(_whole, tree)

    # Checkpoints: pmap keeps arrays per process, a checkpoint is of global arrays

    def to_global(self, state: Any) -> Any:
        """Return the state as arrays over the devices of all processes, sharing the buffers."""
        if not self._pmap or jax.process_count() == 1:
            return state
        return jax.tree.map(lambda x: _rewrap(x, NamedSharding(self._global_mesh, P())), state)

    def to_local(self, state: Any) -> Any:
        """Undo `to_global`."""
        if not self._pmap or jax.process_count() == 1:
            return state
        return jax.tree.map(lambda x: _rewrap(x, self._replicated), state)

    # Abstract arguments, for compiling without running

    def abstract(self, tree: Any) -> Any:
        """Return the ShapeDtypeStructs of a state or of frozen arrays as they would be placed."""
        return jax.tree.map(lambda x, s: _struct(x.shape, x.dtype, s), tree, self.shardings(tree))

    def abstract_batch(self, batch: Any) -> Any:
        """Return the ShapeDtypeStructs that `put` would make of this process' rows [b, ...]."""
        return jax.tree.map(self._abstract_rows, batch)

    def _abstract_rows(self, x):
        if self._pmap:
            shape = (self.num_local, x.shape[0] // self.num_local, *x.shape[1:])
        else:
            shape = (x.shape[0] // self.num_local * self.num_devices, *x.shape[1:])
        return _struct(shape, x.dtype, self._rows)


def _split_in_rows(sharding):
    return isinstance(sharding, NamedSharding) and sharding.spec[:1] == (AXIS,)


def _bind(fn, axis):
    def program(state, constants_and_batch):
        return fn(state, *constants_and_batch, axis)

    program.__name__ = getattr(fn, "__name__", "program")
    return program


def _struct(shape, dtype, sharding):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def _place(x, sharding):
    if sharding.is_fully_addressable:
        return jax.device_put(x, sharding)
    # Over several processes only numpy can be cut into what each of them holds.
    x = _whole(x)
    with jax.transfer_guard_host_to_device("allow"):  # asked for, unlike what a guard looks for
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


def _whole(x):
    if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
        return multihost_utils.process_allgather(x, tiled=True)
    return np.asarray(jax.device_get(x))


def _rewrap(x, sharding):
    shards = [shard.data for shard in x.addressable_shards]
    return jax.make_array_from_single_device_arrays(x.shape, sharding, shards)
