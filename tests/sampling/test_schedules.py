"""Host tables of counts, guidance and order against the numbers of the specifications."""

import re

import fixtures
import numpy as np
import pytest

from maskrl_jax.sampling import refresh, schedules
from maskrl_jax.sampling.clock import Clock, next_masked


def counts(schedule, num_tokens, num_steps):
    left = schedules.masked_after(schedule, num_tokens, num_steps)
    assert left.dtype == np.int32
    return -np.diff(left, prepend=num_tokens)


@pytest.mark.parametrize(
    ("num_tokens", "num_steps", "first", "last"),
    [
        (4096, 4, [312, 888, 1329, 1567], []),
        (4096, 6, [140, 409, 651, 848, 988, 1060], []),
        (4096, 8, [79, 233, 379, 509, 621, 708, 768, 799], []),
        (4096, 16, [20, 59, 98, 135, 172], [390, 398, 401]),
        (4096, 48, [3, 6, 11, 16, 19], []),
        (4096, 64, [2, 3, 7, 8, 11], []),
        (256, 8, [5, 15, 24, 31, 39, 45, 48, 49], []),
        (256, 16, [2, 3, 7, 8, 11, 13, 15, 16, 19, 20, 22, 23, 23, 25, 24, 25], []),
    ],
)
def test_cosine_counts_of_the_specifications(num_tokens, num_steps, first, last):
    """Numbers of specs/speed_rl.md section 9, oracle 1, and specs/maskgit.md section 4."""
    found = counts("cosine", num_tokens, num_steps).tolist()
    assert found[: len(first)] == first
    assert found[len(found) - len(last) :] == last
    assert sum(found) == num_tokens


def test_a_whole_number_of_tokens_is_not_lost_to_rounding():
    """Two thirds of the way cos is 1/2: 128 of 256 stay, where float32 would say 127."""
    assert schedules.masked_after("cosine", 256, 12)[7] == 128
    assert schedules.masked_after("cosine", 4096, 6)[3] == 2048
    assert schedules.masked_after("linear", 20, 10).tolist() == list(range(18, -1, -2))  # 20 (1 - 0.9) = 1.99...


def test_published_float32_loses_a_whole_token():
    """Meissonic's own tables: one less where cos is 1/2, else the same (specs/meissonic.md section 5)."""
    for num_tokens, num_steps in ((4096, 48), (4096, 64), (256, 12)):
        exact, published = (schedules.masked_after(f"{kind}cosine", num_tokens, num_steps) for kind in ("", "float32-"))
        half = 3 * np.arange(1, num_steps + 1) == 2 * num_steps
        np.testing.assert_array_equal(exact - published, half)
    assert schedules.masked_after("float32-linear", 20, 5).tolist() == [16, 12, 7, 3, 0]  # 20 (1 - 0.6) = 7.99...


@pytest.mark.parametrize(
    ("schedule", "left"),
    [
        ("cosine", [14, 11, 6, 0]),  # 16 x .924, .707, .383
        ("arccos", [13, 10, 7, 0]),  # 16 x .839, .667, .460
        ("linear", [12, 8, 4, 0]),
        ("square", [15, 12, 7, 0]),  # 16 x .938, .75, .438
    ],
)
def test_sixteen_tokens_in_four_steps(schedule, left):
    assert schedules.masked_after(schedule, 16, 4).tolist() == left


@pytest.mark.parametrize("schedule", schedules.SCHEDULES)
@pytest.mark.parametrize("num_tokens", [1, 9, 64])
def test_every_step_commits_at_least_one_and_all_commit_everything(schedule, num_tokens):
    # Published increments of so many steps that rounding them up leaves none for the last one are refused.
    longest = num_tokens // 3 + 1 if schedule.startswith("steps-") else num_tokens
    for num_steps in range(1, longest + 1):
        found = counts(schedule, num_tokens, num_steps)
        assert len(found) == num_steps
        assert found.min() >= 1
        assert found.sum() == num_tokens


def test_clock_and_cosine_schedule_agree():
    clock = Clock(16)
    for num_steps in (1, 2, 3, 5, 8, 15, 16):
        left = [16]
        for call in range(1, num_steps + 1):
            left.append(int(next_masked(clock, call * clock.stride(num_steps), left[-1])))
        np.testing.assert_array_equal(schedules.masked_after("cosine", 16, num_steps), left[1:])


@pytest.mark.parametrize("num_steps", [0, 17])
def test_steps_without_a_token_each_are_refused(num_steps):
    with pytest.raises(ValueError, match=f"num_steps {num_steps} must lie in 1..16"):
        schedules.masked_after("cosine", 16, num_steps)


def test_unknown_names_are_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="'cubic' is not one of cosine, arccos, linear, square"):
        schedules.masked_after("cubic", 16, 4)
    with pytest.raises(ValueError, match="'cubic' of shares is not one of cosine, uniform"):
        schedules.masked_after("shares-cubic", 16, 4)
    with pytest.raises(ValueError, match="'cubic' is not one of constant, linear, cosine"):
        schedules.guidance_table("cubic", 2.0, np.zeros(1))


@pytest.mark.parametrize(
    ("convention", "expected", "kind"),
    [
        ("clock", [63, 55, 47, 39, 31, 23, 15, 7, 0], np.int32),
        ("countdown", [7, 6, 5, 4, 3, 2, 1, 0, 0], np.int32),
        ("mask_ratio", [1000, 980.785, 923.880, 831.470, 707.107, 555.570, 382.683, 195.090, 0], np.float32),
        ("const", [0] * 9, np.int32),
    ],
)
def test_timesteps_of_eight_calls(convention, expected, kind):
    found = schedules.timesteps(convention, np.arange(9), 8, 8)
    np.testing.assert_allclose(found, expected, atol=1e-3)
    assert found.dtype == kind


def test_impossible_timesteps_are_refused():
    with pytest.raises(ValueError, match="timesteps 'sundial' is not one of clock, countdown, mask_ratio, const"):
        schedules.timesteps("sundial", np.zeros(1), 1)
    with pytest.raises(ValueError, match="timesteps 'countdown' counts the calls of a fixed plan"):
        schedules.timesteps("countdown", np.zeros(1), 1)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [("constant", [5, 5, 5, 5]), ("linear", [1, 2, 3, 5]), ("cosine", [1, 1 + 2 - np.sqrt(2), 3, 5])],
)
def test_guidance_ramps_from_none_to_the_full_scale(schedule, expected):
    table = schedules.guidance_table(schedule, 5.0, np.array([0, 0.25, 0.5, 1]))
    np.testing.assert_allclose(table, expected, rtol=1e-6)
    assert table.dtype == np.float32


@pytest.mark.parametrize(
    ("side", "first"),
    [
        (16, [133, 74, 193, 39, 172, 99, 232, 30, 144, 85, 219, 50, 183, 125, 244, 9]),
        (32, [522, 277, 771, 142, 664, 391, 913, 92, 577, 331, 854, 196, 719, 474, 968, 50]),
    ],
)
def test_halton_order_of_the_specification(side, first):
    """First cells of specs/maskgit.md section 5."""
    assert schedules.halton_order(side)[:16].tolist() == first


@pytest.mark.parametrize("side", [1, 8, 16])
def test_halton_order_visits_every_cell_once(side):
    np.testing.assert_array_equal(np.sort(schedules.halton_order(side)), np.arange(side * side))


@pytest.mark.parametrize(
    ("num_tokens", "counts"),
    [
        (256, "1 18 26 32 38 43 48 50"),
        (256, "1 7 9 12 13 15 17 18 20 21 22 24 25 26 26"),
        (1024, "1 26 38 46 54 61 67 73 79 84 89 94 99 104 109"),
        (1024, "1 72 103 128 150 171 190 209"),
        (1024, "1 60 85 106 123 140 155 170 184"),
        (
            1024,
            "1 8 12 14 17 19 20 22 24 25 27 28 29 31 32 33 34 36 37 38 39 40 41 42 43 44 45 47 48 49 50 49",
        ),
    ],
)
def test_published_increments(num_tokens, counts):
    wanted = [int(count) for count in counts.split()]
    np.testing.assert_array_equal(schedules.increments("arccos", num_tokens, len(wanted)), wanted)


@fixtures.every_configuration("maskgit_pt_schedule")
def test_increments_and_full_steps_of_the_official_code(folder):
    *_, outputs = fixtures.load(folder)
    seen = 0
    for name, table in outputs.items():
        if found := re.fullmatch(r"tokens(\d+)_steps(\d+)_(\w+)", name):
            np.testing.assert_array_equal(schedules.increments(found[3], int(found[1]), int(found[2])), table, name)
        elif found := re.fullmatch(r"full_step_flags_steps(\d+)_budget(\d+)", name):
            steps = refresh.even_steps(int(found[1]), int(found[2]))
            np.testing.assert_array_equal(np.flatnonzero(table), steps, name)
        elif found := re.fullmatch(r"get_mask_ratio_steps(\d+)", name):
            left = 1 - np.cumsum(schedules.increments("arccos", 1024, int(found[1])))[:-1] / 1024
            np.testing.assert_allclose(table, left, atol=1e-6)
        else:
            continue
        seen += 1
    assert seen == len(outputs)


@fixtures.every_configuration("gmaskgit_schedule")
def test_shares_of_the_flax_original(folder):
    _, _, inputs, outputs = fixtures.load(folder)
    for name, wanted in outputs.items():
        method, total = re.fullmatch(r"(\w[\w.]*)_total(\d+)", name).groups()
        np.testing.assert_allclose(schedules.share_left(method, inputs["ratio"], int(total)), wanted, atol=1e-6)


@fixtures.every_configuration("halton_schedule")
def test_order_and_counts_of_the_official_halton_sampler(folder):
    for name, wanted in fixtures.load(folder)[3].items():
        if found := re.fullmatch(r"order_grid(\d+)", name):
            np.testing.assert_array_equal(schedules.halton_order(int(found[1])), wanted @ [int(found[1]), 1], name)
        else:
            side, steps = map(int, re.fullmatch(r"tokens_grid(\d+)_steps(\d+)", name).groups())
            left = schedules.masked_after("halton", side**2, steps)
            np.testing.assert_array_equal(-np.diff(left, prepend=side**2), wanted, name)


@pytest.mark.parametrize(
    ("num_tokens", "counts"),
    [
        (256, "5 15 24 31 39 45 48 49"),
        (256, "3 6 11 15 18 22 26 28 30 31 33 33"),
        (256, "2 3 7 8 11 13 15 16 19 20 22 23 23 25 24 25"),
        (1024, "9 26 43 60 74 88 101 112 120 126 132 133"),
    ],
)
def test_published_cosine_shares(num_tokens, counts):
    """specs/maskgit.md section 4; of 12 steps the eighth leaves 127 of 256, where cos 60 degrees is below 1/2."""
    wanted = [int(count) for count in counts.split()]
    left = schedules.masked_after("shares-cosine", num_tokens, len(wanted))
    np.testing.assert_array_equal(-np.diff(left, prepend=num_tokens), wanted)


@pytest.mark.parametrize("method", ["cosine", "uniform", "pow0.5", "pow3", "log", "exp"])
def test_published_shares_fall_and_keep_one_until_the_last_step(method):
    table = schedules.shares_left(method, 64, 12)
    assert (table.shape, table.dtype) == ((12, 65), np.int32)
    assert (np.diff(table, axis=0) <= 0).all()
    assert (table[:-1] >= 1).all() and (table[-1] == 0).all()
    assert (table <= np.maximum(np.arange(65), 1)[None]).all()


@pytest.mark.parametrize("bad", [("sine", 16, 4), ("arccos", 16, 0), ("linear", 4, 8), ("root", 9, 9)])
def test_increments_that_cannot_be_are_refused(bad):
    with pytest.raises(ValueError, match="schedule|num_steps"):
        schedules.increments(*bad)
