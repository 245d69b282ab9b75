"""Settings of every test: eight virtual devices, the checks of jax that would be too slow in training, quick compilation."""

import atexit
import gc
import os
import shutil
import tempfile

import jax
import pytest

# Half the compiler's time; before the first device, and for the processes that tests start, too.
QUICK = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {QUICK}"
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_debug_key_reuse", True)
# Most tests wait for the compiler, not for its programs.
jax.config.update("jax_disable_most_optimizations", True)
# Nor twice for one program, whichever function it came from. A worker's own cache: jax writes no file as a whole.
CACHE = tempfile.mkdtemp(prefix="maskrl-compiled-")
atexit.register(shutil.rmtree, CACHE, ignore_errors=True)
jax.config.update("jax_compilation_cache_dir", CACHE)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
# Tracing makes many objects that stay; looking through them as often as Python does takes a tenth of the time.
gc.set_threshold(100_000, 20, 20)


@pytest.fixture(autouse=True, scope="module")
def _forget_programs():
    """Free the programs of a module: thousands of them in one process exhaust the memory maps of the system."""
    yield
    jax.clear_caches()
    gc.collect()
