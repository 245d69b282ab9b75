import pytest

from maskrl_jax import roofline

CHIP = roofline.Chip("toy", flops=100.0, hbm_bytes=1.0, hbm_bandwidth=10.0, interconnect=2.0)


@pytest.mark.parametrize(
    ("work", "seconds", "bound"),
    [((300, 20, 4), 3.0, "compute"), ((300, 40, 4), 4.0, "memory"), ((300, 40, 10), 5.0, "interconnect")],
)
def test_the_largest_of_three_times_binds(work, seconds, bound):
    time = roofline.step_time(CHIP, *work)
    assert (time.seconds, time.bound) == (seconds, bound)


@pytest.mark.parametrize(
    ("kind", "sent"),
    [("all-reduce", 150.0), ("all-gather", 75.0), ("reduce-scatter", 75.0), ("collective-permute", 100.0)],
)
def test_ring_of_four_sends_three_quarters_per_round(kind, sent):
    assert roofline.wire_bytes(kind, 100, 4) == sent


def test_one_device_sends_nothing():
    assert roofline.wire_bytes("all-reduce", 100, 1) == 0


def test_two_devices_of_a_chip_share_all_of_it():
    assert roofline.CHIPS["7x"].split(2).hbm_bytes == 96 * roofline.GIB
