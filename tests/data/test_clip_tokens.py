"""Byte pairs of prompts from local files; with a small vocabulary by hand, with the real one against the references."""

import json

import clip_weights
import numpy as np
import pytest
from references import reference

from maskrl_jax.errors import UserError

PROMPTS = [
    "a photo of a cat",
    "A  Photo,\tof 3 cats' toys!!! it's 2024",
    "",
    "naïve café 猫 🐱 ½ e\u0301",
    "x" * 600,
    "word " * 100,
    "don't we'll I'm SHE'S",
    "  under_score-hyphen/slash...",
]


def tokens(folder, **options):
    pytest.importorskip("tokenizers", reason="needs the package tokenizers")
    from maskrl_jax.data.clip_tokens import ClipTokens

    return ClipTokens(str(folder), **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("vocabulary")
    clip_weights.write_tokenizer(place)
    return place


def ids_of(folder, *entries):
    vocabulary = json.loads((folder / "vocab.json").read_text())
    return [vocabulary[entry] for entry in entries]


def test_by_hand(folder):
    found = tokens(folder, length=9).encode(["A cat's DOG", "red  \n cats", ""])
    start, end = ids_of(folder, "<|startoftext|>", "<|endoftext|>")
    assert found.dtype == np.int32
    first = ids_of(folder, "a</w>", "cat</w>", "'", "s</w>", "dog</w>")
    assert found[0].tolist() == [start, *first, end, end, end]
    second = ids_of(folder, "red</w>", "ca", "t", "s</w>")  # the merge is of a t at the end of a word
    assert found[1].tolist() == [start, *second, end, end, end, end]
    assert found[2].tolist() == [start] + 8 * [end]


def test_what_is_too_long_ends_with_the_end_token_and_padding_is_asked_for(folder):
    found = tokens(folder, length=4, pad=0).encode(["cat dog red cat", "cat"])
    start, end, cat, dog = ids_of(folder, "<|startoftext|>", "<|endoftext|>", "cat</w>", "dog</w>")
    assert found.tolist() == [[start, cat, dog, end], [start, cat, end, 0]]


def test_a_tokenizer_that_is_not_there_is_one_line(tmp_path):
    with pytest.raises(UserError, match="no vocab.json with merges.txt, and no tokenizer.json"):
        tokens(tmp_path)


@pytest.mark.parametrize(
    ("vocabulary", "merges", "message"),
    [
        ("{}", "#version: 0.2\na b\n", "vocab.json and merges.txt make no tokenizer .*copy both again"),
        ("{}", "#version: 0.2\n", "has no <|startoftext|> or <|endoftext|>; give the one of a CLIP"),
        (None, "#version: 0.2\na b\n", "Token .ab. out of vocabulary"),
        ("{", "#version: 0.2\n", "vocab.json and merges.txt make no tokenizer "),
    ],
)
def test_two_files_that_do_not_fit_each_other_are_one_line(folder, tmp_path, vocabulary, merges, message):
    (tmp_path / "vocab.json").write_text(vocabulary or (folder / "vocab.json").read_text())
    (tmp_path / "merges.txt").write_text(merges)
    with pytest.raises(UserError, match=message.replace("|", "[|]")) as error:
        tokens(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_a_tokenizer_of_another_model_is_refused(folder, tmp_path):
    whole = tokens(folder)._tokenizer.to_str()
    (tmp_path / "tokenizer.json").write_text(whole.replace("<|startoftext|>", "<s>"))
    with pytest.raises(UserError, match="give the one of a CLIP"):
        tokens(tmp_path)


def test_one_file_or_two_make_no_difference(folder, tmp_path):
    two = tokens(folder)
    (tmp_path / "tokenizer.json").write_text(two._tokenizer.to_str())
    prompts = [*PROMPTS, "cat <|endoftext|> dog"]
    np.testing.assert_array_equal(tokens(tmp_path).encode(prompts), two.encode(prompts))


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The published vocabulary, which open_clip ships."""
    open_clip = reference("open_clip")
    place = tmp_path_factory.mktemp("published")
    found = open_clip.tokenizer.SimpleTokenizer()
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    (place / "vocab.json").write_text(json.dumps({names.get(k, k): i for k, i in found.encoder.items()}))
    merges = sorted(found.bpe_ranks, key=found.bpe_ranks.get)
    (place / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    return place


@pytest.mark.parity
def test_agrees_with_hugging_face(published):
    theirs = reference("transformers").CLIPTokenizer.from_pretrained(str(published))
    prompts = [*PROMPTS, "<|endoftext|> hi <|startoftext|>"]
    expected = theirs(prompts, padding="max_length", truncation=True, max_length=77)["input_ids"]
    np.testing.assert_array_equal(tokens(published).encode(prompts), expected)
    assert tokens(published).encode(["a photo of a cat"])[0, :7].tolist() == [49406, 320, 1125, 539, 320, 2368, 49407]


@pytest.mark.parity
def test_agrees_with_open_clip(published):
    theirs = reference("open_clip").get_tokenizer("ViT-H-14")(PROMPTS).numpy()
    np.testing.assert_array_equal(tokens(published, pad=0).encode(PROMPTS), theirs)
