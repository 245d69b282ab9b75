import importlib.util
import io
import sys
import types

import jax
import jax.numpy as jnp
import ml_collections
import pytest

from maskrl_jax import dry_run, roofline, runner
from maskrl_jax.axis import mean_gradients
from maskrl_jax.errors import UserError
from maskrl_jax.parallel import Parallel
from maskrl_jax.phase import Phase
from maskrl_jax.target import Target, local_target, topology_target

WIDTH, BATCH, STEPS = 256, 1024, 5
TOY = roofline.Chip("toy", flops=1e9, hbm_bytes=1e9, hbm_bandwidth=1e12, interconnect=1e12)


def struct(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def sgd(state, frozen, batch, axis):
    def loss_sum(params):
        return jnp.square(jnp.tanh(batch["x"] @ params["in"]) @ params["out"]).sum()

    weight = jnp.float32(batch["x"].shape[0])
    grads = mean_gradients(jax.grad(loss_sum)(state), weight, axis)
    norm = sum(jnp.vdot(g, g) for g in jax.tree.leaves(grads))
    return jax.tree.map(lambda p, g: p - 0.1 * g, state, grads), {"norm": (norm, jnp.float32(1))}


def rollout(params, frozen, batch, axis):
    def step(x, _):
        return jnp.tanh(x @ params["in"]) + frozen, None

    return jax.lax.scan(step, batch["x"], None, length=STEPS)[0]


PARAMS = {"in": struct(WIDTH, WIDTH), "out": struct(WIDTH, WIDTH)}
UPDATE = Phase("update", sgd, (PARAMS, {}, {"x": struct(BATCH, WIDTH)}), kind="update")
ROLLOUT = Phase("rollout", rollout, (PARAMS, struct(), {"x": struct(BATCH, WIDTH)}), kind="map")


needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu is not installed: pip install '.[tpu]'",
)


def measure(phase, strategy, target=None):
    target = target or local_target()
    return dry_run.measure(phase, Parallel(strategy, target.devices), target)


@pytest.mark.parametrize("strategy", ["pmap", "sharded"])
def test_update_flops_are_five_products_per_device(strategy):
    # Forward 2, backward 3 (the input needs no gradient); what is elementwise adds a few per cent.
    by_hand = 5 * 2 * (BATCH // 8) * WIDTH * WIDTH
    assert measure(UPDATE, strategy).needs.flops == pytest.approx(by_hand, rel=0.05)


def test_replicated_update_needs_one_all_reduce_of_all_gradients():
    found = measure(UPDATE, "pmap").needs.collectives
    assert set(found) == {"all-reduce"} and found["all-reduce"].count == 1
    assert found["all-reduce"].tensor_bytes == 4 * (2 * WIDTH * WIDTH + 1)


def test_sharding_the_state_takes_an_eighth_of_its_memory():
    replicated, sharded = (measure(UPDATE, strategy).needs.memory for strategy in ("pmap", "sharded"))
    rows = 4 * (BATCH // 8) * WIDTH
    assert replicated.arguments - rows == 8 * (sharded.arguments - rows) == 4 * 2 * WIDTH * WIDTH
    assert replicated.shared == 4 * 2 * WIDTH * WIDTH  # the state is donated
    assert replicated.temporary > 0 and replicated.peak >= replicated.arguments


def test_scan_counts_every_pass_and_no_collective():
    needs = measure(ROLLOUT, "pmap").needs
    assert needs.loop_factor == pytest.approx(STEPS, rel=0.01)
    assert needs.flops == pytest.approx(STEPS * 2 * (BATCH // 8) * WIDTH * WIDTH, rel=0.05)
    assert needs.collectives == {}


def test_verdict_and_roofline_follow_the_chip():
    devices = tuple(jax.devices())
    report = measure(ROLLOUT, "pmap", Target("toy", devices, capacity=1e3, chip=TOY))
    assert report.fits is False
    assert report.needs.time.bound == "compute"
    assert report.needs.time.seconds == pytest.approx(report.needs.flops / 1e9)


def test_compiler_out_of_memory_is_a_verdict(monkeypatch):
    reason = "RESOURCE_EXHAUSTED: 64.00G exceeds 15.75G"

    def refuse(*args):
        raise jax.errors.JaxRuntimeError(reason + "\nmore")

    monkeypatch.setattr(jax.stages.Lowered, "compile", refuse)
    report = measure(ROLLOUT, "pmap")
    assert (report.fits, report.needs, report.error) == (False, None, reason)
    assert "does not fit" in dry_run.table("toy", local_target(), [report])


def test_batch_that_does_not_divide_is_refused():
    phase = Phase("odd", rollout, (PARAMS, struct(), {"x": struct(12, WIDTH)}), kind="map")
    with pytest.raises(UserError, match="12 does not divide by 8"):
        measure(phase, "pmap")


@pytest.fixture
def toy_config(monkeypatch):
    """A stage "toy" that compiles the two phases above."""
    module = types.ModuleType("toy_phases")
    module.phases = lambda config, parallel: [ROLLOUT, UPDATE]
    monkeypatch.setitem(runner.TASKS, "toy", "toy_phases")
    monkeypatch.setitem(sys.modules, "toy_phases", module)
    return ml_collections.ConfigDict({"task": "toy", "parallel": "pmap"})


def test_table_shows_every_phase_with_its_verdict(toy_config):
    out = io.StringIO()
    reports = dry_run.run(toy_config, runner.phases, None, out)
    assert [report.name for report in reports] == ["rollout", "update"]
    text = out.getvalue()
    for expected in ("rollout", "update", "peak memory", "fits", "all-reduce", "roofline time", "n/a"):
        assert expected in text
    assert "all-to-all" not in text


def test_unknown_task_is_one_line(toy_config):
    toy_config.task = "tory"
    with pytest.raises(UserError, match="unknown task 'tory'; did you mean 'toy'"):
        dry_run.run(toy_config, runner.phases, None, io.StringIO())


def test_a_setting_that_cannot_be_is_one_line(toy_config, monkeypatch):
    def phases(config, parallel):
        raise ValueError("width 8 is not divisible by heads 3")

    monkeypatch.setattr(sys.modules["toy_phases"], "phases", phases)
    with pytest.raises(UserError, match="the config of task 'toy' cannot run: width 8"):
        dry_run.run(toy_config, runner.phases, None, io.StringIO())


@pytest.mark.tpu
@needs_libtpu
@pytest.mark.parametrize("strategy", ["pmap", "sharded"])
def test_sixteen_absent_v5e_chips_compile_both_phases(strategy):
    target = topology_target("v5e:4x4")
    update, sampled = measure(UPDATE, strategy, target), measure(ROLLOUT, strategy, target)
    assert len(target.devices) == 16 and update.fits and sampled.fits
    assert update.needs.flops == pytest.approx(5 * 2 * (BATCH // 16) * WIDTH * WIDTH, rel=0.1)
    assert update.needs.collectives and update.needs.time.seconds > 0


@pytest.mark.tpu
@needs_libtpu
def test_program_larger_than_hbm_does_not_fit():
    huge = {"in": struct(2**17, 2**17), "out": struct(WIDTH, WIDTH)}  # 64 GiB replicated, a v5e has 16
    phase = Phase("huge", rollout, (huge, struct(), {"x": struct(16, 2**17)}), kind="map")
    assert measure(phase, "pmap", topology_target("v5e:4x4")).fits is False
