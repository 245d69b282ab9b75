"""Read what a compiled program does: collectives from its HLO text, loop passes from its jaxpr.

XLA's own cost analysis counts the body of a loop once, whatever the number of passes. Here a loop of fixed
length counts as often as it runs, and one that ends on data as often as the caller says.
"""

import collections
import dataclasses
import math
import re

from jax.extend import core

from maskrl_jax import roofline

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all")
ITEM_BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16, "c64": 64, "c128": 128}

_HEADER = re.compile(r"^(ENTRY )?%([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%[\w.\-]+ = (.*?) ([\w\-]+)\(")
_SHAPE = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|true_computation|false_computation)=%([\w.\-]+)")
_BRANCHES = re.compile(r"(?:branch_computations|called_computations)=\{([^}]*)\}")
_LOOP = re.compile(r"condition=%([\w.\-]+), body=%([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_BOUND = re.compile(r" = s32\[\][^ ]* constant\((\d+)\)")


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Sum one kind of collective: executions, bytes of the whole tensors, bytes that one device sends."""

    count: int = 0
    tensor_bytes: int = 0
    wire_bytes: float = 0.0


def collectives(hlo_text: str, num_devices: int, loop_trips: int = 1) -> dict[str, Traffic]:
    """Count the collectives of one device's optimised HLO, each as often as its loop runs.

    Returns kind -> Traffic for the kinds that occur. `loop_trips` stands for loops whose number of passes
    is not in the text. An asynchronous collective counts at its `-start`.
    """
    computations, entry = _computations(hlo_text)
    runs = _runs(computations, entry, loop_trips)
    found = {}
    for name, lines in computations.items():
        for number, line in enumerate(lines):
            one = _collective(line, num_devices)
            if one:
                # The TPU compiler writes start, middle and end of one collective, all on the same channel.
                channel = re.search(r"channel_id=(\d+)", line)
                key = channel[1] if channel else (name, number)
                found[key] = max(found.get(key, (0, one)), (runs[name], one))
    return _sums(found.values())


def _sums(found) -> dict[str, Traffic]:
    """Add up (executions, (kind, bytes, group)) by kind."""
    sums = collections.defaultdict(Traffic)
    for times, (kind, size, group) in found:
        old, sent = sums[kind], roofline.wire_bytes(kind, size, group)
        sums[kind] = Traffic(old.count + times, old.tensor_bytes + times * size, old.wire_bytes + times * sent)
    return {kind: traffic for kind, traffic in sums.items() if traffic.count}


def has_loop(hlo_text: str) -> bool:
    """Tell whether the optimised program still loops; XLA unrolls short loops."""
    return " while(" in hlo_text


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """Split HLO text into computation name -> instruction lines, and name the entry."""
    computations, entry, name = {}, "", None
    for line in text.splitlines():
        header = _HEADER.match(line)
        if header:
            name = header[2]
            computations[name] = []
            entry = name if header[1] else entry
        elif name and _INSTRUCTION.match(line):
            computations[name].append(line)
    return computations, entry


def _runs(computations: dict[str, list[str]], entry: str, loop_trips: int) -> dict[str, int]:
    """Return how often each computation runs in one execution; a branch counts as taken."""
    runs = collections.defaultdict(int)

    def visit(name: str, times: int):
        runs[name] += times
        for line in computations.get(name, ()):
            branches = re.findall(r"%([\w.\-]+)", " ".join(_BRANCHES.findall(line)))
            for callee in _CALLED.findall(line) + branches:
                visit(callee, times)
            loop = _LOOP.search(line)
            if loop:
                trips = _trips(line, computations.get(loop[1], ()), loop_trips)
                visit(loop[1], times * (trips + 1))
                visit(loop[2], times * trips)

    visit(entry, 1)
    return runs


def _trips(line: str, condition: list[str], loop_trips: int) -> int:
    """Read the passes of a `while`: XLA's annotation, else its condition, else the caller's word.

    The TPU compiler drops the annotation; `lax.scan` always counts from 0 by 1 up to a constant.
    """
    known = _TRIPS.search(line)
    if known:
        return int(known[1])
    bounds = [found[1] for found in map(_BOUND.search, condition) if found]
    counted = any("direction=LT" in step and "ROOT" in step for step in condition)
    return int(bounds[0]) if counted and len(bounds) == 1 else loop_trips


def _collective(line: str, num_devices: int) -> tuple[str, int, int] | None:
    """Return (kind, bytes of the whole tensor, group size) of an instruction line, None for any other."""
    shapes, opcode = _INSTRUCTION.match(line).groups()
    kind = opcode.removesuffix("-start")
    if kind not in COLLECTIVES:
        return None
    group = _group_size(line, num_devices)
    items = _SHAPE.findall(shapes)
    if opcode.endswith("-start") and kind != "all-reduce":
        # The result tuple of a start is (operands, results, counters).
        items = [item for item in items if item != ("u32", "")]
        items = items[len(items) // 2 :]
    sizes = [_bytes(*item) for item in items]
    return kind, sum(sizes) * (group if kind == "reduce-scatter" else 1), group


def _group_size(line: str, num_devices: int) -> int:
    """Read the devices per group in any of the three notations of `replica_groups`; empty means all."""
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", line)
    if listed:
        return listed[1].count(",") + 1
    iota = re.search(r"replica_groups=\[[\d,]*?(\d+)\]<=", line)
    if iota:
        return int(iota[1])
    mesh = re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", line)
    if mesh:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", mesh[2]))
    return num_devices


def _bytes(item: str, dims: str) -> int:
    """Return the size of one HLO shape such as ("f32", "8,128"); a dtype's digits are its bits."""
    digits = re.match(r"[a-z]+(\d+)", item)
    bits = ITEM_BITS.get(item) or (int(digits[1]) if digits else 0)
    return math.prod(int(size) for size in dims.split(",") if size) * bits // 8


def loop_factor(jaxpr: core.Jaxpr, loop_trips: int) -> float:
    """Return how much more a program computes than with every loop body run once (1.0 without loops)."""
    once, total = operations(jaxpr, loop_trips=1, count_scans=False), operations(jaxpr, loop_trips)
    return total / once if once else 1.0


def operations(jaxpr: core.Jaxpr, loop_trips: int, count_scans: bool = True) -> float:
    """Estimate the operations of a jaxpr: exact for products and convolutions, else one per element.

    A `scan` runs `length` times (once unless `count_scans`), a `while` `loop_trips` times, a `cond` its
    dearest branch.
    """
    total = 0.0
    for eqn in jaxpr.eqns:
        inner = [operations(sub, loop_trips, count_scans) for sub in _subjaxprs(eqn.params)]
        name = eqn.primitive.name
        if name == "scan":
            total += sum(inner) * (eqn.params["length"] if count_scans else 1)
        elif name == "while":
            total += sum(inner) * loop_trips
        elif inner:
            total += max(inner) if name == "cond" else sum(inner)
        else:
            total += _own_operations(name, eqn)
    return total


def _own_operations(name: str, eqn) -> float:
    """Return the operations of an equation without a program inside."""
    elements = sum(math.prod(getattr(out.aval, "shape", ())) for out in eqn.outvars)
    if name == "dot_general":
        (contracted, _), _ = eqn.params["dimension_numbers"]
        return 2 * elements * math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
    if name == "conv_general_dilated":
        kernel, layout = eqn.invars[1].aval.shape, eqn.params["dimension_numbers"].rhs_spec
        return 2 * elements * math.prod(kernel) / kernel[layout[0]]
    return elements


def _subjaxprs(params: dict):
    """Yield the programs that an equation holds in its parameters."""
    for value in params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(item, core.ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, core.Jaxpr):
                yield item
