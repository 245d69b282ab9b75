import numpy as np

from maskrl_jax.data import detect, scenes


def classes_of(colour_RGB):
    return int(detect.pixel_classes(np.array(colour_RGB, np.float32).reshape(1, 1, 1, 3) / 255)[0, 0, 0])


def test_palette_colours_and_tones_have_their_own_class():
    assert [classes_of(rgb) for rgb in scenes.COLOUR_RGB] == [0, 1, 2, 3]
    assert [classes_of(rgb) for rgb in scenes.TONE_RGB] == [detect.FIRST_TONE, detect.FIRST_TONE + 1]


def test_a_blurred_edge_changes_class_half_way():
    for colour in range(4):
        for tone in range(2):
            start, end = scenes.TONE_RGB[tone].astype(float), scenes.COLOUR_RGB[colour].astype(float)
            assert classes_of(start + 0.65 * (end - start)) == colour
            assert classes_of(start + 0.35 * (end - start)) >= detect.FIRST_TONE


def test_black_and_purple_are_foreign():
    assert classes_of((0, 0, 0)) == detect.FOREIGN
    assert classes_of((150, 0, 160)) == detect.FOREIGN


def canvas():
    return np.full((1, 32, 32), detect.FIRST_TONE, np.uint8)


def test_every_stamp_is_found_at_its_place():
    for shape, stamp in enumerate(scenes.stamps()):
        picture = canvas()
        picture[0, 8:20, 20:32][stamp] = 2
        found = detect.find_objects(picture)
        assert found.shape.tolist() == [shape] and found.colour.tolist() == [2]
        np.testing.assert_array_equal(found.middle, [[14, 26]])


def test_specks_are_ignored_and_half_a_cell_is_not():
    picture = canvas()
    picture[0, 4, 4:11] = 0
    assert len(detect.find_objects(picture).shape) == 0
    picture[0, 4, 4:12] = 0
    found = detect.find_objects(picture)
    assert found.shape.tolist() == [detect.UNKNOWN]


def test_parts_do_not_join_across_pictures_or_corners():
    picture = np.repeat(canvas(), 2, axis=0)
    picture[:, :4, :4] = 1
    picture[:, 4:8, 4:8] = 1
    assert detect.find_objects(picture).picture.tolist() == [0, 0, 1, 1]
