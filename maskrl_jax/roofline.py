"""Published figures of the TPU chips, and the least time a program can take on one.

Sources: "How to Scale Your Model" (https://jax-ml.github.io/scaling-book/tpus/, "TPU specs") for bf16 peak,
HBM bandwidth and interconnect; the Cloud TPU pages (https://docs.cloud.google.com/tpu/docs/v5e, /v5p, /tpu7x)
for HBM capacity, in GiB.
"""

import dataclasses

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """Hold the peak rates of one chip, or of one device where a chip shows as several.

    `interconnect` is one torus axis used in both directions (twice the one-way link), which is what a ring
    collective reaches; a compiler that spreads it over more axes can beat it, a missing wrap-around link
    halves it.
    """

    name: str
    flops: float  # bf16 multiply-adds as two, per second
    hbm_bytes: float
    hbm_bandwidth: float  # bytes per second
    interconnect: float  # bytes per second

    def split(self, devices: int) -> "Chip":
        """Return one device's share where `devices` of them share the chip (TPU7x: two)."""
        shares = (self.flops, self.hbm_bytes, self.hbm_bandwidth, self.interconnect)
        return Chip(self.name, *(share / devices for share in shares))


# The keys are the first part of a topology name, "v5e:4x4".
CHIPS = {
    "v4": Chip("TPU v4", 2.75e14, 32 * GIB, 1.2e12, 9.0e10),
    "v5e": Chip("TPU v5e", 1.97e14, 16 * GIB, 8.2e11, 9.0e10),
    "v5p": Chip("TPU v5p", 4.59e14, 95 * GIB, 2.8e12, 1.8e11),
    "v6e": Chip("TPU v6e", 9.20e14, 32 * GIB, 1.6e12, 1.8e11),
    "7x": Chip("TPU7x", 2.30e15, 192 * GIB, 7.4e12, 1.8e11),
}

# What jax calls the device of a chip above: Device.device_kind.
DEVICE_KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "7x",
}


@dataclasses.dataclass(frozen=True)
class StepTime:
    """Hold the three lower bounds of a program in seconds; the largest is the roofline."""

    compute: float
    memory: float
    interconnect: float

    @property
    def seconds(self) -> float:
        return max(dataclasses.astuple(self))

    @property
    def bound(self) -> str:
        """Name what binds: "compute", "memory" or "interconnect"."""
        return max(dataclasses.asdict(self), key=dataclasses.asdict(self).get)


def step_time(chip: Chip, flops: float, bytes_accessed: float, wire_bytes: float) -> StepTime:
    """Divide what one device does by what it can do per second; the three are taken to overlap fully."""
    return StepTime(flops / chip.flops, bytes_accessed / chip.hbm_bandwidth, wire_bytes / chip.interconnect)


def wire_bytes(kind: str, tensor_bytes: float, group: int) -> float:
    """Return the bytes that one device sends for a collective, run as a ring over `group` devices.

    `tensor_bytes` is the whole tensor: what an all-reduce takes, an all-gather returns, a reduce-scatter
    takes. An all-reduce is a reduce-scatter and an all-gather, so it pays twice (the scaling book, "Sharded
    Matrices"). All-to-all is charged like an all-gather, up to 4 times too much on a ring (our choice).
    """
    if kind == "collective-permute":
        return tensor_bytes
    rounds = 2 if kind == "all-reduce" else 1
    return rounds * (group - 1) / group * tensor_bytes
