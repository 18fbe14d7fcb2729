import jax
import numpy as np

from klbox_jax.models.roi_heads import RoISampling, sample_rois
from tests.cases import ground_truth
from tests.models.roi_cases import K, proposals_of


def sample(proposals, gt, *, num_samples=8, positive_fraction=0.5, seed=0):
    sampling = RoISampling(batch_size_per_image=num_samples, positive_fraction=positive_fraction)
    return jax.jit(
        lambda proposals, gt, key: sample_rois(proposals, gt, key, num_classes=K, sampling=sampling)
    )(proposals, gt, jax.random.key(seed))


def rows(samples, mask):
    return {tuple(box) for box in np.asarray(samples.boxes)[np.asarray(mask)].tolist()}


def test_sampling_by_hand():
    gt = ground_truth(
        [[0, 0, 10, 10], [20, 20, 40, 40], [100, 100, 200, 200], [60, 60, 70, 70]],
        [2, 0, 1, 1],
        is_crowd=[False, False, True, False],
        valid=[True, True, True, False],
        box_stds=np.arange(16, dtype=np.float32).reshape(4, 4),
    )
    proposals = proposals_of(
        [
            [0, 0, 10, 9],  # IoU 0.9 with object 0
            [20, 20, 40, 31],  # 0.55 with object 1
            [20, 20, 40, 29],  # 0.45: background
            [120, 120, 130, 130],  # inside the crowd: ignored
            [60, 60, 70, 70],  # on the padded slot: background
            [0, 0, 10, 10],  # not a proposal
        ],
        valid=[True] * 5 + [False],
    )
    samples = sample(proposals, gt, num_samples=10)
    foreground, valid = np.asarray(samples.is_foreground), np.asarray(samples.valid)
    # The two objects are candidates next to the proposals; the crowd and the padded slot are not.
    assert rows(samples, foreground) == {(0, 0, 10, 9), (20, 20, 40, 31), (0, 0, 10, 10), (20, 20, 40, 40)}
    assert foreground.sum() == 4
    assert rows(samples, valid & ~foreground) == {(20, 20, 40, 29), (60, 60, 70, 70)}
    assert valid.sum() == 6
    for row in np.flatnonzero(foreground):
        of_second = samples.boxes[row, 0] >= 20
        assert int(samples.gt_classes[row]) == (0 if of_second else 2)
        assert int(samples.gt_index[row]) == (1 if of_second else 0)
        np.testing.assert_array_equal(samples.gt_boxes[row], gt.boxes[int(of_second)])
        np.testing.assert_array_equal(samples.gt_box_stds[row], gt.box_stds[int(of_second)])
    np.testing.assert_array_equal(np.asarray(samples.gt_classes)[~foreground], K)


def test_an_image_of_crowds_and_padding_has_no_foreground():
    gt = ground_truth([[0, 0, 50, 50], [0, 0, 50, 50]], [1, 1], is_crowd=[True, False], valid=[True, False])
    samples = sample(proposals_of([[0, 0, 50, 50], [5, 5, 30, 30], [60, 60, 90, 90]]), gt)
    assert not samples.is_foreground.any()
    assert rows(samples, samples.valid) == {(60, 60, 90, 90)}
    np.testing.assert_array_equal(samples.gt_classes, K)


def test_empty_ground_truth_gives_background_alone():
    gt = ground_truth([[0, 0, 1, 1]] * 2, [0, 0], valid=[False, False])
    samples = sample(proposals_of([[0, 0, 50, 50], [0, 0, 1, 1], [5, 5, 30, 30]]), gt)
    assert int(samples.valid.sum()) == 3
    assert not samples.is_foreground.any()
    np.testing.assert_array_equal(samples.gt_classes, K)


def test_the_share_of_foreground_is_bounded():
    boxes = [[0, 0, 20, 20 - 0.1 * i] for i in range(20)] + [[50, 50, 60, 60 + i] for i in range(20)]
    samples = sample(
        proposals_of(boxes), ground_truth([[0, 0, 20, 20]], [1]), num_samples=16, positive_fraction=0.25
    )
    assert int(samples.is_foreground.sum()) == 4
    assert int(samples.valid.sum()) == 16
