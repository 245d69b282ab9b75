import numpy as np
import pytest

from maskrl_jax.data.dataset import conditioning_of, is_held_out, open_dataset
from maskrl_jax.errors import UserError


@pytest.fixture(scope="module")
def validation(shapes_dir):
    return open_dataset("shapes", "validation", shapes_dir, 32)


@pytest.fixture(scope="module")
def digits():
    return open_dataset("digits", "validation", "unused", 16)


def test_a_shapes_sample_has_its_parts(validation):
    sample = validation.get(3)
    assert sorted(sample) == ["cond", "image", "label", "tone"]
    assert sample["image"].shape == (32, 32, 3) and sample["image"].dtype == np.uint8
    assert sample["cond"].shape == (8,) and sample["cond"].dtype == np.int32
    assert sample["label"].shape == (8, 8) and sample["tone"].shape == ()


def test_conditions_describe_their_pictures(validation):
    samples = validation.take(np.arange(len(validation)))
    prompts = validation.describe(samples["cond"])
    assert (validation.verify(samples["image"] / np.float32(255), prompts)["strict"] == 1).all()
    np.testing.assert_array_equal(validation.encode(prompts), samples["cond"])


def test_conditioning_counts_the_null_condition(validation, digits):
    caption, label = validation.conditioning, digits.conditioning
    assert (caption.kind, caption.vocab_size, caption.length) == ("caption", 14, 8)
    np.testing.assert_array_equal(caption.null, np.zeros(8, np.int32))
    assert (label.kind, label.vocab_size, label.length, label.null.shape) == ("class", 11, 0, ())
    assert label.null == 10


def test_prompts_repeat_only_when_the_pool_is_used_up(validation):
    pool = validation.describe(validation.pool(held_out=True))
    assert validation.prompts(5, seed=1) == validation.prompts(5, seed=1)
    every = validation.prompts(2 * len(pool), seed=0)
    assert every[: len(pool)] == every[len(pool) :]
    assert sorted(every[: len(pool)]) == sorted(pool)
    assert sorted(every[: len(pool)]) == sorted(set(pool))


def test_no_prompt_is_both_trained_and_evaluated_on(validation):
    held_out, rest = (validation.describe(validation.pool(held_out=which)) for which in (True, False))
    assert held_out and rest and not set(held_out) & set(rest)
    assert set(held_out) | set(rest) == set(validation.describe(validation.columns["cond"]))
    assert is_held_out(held_out[0]) and not is_held_out(rest[0])


def test_classes_are_too_few_to_hold_any_out(digits):
    np.testing.assert_array_equal(digits.pool(held_out=True), digits.pool(held_out=False))
    assert len(digits.pool(held_out=True)) == 10


def test_positions_of_prompts_give_equal_shares(validation):
    prompts = validation.prompts(3, seed=0)
    positions = validation.positions_of(prompts, each=1)
    assert sorted(validation.describe(validation.take(positions)["cond"])) == sorted(prompts)


def test_classes_go_by_number_or_name(digits):
    assert digits.encode(["3", " 7 "]).tolist() == [3, 7]
    assert digits.describe(np.array([3, 10])) == ["3", ""]
    assert digits.verify is None
    assert set(digits.prompts(20, seed=0)) <= set("0123456789")
    for bad in ("ten", "10", "-1", ""):
        with pytest.raises(UserError, match="digits has no class"):
            digits.encode([bad])


def test_columns_cannot_be_changed_by_accident(validation):
    with pytest.raises(ValueError, match="read-only"):
        validation.get(0)["image"][0, 0, 0] = 0


@pytest.mark.parametrize(
    "change, message",
    [
        ({"split": "test"}, "unknown split 'test'"),
        ({"image_size": 64}, "pictures of 32 pixels, not 64"),
        ({"text_length": 6}, "text_length is 6; captions of shapes have up to 7 words, set at least that"),
        ({"name": "digits", "image_size": 0}, "image_size is 0"),
    ],
)
def test_bad_arguments_are_refused(shapes_dir, change, message):
    data = {"name": "shapes", "text_length": 8} | {key: change[key] for key in ("name", "text_length") if key in change}
    with pytest.raises(UserError, match=message):
        open_dataset(data, change.get("split", "train"), shapes_dir, change.get("image_size", 32))


def test_a_whole_caption_must_fit(shapes_dir, validation):
    longest = max(validation.describe(validation.pool(held_out=True)), key=len)
    assert open_dataset({"name": "shapes", "text_length": 7}, "validation", shapes_dir, 32).encode([longest]).all()
    assert conditioning_of({"name": "shapes", "text_length": 7}).length == 7
    with pytest.raises(UserError, match="text_length is 6; captions of shapes have up to 7 words"):
        conditioning_of({"name": "shapes", "text_length": 6})


def test_alike_gives_another_sample_of_the_same_condition(validation):
    positions = np.arange(len(validation))
    cond = validation.columns["cond"]
    found = np.stack([validation.alike(positions, np.full(len(positions), draw)) for draw in range(40)])
    assert (cond[found] == cond[positions]).all()
    alone = np.array([(cond == cond[i]).all(1).sum() == 1 for i in positions])
    assert (found[:, alone] == positions[alone]).all()
    assert (found[:, ~alone] != positions[~alone]).all()
    some = int(np.flatnonzero(~alone)[0])  # every other one turns up
    others = set(np.flatnonzero((cond == cond[some]).all(1))) - {some}
    assert len(others) <= 40 and set(found[:, some]) == others
