"""The judge's stitched pictures: what is pasted, what the labels say of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from maskrl_jax import runner
from maskrl_jax.checkpoint import load_arrays
from maskrl_jax.data import shapes
from maskrl_jax.data.batches import positions_at
from maskrl_jax.data.dataset import open_dataset
from maskrl_jax.keys import TRAIN, sample_keys
from maskrl_jax.tasks import judge
from maskrl_jax.writers import read_metrics

SIDE, PATCH = 8, 4


def keys(index):
    """Return keys of samples, made anew for every use."""
    return sample_keys(0, TRAIN, 0, jnp.asarray(index))


def stitched(images, other, count=64):
    """Stitch `count` copies of a picture with cells labelled 1 into one with cells labelled 2."""
    shape = (count, SIDE, SIDE)
    tile = np.broadcast_to
    return [
        np.asarray(x)
        for x in judge.stitch(
            keys(range(count)),
            jnp.asarray(tile(images, (count, *images.shape))),
            jnp.ones(shape, jnp.int32),
            jnp.asarray(tile(other, (count, *other.shape))),
            jnp.full(shape, 2, jnp.int32),
            PATCH,
        )
    ]


def picture(value):
    return np.full((SIDE * PATCH, SIDE * PATCH, 3), value, np.float32)


def around(cells, row, col):
    """Return the 3 x 3 neighbourhood of a cell, cut at the border."""
    return cells[max(row - 1, 0) : row + 2, max(col - 1, 0) : col + 2]


def test_labels_follow_the_picture_that_a_whole_neighbourhood_comes_from():
    images, labels, mixed = stitched(picture(0.0), picture(1.0))
    pasted = images[:, ::PATCH, ::PATCH, 0] == 1
    np.testing.assert_array_equal(images[..., 0], pasted.repeat(PATCH, 1).repeat(PATCH, 2))
    for sample in range(len(images)):
        for row in range(SIDE):
            for col in range(SIDE):
                near = around(pasted[sample], row, col)
                expected = (1, False) if not near.any() else (2, False) if near.all() else (0, True)
                assert (labels[sample, row, col], mixed[sample, row, col]) == expected


def test_about_half_of_the_pictures_stay_whole_and_the_others_differ_in_how_much_is_pasted():
    images, _, mixed = stitched(picture(0.0), picture(1.0))
    share = (images == 1).mean((1, 2, 3))
    assert 20 <= (share == 0).sum() <= 44
    assert not mixed[share == 0].any()
    assert len(np.unique(share)) > 10


def test_every_second_partner_shows_the_same_caption(tmp_path, monkeypatch):
    monkeypatch.setattr(shapes, "SPLIT_SIZES", tiny.SPLIT_SIZES)
    train = open_dataset("shapes", "train", str(tmp_path), 32)
    whole = judge._partners(train, 3, 16, slice(0, 16), 0)
    own, samples = positions_at(len(train), 3, 16, slice(0, 16), 0)
    cond = train.columns["cond"]
    assert (cond[whole] == cond[own])[samples % 2 == 0].all()
    assert not (cond[whole] == cond[own])[samples % 2 == 1].all(1).all()
    np.testing.assert_array_equal(judge._partners(train, 3, 16, slice(8, 16), 0), whole[8:])


def test_cells_where_both_pictures_agree_are_no_seam():
    images, labels, mixed = stitched(picture(0.5), picture(0.5))
    assert (images == 0.5).all() and (labels == 1).all() and not mixed.any()


def test_one_changed_cell_touches_its_whole_neighbourhood():
    changed = picture(0.0)[None].copy()
    changed[0, 3 * PATCH, 5 * PATCH, 0] = 1  # one pixel of cell (3, 5)
    found = np.asarray(judge._changed(jnp.asarray(changed), jnp.asarray(picture(0.0)[None]), PATCH))[0]
    expected = np.zeros((SIDE, SIDE), bool)
    expected[2:5, 4:7] = True
    np.testing.assert_array_equal(found, expected)


def test_the_same_sample_is_stitched_alike_in_any_batch():
    rng = np.random.default_rng(0)
    images, other = rng.random((2, 16, SIDE * PATCH, SIDE * PATCH, 3), np.float32)
    cells, other_cells = rng.integers(0, 17, (2, 16, SIDE, SIDE))
    whole = judge.stitch(keys(np.arange(16)), images, cells, other, other_cells, PATCH)
    part = judge.stitch(keys(np.arange(8, 16)), images[8:], cells[8:], other[8:], other_cells[8:], PATCH)
    jax.tree.map(np.testing.assert_array_equal, tuple(x[8:] for x in whole), part)


def test_the_tone_of_a_picture_with_seams_is_not_asked_for():
    wiring = judge.Wiring(tiny.get_config("judge"))
    params = wiring.model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    batch = {
        "label": jnp.ones((32, SIDE, SIDE), jnp.int32),
        "other_image": jnp.full((32, 32, 32, 3), 255, jnp.uint8),
        "other_label": jnp.ones((32, SIDE, SIDE), jnp.int32),
    }
    images = jnp.zeros((32, 32, 32, 3))
    _, _, mixed = judge.stitch(
        keys(range(32)), images, batch["label"], jnp.ones(images.shape), batch["other_label"], PATCH
    )
    whole = ~np.asarray(mixed).any((1, 2))

    def loss(tone):
        return float(wiring.loss(params, images, batch | {"tone": tone}, keys(range(32)))[0])

    assert 0 < whole.sum() < 32
    assert loss(whole * 0) != loss(whole * 1) and loss(whole * 0) == loss(~whole * 1)


def test_training_tells_pictures_apart(trained):
    lines = read_metrics(trained.parents["judge"].workdir)
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    (measured,) = [line for line in lines if "eval/exact" in line]
    assert losses[-1] < losses[0] and measured["eval/mixed_accuracy"] > 0.5
    assert set(measured) >= {"eval/tone", "eval/exact_stitched"}


@pytest.mark.parametrize("argument", ["smoke", "digits-smoke"])
def test_phases_name_the_shapes_that_batches_have(build, argument):
    config = tiny.judge(argument)
    (update,) = judge.phases(config, None)
    batch = build(config).batch(0)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), batch) == jax.tree.map(
        lambda x: (x.shape, x.dtype), update.args[2]
    )


def test_a_loaded_judge_reads_as_the_trained_one(trained):
    parent = trained.parents["judge"]
    loaded = judge.load(parent)
    ema = load_arrays(trained.parents["judge"].workdir, ("ema",))["ema"]
    images = np.random.default_rng(0).random((2, 32, 32, 3), np.float32)
    out = loaded.read(parent.params, images)
    expected = judge.Judge(loaded.config).apply(ema, images)
    jax.tree.map(np.testing.assert_array_equal, out, expected)
    assert out["cells"].shape == (2, 8, 8, 17) and runner.task_module(trained.parents["judge"].config) is judge
