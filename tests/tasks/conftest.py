"""The real stages at tiny sizes, trained once for all tests of the folder."""

import contextlib
import dataclasses

import jax
import pytest
import tiny
from config_reads import SETTINGS, ConfigReads, field_uses
from jax.experimental.compilation_cache import compilation_cache

from maskrl_jax import runner
from maskrl_jax.data import shapes
from maskrl_jax.parallel import Parallel
from maskrl_jax.tasks.task import Context, Parent, Task


@dataclasses.dataclass(frozen=True)
class Trained:
    """A run of tiny speed_rl, undisturbed, with its parents in the store."""

    store: str
    workdir: str
    config: object
    parents: dict[str, Parent]
    reads: ConfigReads
    unused: dict[type, set[str]]  # fields of settings
    measured: tuple[str, ...]  # what the reports of these runs left in the store; other tests add to it


@contextlib.contextmanager
def shared_compilation(store):
    """Compile every program of these tests once, into the cache that the command line uses too."""
    settings = {
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_compilation_cache_dir": f"{store}/jax_cache",
    }
    earlier = {name: jax.config.values[name] for name in settings}
    _configure(settings)
    yield
    _configure(earlier)


@contextlib.contextmanager
def see_one_device():
    """Let the runner see one device: eight virtual ones wait for each other on two cores."""
    alone = jax.devices()[:1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda: alone)
        yield


def _configure(settings):
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """Train tiny speed_rl and its parents through the runner, reports included."""
    root = tmp_path_factory.mktemp("tiny")
    store, workdir, config = str(root / "store"), str(root / "straight"), tiny.get_config("speed_rl")
    reads = ConfigReads()
    with contextlib.ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        for context in (shared_compilation(store), see_one_device(), reads.recorded()):
            stack.enter_context(context)
        unused = stack.enter_context(field_uses(*SETTINGS))
        patch.setattr(shapes, "SPLIT_SIZES", tiny.SPLIT_SIZES)
        runner.run(config, workdir, store)
        parents = runner.parents(config, store, {})
    measured = tuple(sorted(path.name for path in (root / "store" / "measured").iterdir()))
    return Trained(store, workdir, config, parents, reads, unused, measured)


@pytest.fixture(autouse=True, scope="module")
def shared(trained):
    """Compile as `trained` does."""
    with shared_compilation(trained.store):
        yield


@pytest.fixture
def one_device():
    """Context in which the runner sees one device, as `trained` did."""
    return see_one_device


@pytest.fixture(scope="session")
def build(trained, tmp_path_factory):
    """Build a stage on the trained parents: build(config, strategy, devices) -> Task."""

    def build(config, strategy="pmap", devices=1) -> Task:
        workdir = str(tmp_path_factory.mktemp(config.task))
        parallel = Parallel(strategy, jax.local_devices()[:devices])
        return runner.build(Context(config, trained.parents, parallel, trained.store, workdir))

    return build
