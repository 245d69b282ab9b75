"""What a MaskFocus update costs: K critical steps against all, for T sampling steps and for 4T.

python benchmarks/focus_update.py      # the embedded base's size, random weights

Times one update of the default config (sequential and accumulate) with K and with T-1 steps, interleaved; the
smallest of the repeats counts, for it is the least disturbed. Beside the ratio stands that of the compute model
(specs/maskfocus.md section 11): cost in proportion to the number of steps. Peak memory of an update is the
compiler's: arguments, outputs and temporaries. Writes benchmarks/focus_update.json.
"""

import json
import pathlib
import sys
import time

import jax
import numpy as np
from absl import app, flags

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from configs import maskfocus as maskfocus_config  # noqa: E402
from maskrl_jax.data.dataset import conditioning_of  # noqa: E402
from maskrl_jax.evaluate import provenance  # noqa: E402
from maskrl_jax.parallel import Parallel  # noqa: E402
from maskrl_jax.tasks import maskfocus  # noqa: E402
from maskrl_jax.tasks import maskgit as maskgit_task  # noqa: E402

REPEATS = flags.DEFINE_integer("repeats", 4, "timed updates of each")

STEPS, CRITICAL = 16, 2  # T and K


class Case:
    """A compiled update with its state and batch."""

    def __init__(self, mode: str, num_steps: int, select: str):
        config = maskfocus_config.get_config("")
        config.loss.update_mode, config.rollout.num_steps = mode, num_steps
        config.steps.update({"select": select, "count": CRITICAL, "first_call": False})
        conditioning = conditioning_of(config.data.name, config.data.text_length)
        self.wiring, self.parallel = maskfocus.Wiring(config, conditioning), Parallel("sharded", jax.devices()[:1])
        base = maskgit_task.Wiring(config.parents.maskgit, conditioning).init(jax.random.key(0)).params
        self.state = self.parallel.init(self.wiring.init, jax.random.key(0), base)
        self.frozen = self.parallel.replicate({"reference": base})
        self.update = self.parallel.update(self.wiring.update)
        self.rows, self.sizes = config.batch_size, self.wiring.base.sizes
        self.cond = np.ones((self.rows, *conditioning.null.shape), np.int32)

    def batch(self, seed: int) -> dict:
        """A batch of made-up rollouts with steps of its own."""
        rng, choice = np.random.default_rng(seed), self.wiring.choice
        steps = [np.sort(rng.permutation(choice.candidates)[: choice.slots]) for _ in range(self.rows)]
        grid = (self.rows, self.sizes.num_tokens)
        return {
            "ids": rng.integers(0, self.sizes.codebook_size, grid, np.int32),
            "commit_step": rng.integers(0, choice.num_steps, grid).astype(np.uint8),
            "cond": self.cond,
            "index": np.arange(self.rows, dtype=np.int32),
            "round": np.full(self.rows, seed, np.int32),
            "advantage": rng.normal(size=self.rows).astype(np.float32),
            "keep": np.ones(self.rows, np.float32),
            "steps": np.asarray(steps, np.int32),
        }

    def seconds(self, seed: int) -> float:
        """Time of one update."""
        batch = self.parallel.put(self.batch(seed))
        began = time.perf_counter()
        self.state, metrics = self.update(self.state, self.frozen, batch)
        jax.block_until_ready((self.state, metrics))
        return time.perf_counter() - began

    def programs(self) -> int:
        """Compiled programs so far."""
        return self.update._jitted._cache_size()

    def megabytes(self) -> float:
        """Peak memory of the compiled update, arguments included."""
        arguments = self.parallel.abstract(self.state), self.parallel.abstract(self.frozen)
        compiled = self.update.lower(*arguments, self.parallel.abstract_batch(self.batch(0))).compile()
        memory = compiled.memory_analysis()
        total = memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes
        return (total - memory.alias_size_in_bytes) / 2**20


def main(_: list[str]) -> None:
    """Measure and write."""
    result = {"steps": STEPS, "rows": 0, "modes": {}}
    for mode in ("sequential", "accumulate"):
        few, every = Case(mode, STEPS, "random"), Case(mode, STEPS, "all")
        times = {"few": [], "all": []}
        for repeat in range(REPEATS.value + 1):
            spent = {"few": few.seconds(repeat), "all": every.seconds(repeat)}
            if repeat:  # the first compiles
                for name, seconds in spent.items():
                    times[name].append(seconds)
        best = {name: min(values) for name, values in times.items()}
        slots = few.wiring.choice.slots, every.wiring.choice.slots
        longer = Case(mode, 4 * STEPS, "random")
        result["rows"] = few.rows
        result["modes"][mode] = {
            "slots": slots,
            "seconds": best,
            "ratio": best["few"] / best["all"],
            "compute_model": slots[0] / slots[1],
            "programs": few.programs(),
            "peak_megabytes": {f"T={STEPS}": few.megabytes(), f"T={4 * STEPS}": longer.megabytes()},
        }
    result |= {"commit": provenance.commit_hash(ROOT), "machine": provenance.machine()}
    (ROOT / "benchmarks" / "focus_update.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    app.run(main)
