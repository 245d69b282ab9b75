"""What the measurements that runs share are known by."""

import types

import numpy as np
import pytest

from maskrl_jax.evaluate.measure import System
from maskrl_jax.tasks.generators import kept

SYSTEM = System("base", "base", generate=None)


def parent(params=1.0, extra=2.0, **model):
    config = types.SimpleNamespace(model={"heads": 4} | model)
    return types.SimpleNamespace(params={"w": np.float32(params)}, extra={"codes": np.float32(extra)}, config=config)


def parents(**changed):
    return {"maskgit": parent(), "tokenizer": parent(), "judge": parent()} | changed


def test_the_same_parents_and_settings_are_the_same_system():
    assert kept(SYSTEM, parents(), "sampler").identity == kept(SYSTEM, parents(), "sampler").identity != ""
    # The judge draws nothing; the measurement knows it by itself.
    assert kept(SYSTEM, parents(judge=parent(5.0)), "sampler").identity == kept(SYSTEM, parents(), "sampler").identity


@pytest.mark.parametrize("changed", [parent(params=3.0), parent(extra=3.0), parent(heads=8)])
@pytest.mark.parametrize("name", ["maskgit", "tokenizer"])
def test_another_parent_is_another_system(name, changed):
    assert kept(SYSTEM, parents(**{name: changed}), "a").identity != kept(SYSTEM, parents(), "a").identity


@pytest.mark.parametrize("settings", [("b",), ("a", {"head": np.ones(2)}), ()])
def test_other_settings_are_another_system(settings):
    assert kept(SYSTEM, parents(), *settings).identity != kept(SYSTEM, parents(), "a").identity
