"""Times of several loops beside each other."""

import numpy as np
import pytest

from maskrl_jax.evaluate import latency


def test_every_run_is_timed_in_turn_after_the_warm_up(monkeypatch):
    clock, order = [0.0], []
    monkeypatch.setattr(latency.time, "perf_counter", lambda: clock[0])

    def run(name, seconds):
        def once(repeat):
            order.append((name, repeat))
            clock[0] += seconds * (100 if repeat == 0 else 1)  # compilation
            return np.zeros(1)

        return once

    found = latency.measure({"a": run("a", 1.0), "b": run("b", 3.0)}, warm_up=1, repeats=4)
    assert (found["a"].median, found["b"].median) == (1.0, 3.0)
    assert order[:6] == [("a", 0), ("b", 0), ("b", 1), ("a", 1), ("a", 2), ("b", 2)]
    assert len(order) == 10


@pytest.mark.parametrize("bad", [{"repeats": 0}, {"warm_up": 0}])
def test_nothing_to_time_is_refused(bad):
    with pytest.raises(ValueError, match="at least 1"):
        latency.measure({"a": lambda repeat: 0}, **bad)
