"""The command line with a pause before every step, so that a signal meets a run that is training."""

import pathlib
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))


from maskrl_jax import loop, main, parallel  # noqa: E402

PAUSE = 0.3


class Slow(loop.Prefetch):
    """Batches that take their time."""

    def next(self):
        """Wait, then return the next batch."""
        time.sleep(PAUSE)
        return super().next()


if __name__ == "__main__":
    loop.Prefetch = Slow
    parallel.FSDP_MIN_SIZE = 512  # so that tiny arrays are split, too
    main.cli()
