import numpy as np
import pytest

from maskrl_jax.data import captions
from maskrl_jax.data.captions import Caption, Thing
from maskrl_jax.errors import UserError

PAIR = "a red circle left of a blue square"


def test_str_and_parse_are_inverse():
    caption = Caption((Thing(shape=0, colour=0), Thing(shape=1, colour=2)), relation=0)
    assert str(caption) == PAIR
    assert captions.parse(PAIR) == caption
    assert captions.parse("A Yellow CROSS") == Caption((Thing(3, 3),))


def test_encode_pads_with_zero_and_decode_drops_it():
    ids = captions.encode([PAIR, "a red circle"], 8)
    assert ids.dtype == np.int32
    np.testing.assert_array_equal(ids[0], [1, 6, 10, 2, 1, 8, 11, 0])
    np.testing.assert_array_equal(ids[1], [1, 6, 10, 0, 0, 0, 0, 0])
    assert captions.decode(ids) == [PAIR, "a red circle"]


def test_a_relation_is_one_word_so_that_the_second_thing_keeps_its_place():
    ids = captions.encode([f"a red circle {relation} a blue square" for relation in captions.RELATIONS], 8)
    np.testing.assert_array_equal(ids[:, 4:7], [[1, 8, 11]] * 4)
    assert captions.encode(["a red circle left   of a blue square"], 8)[0].tolist() == ids[0].tolist()


def test_encode_cuts_a_long_prompt_with_a_warning():
    with pytest.warns(UserWarning, match="has 7 words; cut to 3"):
        ids = captions.encode([PAIR], 3)
    assert captions.decode(ids) == ["a red circle"]


@pytest.mark.parametrize("prompt, word", [("a purple circle", "'purple'"), ("a <pad> circle", "'<pad>'")])
def test_encode_names_an_unknown_word(prompt, word):
    with pytest.raises(UserError, match=f"unknown word {word}"):
        captions.encode([prompt], 8)


def test_encode_refuses_an_empty_prompt():
    with pytest.raises(UserError, match="empty prompt"):
        captions.encode(["a red circle", "  "], 8)


@pytest.mark.parametrize("text", ["", "red circle", "a circle red", f"{PAIR} below", "a red circle of a red cross"])
def test_parse_refuses_what_is_outside_the_grammar(text):
    with pytest.raises(UserError, match="cannot verify caption"):
        captions.parse(text)
