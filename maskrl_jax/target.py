"""The devices that a dry run compiles for: those of this machine, or a TPU topology that is not there."""

import dataclasses
import importlib.util
import math
import os
import re

import jax
from jax.experimental import topologies

from maskrl_jax import roofline
from maskrl_jax.errors import UserError

EXAMPLES = "v4:2x2x1, v5e:4x4, v5p:2x2x1, v6e:4x4, 7x:2x2x1"


@dataclasses.dataclass(frozen=True)
class Target:
    """Name the devices to compile for; `capacity` in bytes and `chip` are per device, None if not known."""

    name: str
    devices: tuple
    capacity: float | None
    chip: roofline.Chip | None


def local_target() -> Target:
    """Describe the devices of this machine."""
    devices = tuple(jax.devices())
    kind = devices[0].device_kind
    version = roofline.DEVICE_KINDS.get(kind)
    chip = _share(roofline.CHIPS[version], devices) if version else None
    return Target(f"{len(devices)} x {kind}", devices, _local_capacity(devices[0]), chip)


def _local_capacity(device) -> float | None:
    """Return the bytes that one device may use; CPU devices share the machine's memory (our choice)."""
    if device.platform == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / jax.local_device_count()
    return (device.memory_stats() or {}).get("bytes_limit")


def topology_target(name: str) -> Target:
    """Describe a TPU topology "<version>:<chips>x<chips>[x<chips>]" through libtpu, without a TPU.

    Raises UserError if libtpu is not installed or does not know the name.
    """
    version, shape = _parse(name)
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("compiling for a TPU topology needs libtpu; run: pip install -e '.[tpu]'")
    _quiet_environment()
    try:
        description = topologies.get_topology_desc(platform="tpu", **_options(version, shape))
    except (jax.errors.JaxRuntimeError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"libtpu refuses the topology {name!r} ({reason}); try one of: {EXAMPLES}") from error
    devices = tuple(description.devices)
    chip = _share(roofline.CHIPS[version], devices)
    return Target(f"{name} ({len(devices)} x {devices[0].device_kind})", devices, chip.hbm_bytes, chip)


def _parse(name: str) -> tuple[str, tuple[int, ...]]:
    found = re.fullmatch(r"(?:tpu)?(v?)(\w+?):(\d+(?:x\d+){1,2})", name.strip().lower())
    version = found and (found[2] if found[2] in roofline.CHIPS else f"v{found[2]}")
    if version not in roofline.CHIPS:
        raise UserError(f"unknown TPU topology {name!r}; name one such as: {EXAMPLES}")
    return version, tuple(int(chips) for chips in found[3].split("x"))


def _options(version: str, shape: tuple[int, ...]) -> dict:
    """Return what libtpu wants to hear for a topology."""
    options = {"topology_name": f"{'tpu' if version == '7x' else ''}{version}:{'x'.join(map(str, shape))}"}
    if version == "v4":
        # One device per chip, as jax sees a v4; libtpu's default is two.
        options["chip_config_name"] = "megacore"
    if math.prod(shape) < 4:
        # Less than the 2x2 chips that libtpu assumes in a host.
        options["chips_per_host_bounds"] = (*shape, 1)[:3]
    return options


def _quiet_environment():
    """Keep libtpu from asking a metadata server, and jax from waking a TPU that compiling does not need."""
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no TPU is used, so that two may compile at a time
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    # Any valid type silences a warning; the topology's own name decides.
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-16")
    jax.config.update("jax_platforms", "cpu")


def _share(chip: roofline.Chip, devices: tuple) -> roofline.Chip:
    """Divide a chip among the devices that sit at its coordinates (TPU7x has two)."""
    chips = {tuple(device.coords) for device in devices}
    return chip.split(len(devices) // len(chips))
