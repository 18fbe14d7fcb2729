import numpy as np
import pytest

from klbox_jax.ops.anchors import AnchorGenerator


def test_anchors_by_hand():
    generator = AnchorGenerator(sizes=((8.0,), (16.0,)), aspect_ratios=(0.25, 1.0, 4.0), strides=(16, 32))
    fine, coarse = generator.grid(
        (20, 32)
    )  # ceil(20 / 16) x ceil(32 / 16) and ceil(20 / 32) x ceil(32 / 32) cells
    # Area 64: 16 x 4, 8 x 8 and 4 x 16 (width x height), at (8, 8), (24, 8), (8, 24), (24, 24).
    np.testing.assert_array_equal(
        fine,
        [
            [0, 6, 16, 10],
            [4, 4, 12, 12],
            [6, 0, 10, 16],
            [16, 6, 32, 10],
            [20, 4, 28, 12],
            [22, 0, 26, 16],
            [0, 22, 16, 26],
            [4, 20, 12, 28],
            [6, 16, 10, 32],
            [16, 22, 32, 26],
            [20, 20, 28, 28],
            [22, 16, 26, 32],
        ],
    )
    # Area 256 at (16, 16), reaching over the border.
    np.testing.assert_array_equal(coarse, [[0, 12, 32, 20], [8, 8, 24, 24], [12, 0, 20, 32]])
    assert fine.dtype == coarse.dtype == np.float32


def test_sizes_run_slower_than_ratios():
    generator = AnchorGenerator(sizes=((10.0, 20.0),), aspect_ratios=(0.5, 2.0), strides=(16,))
    (anchors,) = generator.grid((16, 16))
    width, height = anchors[:, 2] - anchors[:, 0], anchors[:, 3] - anchors[:, 1]
    np.testing.assert_allclose(np.sqrt(width * height), [10, 10, 20, 20], rtol=1e-6)
    np.testing.assert_allclose(height / width, [0.5, 2.0, 0.5, 2.0], rtol=1e-6)
    assert generator.num_anchors_per_cell == 4


def test_detectron2_count_for_a_padded_canvas():
    generator = AnchorGenerator(
        sizes=((32.0,), (64.0,), (128.0,), (256.0,), (512.0,)),
        aspect_ratios=(0.5, 1.0, 2.0),
        strides=(4, 8, 16, 32, 64),
    )
    counts = [len(level) for level in generator.grid((800, 1344))]
    # 200 x 336, 100 x 168, 50 x 84, 25 x 42 and 13 x 21 cells of three
    assert counts == [201600, 50400, 12600, 3150, 819]


def test_a_row_of_a_reshaped_head_output_is_its_anchor():
    generator = AnchorGenerator(sizes=((8.0, 12.0),), aspect_ratios=(0.5, 1.0, 2.0), strides=(8,))
    (anchors,) = generator.grid((40, 24))
    by_cell = anchors.reshape(5, 3, generator.num_anchors_per_cell, 4)
    for row, column in ((0, 0), (4, 1), (2, 2)):
        for box in by_cell[row, column]:
            np.testing.assert_allclose((box[:2] + box[2:]) / 2, [column * 8 + 4, row * 8 + 4], atol=1e-5)


def test_an_offset_moves_every_anchor_by_a_share_of_its_stride():
    arguments = {"sizes": ((8.0,), (16.0,)), "aspect_ratios": (0.25, 1.0), "strides": (16, 32)}
    centred = AnchorGenerator(**arguments).grid((40, 50))
    for offset in (0.0, 0.25):
        moved = AnchorGenerator(**arguments, offset=offset).grid((40, 50))
        for there, here, stride in zip(centred, moved, (16, 32), strict=True):
            np.testing.assert_allclose(here, there - (0.5 - offset) * stride, atol=1e-5)
    # Area 64 and 256 at the origin: 16 x 4 and 8 x 8, 32 x 8 and 16 x 16.
    fine, coarse = AnchorGenerator(**arguments, offset=0.0).grid((16, 16))
    np.testing.assert_array_equal(fine, [[-8, -2, 8, 2], [-4, -4, 4, 4]])
    np.testing.assert_array_equal(coarse, [[-16, -4, 16, 4], [-8, -8, 8, 8]])


def test_rounded_anchors_by_hand():
    generator = AnchorGenerator(
        sizes=((32.0,),), aspect_ratios=(0.5, 1.0, 2.0), strides=(4,), offset=0.0, round_sizes=True
    )
    (anchors,) = generator.grid((4, 8))
    # Half of 32 times the root of 2 is 22.63, half of 32 over it 11.31.
    cell = np.array([[-23, -11, 23, 11], [-16, -16, 16, 16], [-11, -23, 11, 23]], np.float32)
    np.testing.assert_array_equal(anchors, np.concatenate([cell, cell + np.float32([4, 0, 4, 0])]))


def test_mismatched_levels_are_refused():
    with pytest.raises(ValueError, match="1 levels and strides for 2"):
        AnchorGenerator(sizes=((8.0,),), aspect_ratios=(1.0,), strides=(8, 16))
    with pytest.raises(ValueError, match="differ in number"):
        AnchorGenerator(sizes=((8.0,), (8.0, 16.0)), aspect_ratios=(1.0,), strides=(8, 16))
