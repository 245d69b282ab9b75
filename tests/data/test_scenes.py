import itertools

import numpy as np

from maskrl_jax.data import scenes
from maskrl_jax.data.captions import COLOURS, RELATION_STEPS, SHAPES, Caption, Thing
from maskrl_jax.data.scenes import Scene


def sampled(n):
    return [scenes.sample(np.random.default_rng((7, i))) for i in range(n)]


def test_a_quarter_of_the_scenes_is_single_and_half_is_light():
    drawn = sampled(2000)
    assert abs(np.mean([len(s.caption.things) == 1 for s in drawn]) - 0.25) < 0.04
    assert abs(np.mean([s.tone for s in drawn]) - 0.5) < 0.04


def test_two_things_differ_and_their_stamps_leave_a_free_cell():
    for scene in sampled(500):
        if scene.caption.relation is None:
            continue
        assert scene.caption.things[0] != scene.caption.things[1]
        offset = np.subtract(scene.centres[1], scene.centres[0])
        assert abs(offset).max() >= 4
        assert np.argmax(abs(offset)) == np.argmax(np.abs(RELATION_STEPS[scene.caption.relation]))
        assert abs(offset[0]) != abs(offset[1])


def test_every_relation_has_the_same_number_of_layouts():
    assert [len(places) for places in scenes.layouts()] == [94] * 4


def test_render_paints_the_stamp_on_its_cells():
    scene = Scene(Caption((Thing(SHAPES.index("square"), COLOURS.index("blue")),)), ((1, 2),), tone=1)
    image = scenes.render(scene)
    assert image.shape == (32, 32, 3) and image.dtype == np.uint8
    blue = (image == scenes.COLOUR_RGB[2]).all(-1)
    assert blue.sum() == 144 and blue[0:12, 4:16].all()
    assert (image[~blue] == scenes.TONE_RGB[1]).all()


def test_stamps_are_distinct():
    areas = scenes.stamps().sum(axis=(1, 2)).tolist()
    assert areas == [112, 144, 78, 80]
    for a, b in itertools.combinations(scenes.stamps(), 2):
        assert (a & b).sum() / (a | b).sum() < 0.8


def test_a_small_codebook_can_hold_all_cells():
    images = np.stack([scenes.render(scene) for scene in sampled(1500)])
    cells = images.reshape(-1, 8, 4, 8, 4, 3).transpose(0, 1, 3, 2, 4, 5).reshape(-1, 48)
    distinct = {cell.tobytes() for cell in cells}
    # 2 tones, 4 plain colours, and per colour and tone 4 corners of a circle and 1 diagonal of a triangle
    assert len(distinct) == 2 + 4 + 4 * 2 * 5


def test_cell_map_marks_the_centre_cells():
    caption = Caption((Thing(0, 0), Thing(3, 2)), relation=0)
    cells = scenes.cell_map(Scene(caption, ((2, 1), (3, 6)), tone=0))
    assert cells.dtype == np.int32 and cells.shape == (8, 8)
    assert cells[2, 1] == 1 and cells[3, 6] == 1 + 4 * 3 + 2 and (cells > 0).sum() == 2
