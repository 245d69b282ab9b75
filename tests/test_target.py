import os

import jax
import pytest

from maskrl_jax import target
from maskrl_jax.errors import UserError


@pytest.mark.parametrize("name", ["nonsense", "v5e", "v9:2x2", "v5e:4", "v5e-16", "v3:2x2"])
def test_unknown_topology_is_one_line_with_examples(name):
    with pytest.raises(UserError, match="unknown TPU topology.*v5e:4x4"):
        target.topology_target(name)


@pytest.mark.parametrize("name", ["7x:2x2x1", "v7x:2x2x1", "TPU7x:2x2x1"])
def test_all_spellings_of_7x_reach_libtpu_as_tpu7x(name):
    assert target._options(*target._parse(name))["topology_name"] == "tpu7x:2x2x1"


def test_missing_libtpu_says_what_to_install(monkeypatch):
    monkeypatch.setattr(target.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install -e '.\[tpu\]'"):
        target.topology_target("v5e:4x4")


def test_local_cpu_devices_share_the_memory_of_the_machine():
    here = target.local_target()
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert here.capacity * jax.local_device_count() == pytest.approx(total)
    assert here.chip is None
