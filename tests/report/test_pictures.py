import numpy as np
import pytest
from PIL import Image

from klbox_jax.report.pictures import PALETTE, LabeledBoxes, contact_sheet, draw_detections, save_picture

GREY = np.full((60, 80, 3), 128, np.uint8)


def draw(boxes, stds=None, *, labels=None, **more):
    boxes = np.array(boxes, np.float32).reshape(-1, 4)
    labels = ["cat"] * len(boxes) if labels is None else labels
    stds = None if stds is None else np.array(stds, np.float32).reshape(-1, 4)
    detections = LabeledBoxes(boxes, labels, np.full(len(boxes), 0.5, np.float32), stds)
    return draw_detections(GREY, detections, **more)


def changed(picture, reference):
    return (picture != reference).any(axis=-1)


def test_size_and_untouched_input():
    before = GREY.copy()
    assert draw([[10, 30, 40, 50]], scale=1).shape == (60, 80, 3)
    assert draw([[10, 30, 40, 50]], scale=3).shape == (180, 240, 3)
    assert draw([[10, 30, 40, 50]]).shape == (420, 560, 3)
    np.testing.assert_array_equal(GREY, before)
    assert draw([[10, 30, 40, 50]], scale=1).flags.writeable


def test_nothing_drawn_changes_nothing():
    np.testing.assert_array_equal(draw([], np.zeros((0, 4)), scale=1), GREY)


def test_a_bigger_std_changes_more_pixels():
    line = draw([[20, 20, 60, 50]], scale=2)
    areas = [changed(draw([[20, 20, 60, 50]], np.full(4, std), scale=2), line).sum() for std in (0, 1, 2, 4)]
    assert areas[0] == 0
    assert areas[1] < areas[2] < areas[3]


def test_bands_are_to_scale():
    # Only the right edge is uncertain: x2 = 60, std 2, scale 4. The row through the middle of the box shows
    # the band from 4 * (60 - 4) to 4 * (60 + 4), stronger from 4 * (60 - 2) to 4 * (60 + 2).
    picture = draw([[20, 20, 60, 50]], [[0, 0, 2, 0]], scale=4).astype(int)
    row = np.abs(picture[4 * 35] - 128).sum(axis=-1)
    touched = np.flatnonzero(row)
    right = touched[touched > 160]
    assert (right.min(), right.max()) == (224, 255)
    faint, strong = row[[225, 230, 250, 254]], row[[233, 236, 243, 246]]
    assert len(set(faint)) == 1
    assert len(set(strong)) == 1
    assert strong[0] > faint[0] > 0
    # The left edge is a thin line.
    assert len(touched[touched < 160]) <= 4
    assert tuple(picture[4 * 35, 240]) == PALETTE[0]


def test_wide_bands_do_not_hide_small_objects():
    def middle_change(side):
        box = [40 - side / 2, 30 - side / 2, 40 + side / 2, 30 + side / 2]
        picture = draw([box], np.full(4, side / 2), scale=4).astype(int)
        row = 4 * 30
        return np.abs(picture[row, 4 * 40] - 128).sum() / np.abs(np.array(PALETTE[0]) - 128).sum()

    # The bands of one and two stds both cover the whole box: 1 - (1 - .28 f)(1 - .42 f) with f = 0.3, not 1.
    assert middle_change(20) == pytest.approx(1 - (1 - 0.28 * 0.3) * (1 - 0.42 * 0.3), abs=0.02)
    assert middle_change(12) == pytest.approx(middle_change(20), abs=0.02)


def test_a_part_of_a_pixel_is_a_part_of_the_colour():
    # The wider the band, the more colour, down to hundredths of a pixel.
    sums = [
        np.abs(draw([[20, 20, 60, 50]], np.full(4, std), scale=1).astype(int) - 128).sum()
        for std in (1.0, 1.2, 1.4)
    ]
    assert sums[0] < sums[1] < sums[2]


@pytest.mark.parametrize(
    "box",
    [
        [30, 30, 30, 30],
        [50, 40, 20, 10],
        [-500, -500, 500, 500],
        [-1e9, 10, 1e9, 20],
        [70, 50, 90, 70],
        [0, 0, 80, 60],
    ],
)
def test_strange_boxes_do_not_break_it(box):
    picture = draw([box], [[3, 3, 3, 3]], gt_boxes=np.array([box], np.float32), scale=2)
    assert picture.shape == (120, 160, 3)
    huge = draw([box], [[1e6, 0, np.inf, 1e6]], scale=2)
    assert huge.shape == (120, 160, 3)


@pytest.mark.parametrize("box", [[np.nan, 0, 5, 5], [0, 0, np.inf, 5], [90, 10, 99, 20], [-9, -9, -1, -1]])
def test_boxes_that_cannot_be_seen_are_left_out(box):
    boxes = np.array([box], np.float32)
    np.testing.assert_array_equal(draw(boxes, [[1, 1, 1, 1]], gt_boxes=boxes, scale=1), GREY)


def test_true_boxes_are_dashed_white():
    picture = draw([], gt_boxes=np.array([[10, 10, 70, 50]], np.float32), scale=2)
    side = (picture[40:80, 19:22] == 255).all(axis=-1).any(axis=-1)
    assert 0.3 < side.mean() < 0.9


def test_a_class_keeps_its_colour_between_pictures():
    box = [20, 30, 60, 50]
    names = ["ant", "bee", "cat"]
    both = draw([box, [0, 0, 5, 5]], labels=["cat", "ant"], class_names=names, scale=4)
    alone = draw([box], labels=["cat"], class_names=names, scale=4)
    np.testing.assert_array_equal(both[4 * 40, 240], alone[4 * 40, 240])
    assert tuple(alone[4 * 40, 240]) == PALETTE[2]


def test_labels_are_checked():
    with pytest.raises(ValueError, match="'dog'"):
        draw([[1, 1, 5, 5]], labels=["dog"], class_names=["cat"])
    with pytest.raises(ValueError, match="2 labels for 1 boxes"):
        draw([[1, 1, 5, 5]], labels=["dog", "cat"])


def test_contact_sheet():
    images = [np.full((20, 30, 3), 10 * i, np.uint8) for i in range(3)]
    sheet = contact_sheet(images, columns=2, gap=4)
    # Two columns of 30 and two rows of 20 with a gap on every side.
    assert sheet.shape == (3 * 4 + 2 * 20, 3 * 4 + 2 * 30, 3)
    assert (sheet[4:24, 4:34] == 0).all()
    assert (sheet[4:24, 38:68] == 10).all()
    assert (sheet[28:48, 4:34] == 20).all()
    assert (sheet[28:48, 38:68] == 255).all()
    titled = contact_sheet(images, columns=2, gap=4, captions=["a", "b", "c"])
    assert titled.shape[0] > sheet.shape[0]
    assert titled.shape[1] == sheet.shape[1]
    assert contact_sheet(images[:1], columns=5, gap=0).shape == (20, 30, 3)


def test_contact_sheet_refuses_what_it_cannot_lay_out():
    with pytest.raises(ValueError, match="at least 1 image and 1 column, not 0 and 2"):
        contact_sheet([], columns=2)
    with pytest.raises(ValueError, match="1 captions for 2 images"):
        contact_sheet([GREY, GREY], columns=2, captions=["a"])


def test_save_picture(tmp_path):
    picture = draw([[20, 20, 60, 50]], np.ones(4), scale=1)
    save_picture(tmp_path / "picture.png", picture)
    with Image.open(tmp_path / "picture.png") as file:
        np.testing.assert_array_equal(np.asarray(file), picture)
