"""The layout of text to image, on sequences written out by hand."""

import fixtures
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskrl_jax.sampling.dimoo_sequence import UNCONDITIONAL, Layout, left_padded

SMALL = Layout(2, 3, mask=90, newline=91, boa=92, boi=93, eoi=94, eoa=95, code_offset=100, codebook_size=5)
CODES = jnp.asarray([[0, 5, 4, 3, 5, 1]])


def test_a_sequence_written_out():
    ids, positions, real = SMALL.sequence(CODES, left_padded([[7, 8, 9]], multiple=4))
    assert ids.tolist() == [[0, 7, 8, 9, 92, 93, 100, 90, 104, 91, 103, 90, 101, 91, 94, 95]]
    assert positions.tolist() == [[0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14]]
    assert real.tolist() == [[False] + [True] * 15]
    assert {ids.dtype, positions.dtype} == {np.dtype(np.int32)}


def test_image_tokens_have_the_same_indices_whatever_the_prompt():
    prompt = left_padded([[7, 8, 9], [6], [1, 2, 3, 4]], multiple=4)
    ids, positions, real = SMALL.sequence(jnp.tile(CODES, (3, 1)), prompt)
    np.testing.assert_array_equal(ids[:, 4:], np.tile(ids[:1, 4:], (3, 1)))
    assert positions[:, 4].tolist() == [3, 1, 4]  # BOA follows the prompt
    assert real.sum(1).tolist() == [15, 13, 16]


def test_codes_are_read_back():
    prompt = left_padded([[7, 8, 9]])
    ids, _, _ = SMALL.sequence(CODES, prompt)
    assert prompt.ids.shape == (1, 64)
    np.testing.assert_array_equal(SMALL.codes(ids), CODES)
    np.testing.assert_array_equal(SMALL.image(jnp.arange(64 + 12)[None])[0], 64 + SMALL.places)


def test_image_tokens_can_come_first():
    ids, _, _ = SMALL.sequence(CODES, left_padded([[7, 8, 9]], multiple=4))
    turned = SMALL.image_first(ids)
    np.testing.assert_array_equal(turned[:, : SMALL.num_tokens], SMALL.image(ids))
    assert sorted(turned[0].tolist()) == sorted(ids[0].tolist())
    np.testing.assert_array_equal(turned[0, SMALL.num_tokens :][:4], ids[0, :4])


def test_sequences_are_made_under_jit():
    made = jax.jit(SMALL.sequence)(CODES, left_padded([[7]]))
    jax.tree.map(np.testing.assert_array_equal, made, SMALL.sequence(CODES, left_padded([[7]])))


@pytest.mark.parametrize("code", [-1, 6, -6])
def test_what_is_no_code_becomes_no_other_token(code):
    assert SMALL.token_ids(jnp.asarray([code])).tolist() == [-1]


def test_published_lengths_and_places():
    """Section 3: 4164 tokens for 1024 x 1024, 4178 with the unconditional prompt."""
    square, wide = Layout(64, 64), Layout(48, 96)
    assert (square.length, square.length + len(UNCONDITIONAL)) == (4164, 4178)
    assert (wide.num_tokens, wide.length) == (4608, 4660)
    assert square.places[[0, 1, 63, 64, 4095]].tolist() == [2, 3, 65, 67, 2 + 63 * 65 + 63]
    np.testing.assert_array_equal(np.flatnonzero(square.empty == square.mask), square.places)
    assert (square.empty == square.newline).sum() == 64
    assert square.empty[[0, 1, -2, -1]].tolist() == [126354, 126349, 126350, 126355]


def test_the_unconditional_prompt_is_padded_with_the_others():
    both = left_padded([[1] * 70, UNCONDITIONAL])
    assert both.ids.shape == (2, 128)
    assert both.ids[1, -14:].tolist() == list(UNCONDITIONAL)
    assert both.real.sum(1).tolist() == [70, 14]


@fixtures.every_configuration("dimoo_generate")
def test_prompts_of_the_reference_are_this_layout(folder):
    config, _, inputs, _ = fixtures.load(folder)
    if not inputs:
        pytest.skip("a configuration of counts alone")
    layout, start = fixtures.dimoo_layout(config), config["code_start"]
    assert layout.places[0] == 2
    prompt = left_padded(inputs["prompt_ids"][:, : start - 2].tolist(), multiple=1)
    codes = layout.codes(jnp.asarray(inputs["prompt_ids"], jnp.int32))
    np.testing.assert_array_equal(layout.sequence(codes, prompt)[0], inputs["prompt_ids"])


@pytest.mark.parametrize("prompts", [[], [[]], [[1], []]])
def test_empty_prompts_are_refused(prompts):
    with pytest.raises(ValueError, match="^a prompt needs at least one token, and a batch one prompt$"):
        left_padded(prompts)


def test_impossible_layouts_are_refused():
    with pytest.raises(ValueError, match="^a grid of 0 x 3 with 8192 codes has no image$"):
        Layout(0, 3)
    with pytest.raises(ValueError, match="^newline 126356 is the id of an image code$"):
        Layout(2, 3, newline=126356)
