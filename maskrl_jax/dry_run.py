"""Compile the phases of a config without running them, and say what each needs of one device.

    python -m maskrl_jax.main --config=configs/speed_rl.py --dry_run            # the devices of this machine
    python -m maskrl_jax.main --config=configs/speed_rl.py --dry_run=v5e:4x4    # 16 chips that are not here

No data is read and no parent is trained: a task module's `phases(config, parallel) -> list[Phase]` names its
programs and the shapes that go in (`maskrl_jax.phase`); they are compiled through the same `parallel.update`
and `parallel.map` that training uses. All figures are for one device:

- memory is XLA's own; the peak is arguments + outputs + temporaries + program - what outputs share with
  donated arguments;
- FLOPs and bytes accessed are XLA's count, which takes a loop body once, times the loop factor: how much more
  the phase computes when every loop runs its length (`program.loop_factor`). With loops they are estimates,
  and the bytes too many where a pass reads one slice of a stacked array (`nn.scan`), which XLA counts whole;
- collectives are counted per execution, loops included, with the bytes of the whole tensors;
- the roofline time is the largest of compute, memory and interconnect time at the chip's published rates. It
  is n/a for chips without published figures here, such as CPUs.

A phase that the compiler cannot place in memory is reported as "does not fit"; it is not an error.
"""

import dataclasses
import sys
from collections.abc import Callable
from typing import Any, TextIO

import jax

from maskrl_jax import program, roofline
from maskrl_jax.parallel import Parallel
from maskrl_jax.phase import Phase
from maskrl_jax.target import Target, local_target, topology_target


@dataclasses.dataclass(frozen=True)
class Memory:
    """Hold the bytes that one program takes on one device, as XLA reports them."""

    arguments: int
    outputs: int
    shared: int  # outputs that live in donated arguments
    temporary: int
    code: int

    @property
    def peak(self) -> int:
        return self.arguments + self.outputs - self.shared + self.temporary + self.code


@dataclasses.dataclass(frozen=True)
class Needs:
    """Hold what one execution of a compiled phase needs of one device."""

    memory: Memory
    flops: float
    bytes_accessed: float
    loop_factor: float
    collectives: dict[str, program.Traffic]
    time: roofline.StepTime | None  # None for a chip without published figures


@dataclasses.dataclass(frozen=True)
class PhaseReport:
    """Hold the verdict on one phase.

    `fits` is None where the capacity of the device is not known; `needs` is None, and `error` says why, where
    the compiler ran out of memory.
    """

    name: str
    fits: bool | None
    needs: Needs | None
    error: str = ""


def run(
    config: Any, phases: Callable[[Any, Parallel], list[Phase]], topology: str | None, out: TextIO | None = None
) -> list[PhaseReport]:
    """Compile every phase of a stage's config, print a table, return its columns.

    Args:
      config: the resolved config of one stage.
      phases: what names a config's phases (`runner.phases`).
      topology: a TPU topology such as "v5e:4x4"; None or "" for the devices of this machine.
      out: where the table goes; standard output if None.

    Raises UserError for an unknown topology, a missing libtpu, a config that cannot run, or a batch that the
    devices do not divide.
    """
    target = topology_target(topology) if topology else local_target()
    parallel = Parallel(config.parallel, target.devices)
    reports = [measure(phase, parallel, target) for phase in phases(config, parallel)]
    print(table(f"{config.task}, {config.parallel}", target, reports), file=out or sys.stdout)
    return reports


def measure(phase: Phase, parallel: Parallel, target: Target) -> PhaseReport:
    """Compile one phase for the target and read what it needs per device."""
    state, frozen, batch = phase.args
    compiled = (parallel.update if phase.kind == "update" else parallel.map)(phase.fn)
    rows = jax.tree.map(lambda leaf: _local_rows(leaf, parallel), batch)
    args = (parallel.abstract(state), parallel.abstract(frozen), parallel.abstract_batch(rows))
    jaxpr = compiled.jaxpr(*args).jaxpr
    try:
        executable = compiled.lower(*args).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return PhaseReport(phase.name, False, None, str(error).splitlines()[0])
    needs = _needs(executable, jaxpr, phase.loop_trips, target)
    fits = None if target.capacity is None else needs.memory.peak <= target.capacity
    return PhaseReport(phase.name, fits, needs)


def _local_rows(leaf, parallel):
    """Cut a global batch shape to this process' rows, which is what `Parallel.abstract_batch` takes."""
    rows = parallel.rows(leaf.shape[0])
    return jax.ShapeDtypeStruct((rows.stop - rows.start, *leaf.shape[1:]), leaf.dtype)


def _needs(executable, jaxpr, loop_trips: int, target: Target) -> Needs:
    text, cost = executable.as_text(), executable.cost_analysis()
    factor = program.loop_factor(jaxpr, loop_trips) if program.has_loop(text) else 1.0
    flops, accessed = cost.get("flops", 0.0) * factor, cost.get("bytes accessed", 0.0) * factor
    traffic = program.collectives(text, len(target.devices), loop_trips)
    time = None
    if target.chip is not None:
        wire = sum(one.wire_bytes for one in traffic.values())
        time = roofline.step_time(target.chip, flops, accessed, wire)
    return Needs(_memory(executable.memory_analysis()), flops, accessed, factor, traffic, time)


def _memory(stats) -> Memory:
    return Memory(
        arguments=stats.argument_size_in_bytes,
        outputs=stats.output_size_in_bytes,
        shared=stats.alias_size_in_bytes,
        temporary=stats.temp_size_in_bytes,
        code=stats.generated_code_size_in_bytes,
    )


def table(title: str, target: Target, reports: list[PhaseReport]) -> str:
    """Lay the reports out as text: a row per quantity, a column per phase."""
    columns = [_column(report, target) for report in reports]
    labels = [label for label in columns[0] if any(column[label] != "-" for column in columns)]
    heads = [report.name for report in reports]
    widths = [max(map(len, (h, *column.values()))) for h, column in zip(heads, columns, strict=True)]

    def row(label, cells):
        return f"{label:28}" + "".join(f"  {c:>{w}}" for c, w in zip(cells, widths, strict=True))

    lines = [f"dry run: {title}, {target.name}; per device", row("", heads)]
    lines += [row(label, [column[label] for column in columns]) for label in labels]
    lines += [f"{report.name}: {report.error}" for report in reports if report.error]
    return "\n".join(lines) + "\n"


def _column(report: PhaseReport, target: Target) -> dict[str, str]:
    needs, limit = report.needs, _bytes(target.capacity) if target.capacity else "unknown"
    verdict = {True: "fits", False: "does not fit", None: "unknown"}[report.fits]
    rows = _memory_rows(needs.memory) if needs else dict.fromkeys(_memory_rows(Memory(0, 0, 0, 0, 0)), "n/a")
    rows[f"in {limit}"] = verdict
    rows["FLOPs"] = f"{needs.flops:.3g}" if needs else "n/a"
    rows["bytes accessed"] = _bytes(needs.bytes_accessed) if needs else "n/a"
    rows["loop factor (in both)"] = f"x {needs.loop_factor:.3g}" if needs else "n/a"
    for kind in program.COLLECTIVES:
        one = needs.collectives.get(kind) if needs else None
        rows[kind] = f"{one.count} x, {_bytes(one.tensor_bytes)}" if one else "-"
    return rows | _time_rows(needs.time if needs else None)


def _memory_rows(memory: Memory) -> dict[str, str]:
    return {
        "arguments": _bytes(memory.arguments),
        "outputs": _bytes(memory.outputs),
        "outputs in donated arguments": _bytes(memory.shared),
        "temporaries": _bytes(memory.temporary),
        "program": _bytes(memory.code),
        "peak memory": _bytes(memory.peak),
    }


def _time_rows(time: roofline.StepTime | None) -> dict[str, str]:
    if time is None:
        rows = ("compute time", "memory time", "interconnect time", "roofline time", "bound by")
        return dict.fromkeys(rows, "n/a")
    return {
        "compute time": _seconds(time.compute),
        "memory time": _seconds(time.memory),
        "interconnect time": _seconds(time.interconnect),
        "roofline time": _seconds(time.seconds),
        "bound by": time.bound,
    }


def _bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} GiB"


def _seconds(seconds: float) -> str:
    for unit in ("s", "ms", "us"):
        if seconds >= 1:
            return f"{seconds:.3g} {unit}"
        seconds *= 1000
    return f"{seconds:.3g} ns"
