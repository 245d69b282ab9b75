import jax
import jax.numpy as jnp
import pytest

from maskrl_jax import program
from maskrl_jax.program import Traffic

# An all-reduce of 2x3 floats in a loop of 5 passes; beside it one gather, one scatter, one permutation.
LOOPING = """HloModule toy, num_partitions=4

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  ROOT %sum = f32[] add(%a, %b)
}

%body (p: (s32[], f32[2,3])) -> (s32[], f32[2,3]) {
  %psum = f32[2,3]{1,0:T(8,128)S(1)} all-reduce(%x), channel_id=1, replica_groups={{0,1},{2,3}}, to_apply=%add
}

%condition (p: (s32[], f32[2,3])) -> pred[] {
  %constant.1 = s32[]{:T(128)} constant(5)
  ROOT %lt = pred[]{:T(512)} compare(%i, %constant.1), direction=LT
}

ENTRY %main (x: f32[2,3]) -> f32[2,3] {
  %while.1 = (s32[], f32[2,3]{1,0}) while(%t), condition=%condition, body=%body
  %ag = (bf16[8]{0}, bf16[32]{0}) all-gather-start(%y), replica_groups=[1,4]<=[4], dimensions={0}
  %agd = bf16[32]{0} all-gather-done(%ag)
  %rs = f32[8]{0} reduce-scatter(%z), replica_groups=mesh['a'=4,'b'=2] {'a'}, to_apply=%add
  ROOT %cp = (f32[6]{0}, f32[6]{0}, u32[], u32[]) collective-permute-start(%w), source_target_pairs={{0,1}}
}
"""


def test_collectives_of_a_literal_program_are_counted_by_hand():
    assert program.collectives(LOOPING, num_devices=4) == {
        "all-reduce": Traffic(5, 5 * 24, 5 * 24.0),  # groups of 2: a ring sends 2 * 1/2 of it
        "all-gather": Traffic(1, 64, 48.0),
        "reduce-scatter": Traffic(1, 128, 96.0),
        "collective-permute": Traffic(1, 24, 24.0),
    }


def test_pieces_of_one_asynchronous_collective_share_a_channel_and_count_once():
    psum = next(line for line in LOOPING.splitlines() if "all-reduce(" in line)
    again = LOOPING.replace(psum, psum + "\n" + psum.replace("%psum", "%done"))
    assert program.collectives(again, 4)["all-reduce"] == program.collectives(LOOPING, 4)["all-reduce"]


def test_annotated_trip_count_wins_over_the_condition():
    text = LOOPING.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"7"}}')
    assert program.collectives(text, num_devices=4)["all-reduce"].count == 7


def test_loop_that_ends_on_data_runs_as_often_as_the_caller_says():
    text = LOOPING.replace("direction=LT", "direction=NE")
    assert program.collectives(text, num_devices=4, loop_trips=9)["all-reduce"].count == 9


def _operations(fn, *shapes, **options):
    args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return program.operations(jax.make_jaxpr(fn)(*args).jaxpr, **options)


def test_product_counts_two_per_multiply_add():
    assert _operations(lambda x, w: x @ w, (4, 8), (8, 16), loop_trips=1) == 2 * 4 * 8 * 16


def test_convolution_counts_its_receptive_field():
    def convolve(x, w):
        return jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    assert _operations(convolve, (1, 5, 5, 3), (3, 3, 3, 7), loop_trips=1) == 2 * (5 * 5 * 7) * (3 * 3 * 3)


def _looping(x):
    x = jax.lax.scan(lambda c, _: (jnp.sin(c), None), x, None, length=6)[0]
    return jax.lax.while_loop(lambda c: c[0] > 0, jnp.cos, x)


def test_scan_counts_its_length_and_while_the_given_trips():
    condition = 3  # slice, squeeze, compare: one element each
    assert _operations(_looping, (100,), loop_trips=10) == 6 * 100 + 10 * (100 + condition)


def test_loop_factor_is_full_over_single_pass():
    jaxpr = jax.make_jaxpr(_looping)(jnp.zeros(100)).jaxpr
    assert program.loop_factor(jaxpr, loop_trips=10) == pytest.approx((600 + 1030) / 203)
    assert program.loop_factor(jax.make_jaxpr(jnp.sin)(1.0).jaxpr, loop_trips=10) == 1.0
