import jax.numpy as jnp
import pytest

from maskrl_jax.evaluate import timing


@pytest.fixture
def clock(monkeypatch):
    """Replace the clock by one that only the timed closures move."""
    now = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    return now


def closure(clock, seconds, calls, order, name):
    def run(repeat):
        order.append((name, repeat))
        clock[0] += 100.0 if repeat == 0 else seconds * repeat  # the first run compiles
        return jnp.zeros(2), jnp.array(calls)

    return run


def test_ratio_calls_and_order(clock):
    order = []
    base = closure(clock, 6.0, [16, 16], order, "base")
    tuned = closure(clock, 2.0, [3, 5], order, "tuned")
    result = timing.compare(base, tuned, batch_size=2, repeats=3, warm_up=1)
    assert result.speedup == timing.Spread(3.0, 3.0, 3.0)
    assert result.base_seconds == timing.Spread(12.0, 9.0, 15.0)  # repeats 1, 2, 3
    assert (result.base_calls, result.tuned_calls, result.call_speedup) == (16.0, 5.0, 3.2)
    assert order[2:] == [("base", 1), ("tuned", 1), ("tuned", 2), ("base", 2), ("base", 3), ("tuned", 3)]


def test_compilation_cannot_be_timed_by_accident():
    with pytest.raises(ValueError, match="at least 1"):
        timing.compare(lambda r: None, lambda r: None, batch_size=1, repeats=1, warm_up=0)
