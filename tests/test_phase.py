import pytest

from maskrl_jax.phase import Phase


@pytest.mark.parametrize(("kind", "trips"), [("train", 1), ("map", 0)])
def test_bad_phase_is_refused_by_name(kind, trips):
    with pytest.raises(ValueError, match="phase rollout"):
        Phase("rollout", print, ((), (), ()), kind=kind, loop_trips=trips)
