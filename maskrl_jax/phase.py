"""What a task tells the dry run about one compiled program: its function and the shapes that go in."""

import dataclasses
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass(frozen=True)
class Phase:
    """Name one compiled program of a task.

    Every task module has `phases(config, parallel) -> list[Phase]`, which needs no data and no parents.

    Args:
      name: what the table calls it ("rollout", "update").
      fn: pure function `fn(state, frozen, batch, axis)` that the task hands to `parallel.update` or `.map`.
      args: (state, frozen, batch), pytrees of `jax.ShapeDtypeStruct`; batch leaves lead with the GLOBAL
        sample axis.
      kind: "update" returns (state, metrics) and donates the state; "map" returns a per-sample pytree.
      loop_trips: passes assumed for a loop that ends on data (early stopping), which no compiler can count;
        give the most it may take. Loops of fixed length (`lax.scan`) are counted from the program.
    """

    name: str
    fn: Callable
    args: tuple[Any, Any, Any]
    kind: str
    loop_trips: int = 1

    def __post_init__(self):
        if self.kind not in ("update", "map"):
            raise ValueError(f"phase {self.name}: kind {self.kind!r} is neither 'update' nor 'map'")
        if self.loop_trips < 1:
            raise ValueError(f"phase {self.name}: loop_trips {self.loop_trips} must be at least 1")
