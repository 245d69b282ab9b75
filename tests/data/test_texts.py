"""Texts as token ids, and back."""

import numpy as np
import pytest
import text_tokenizers

from maskrl_jax.data.settings import DataSettings
from maskrl_jax.data.texts import texts_of
from maskrl_jax.errors import UserError
from maskrl_jax.sampling.dimoo_sequence import UNCONDITIONAL

pytest.importorskip("tokenizers", reason="needs the package tokenizers")
SYSTEM = UNCONDITIONAL[:12]  # <system>Generate ... prompt.</system><user>


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    return str(text_tokenizers.write_clip(tmp_path_factory.mktemp("clip")))


@pytest.fixture(scope="module")
def dimoo_folder(tmp_path_factory):
    return str(text_tokenizers.write_dimoo(tmp_path_factory.mktemp("dimoo")))


def texts(tokens, folder="", length=16, **more):
    return texts_of(DataSettings("my.txt", length, tokens, folder, **more))


def test_conditioning_needs_no_file():
    clip = texts("clip", length=77).conditioning
    assert (clip.kind, clip.vocab_size, clip.length) == ("caption", 49408, 77)
    assert clip.null.dtype == np.int32 and clip.null.tolist() == [49406] + 76 * [49407]
    assert texts("clip", length=4, pad=0).conditioning.null.tolist() == [49406, 49407, 0, 0]
    dimoo = texts("dimoo").conditioning
    assert (dimoo.kind, dimoo.vocab_size, dimoo.length) == ("caption", 134548, 16)
    assert dimoo.null.dtype == np.int32 and dimoo.null.tolist() == [-1, -1, *UNCONDITIONAL]
    words = texts("").conditioning
    assert (words.vocab_size, words.null.tolist()) == (14, 16 * [0])


@pytest.mark.parametrize("tokens", ["clip", "dimoo"])
def test_no_text_is_the_null_condition(tokens, request):
    found = texts(tokens, request.getfixturevalue(f"{tokens}_folder"))
    np.testing.assert_array_equal(found.encode([""])[0], found.conditioning.null)
    assert found.decode(found.conditioning.null[None]) == [""]


def test_clip_puts_a_text_between_start_and_end(clip_folder):
    found = texts("clip", clip_folder, 5, pad=7)
    cat, dog = found.encode(["cat", "dog"])[:, 1]
    ids = found.encode(["Cat DOG", "cat"])
    assert ids.dtype == np.int32 and ids.tolist() == [[49406, cat, dog, 49407, 7], [49406, cat, 49407, 7, 7]]
    assert found.decode(ids) == ["cat dog", "cat"]
    with pytest.warns(UserWarning, match="1 of 2 prompts are cut to data.text_length=5 tokens"):
        assert found.encode(["cat dog cat dog", "dog"])[0].tolist() == [49406, cat, dog, cat, 49407]


def test_dimoo_puts_a_text_into_its_template(dimoo_folder):
    found = texts("dimoo", dimoo_folder)
    ids = found.encode(["red cat", "cat"])
    assert ids.dtype == np.int32
    assert ids.tolist() == [[*SYSTEM, 9, 7, 11, 126335], [-1, -1, *SYSTEM, 11, 126335]]
    assert found.decode(ids) == ["red cat", "cat"]
    with pytest.warns(UserWarning, match="1 of 1 prompts are cut"):  # and the template still closes
        assert found.encode(["cat red cat"]).tolist() == [[*SYSTEM, 11, 7, 9, 126335]]


def test_a_tokenizer_of_another_model_is_refused(tmp_path, clip_folder, dimoo_folder):
    moved = text_tokenizers.write_dimoo(tmp_path / "moved", user=12)
    with pytest.raises(UserError, match="<user> is token 126334 of Lumina-DiMOO; the tokenizer in .* has 12"):
        texts("dimoo", str(moved)).encode(["cat"])
    with pytest.raises(UserError, match="has no tokenizer.json; name the folder"):
        texts("dimoo", clip_folder).encode(["cat"])
    with pytest.raises(UserError, match="give the one of a CLIP"):
        texts("clip", dimoo_folder).encode(["cat"])


@pytest.mark.parametrize(
    ("tokens", "more", "message"),
    [
        ("clib", {}, "unknown data.tokens 'clib'; did you mean 'clip'"),
        ("clip", {"length": 2}, "data.text_length is 2; a prompt of data.tokens=clip needs at least 3"),
        ("clip", {"pad": -1}, "data.pad -1 is no id"),
        ("dimoo", {"length": 13}, "needs at least 14"),
        ("", {"length": 6}, "text_length is 6"),
    ],
)
def test_what_cannot_be_is_refused(tokens, more, message):
    with pytest.raises(UserError, match=message):
        texts(tokens, **more)


def test_a_tokenizer_is_asked_for_by_the_first_text():
    with pytest.raises(UserError, match="data.tokens=clip needs data.tokenizer, the folder"):
        texts("clip").encode(["cat"])
