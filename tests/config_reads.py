"""Which settings a run reads, to find those that change nothing."""

import contextlib
import dataclasses
import sys

import pytest
from ml_collections import ConfigDict

from maskrl_jax.evaluate.bench import Evaluation
from maskrl_jax.models.judge import JudgeConfig
from maskrl_jax.models.maskgit import MaskGITConfig
from maskrl_jax.models.vqgan import TokenizerConfig
from maskrl_jax.rl.credit import CreditConfig
from maskrl_jax.rl.policy import Policy
from maskrl_jax.rl.token_terms import TokenLoss
from maskrl_jax.sampling.maskgit import SamplerConfig
from maskrl_jax.state import OptimizerConfig

SETTINGS = (
    *(OptimizerConfig, TokenizerConfig, JudgeConfig, MaskGITConfig),
    *(SamplerConfig, Evaluation, Policy, CreditConfig, TokenLoss),
)
# Reading a field to compare, print or copy a dataclass is no use of it.
NO_USE = ("__init__", "__post_init__", "__eq__", "__hash__", "__repr__")


class ConfigReads:
    """Record the keys that are read from ConfigDicts."""

    def __init__(self):
        self._read = set()
        self._alive = {}  # an id is taken again once its object is gone

    @contextlib.contextmanager
    def recorded(self):
        """Record while the context is open."""
        original, reads = ConfigDict.__getitem__, self

        def getitem(config, key):
            if sys._getframe(1).f_code.co_name != "to_dict":  # copying is no use
                reads._alive[id(config)] = config
                reads._read.add((id(config), key))
            return original(config, key)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ConfigDict, "__getitem__", getitem)
            yield

    def paths(self, task: str) -> tuple[set[str], set[str]]:
        """Return (all, read) dotted paths of the leaves of every recorded config of a task, parents left out."""
        every, read = set(), set()
        for config in [c for c in self._alive.values() if c._fields.get("task") == task]:
            for path, place, key in _leaves(config):
                every.add(path)
                if (id(place), key) in self._read:
                    read.add(path)
        return every, read


def _leaves(config, prefix=""):
    for key, value in config._fields.items():
        if isinstance(value, ConfigDict) and len(value):
            if key != "parents":
                yield from _leaves(value, f"{prefix}{key}.")
        elif not isinstance(value, ConfigDict):
            yield prefix + key, config, key


@contextlib.contextmanager
def field_uses(*classes):
    """Record which fields of some dataclasses are used while the context is open: {class: names never used}."""
    unused = {cls: {field.name for field in dataclasses.fields(cls)} for cls in classes}

    def recording(cls):
        def getattribute(self, name):
            code = sys._getframe(1).f_code
            if code.co_name not in NO_USE and not code.co_filename.endswith("dataclasses.py"):
                unused[cls].discard(name)
            return object.__getattribute__(self, name)

        return getattribute

    with pytest.MonkeyPatch.context() as patch:
        for cls in classes:
            patch.setattr(cls, "__getattribute__", recording(cls), raising=False)
        yield unused
