import contextlib
import dataclasses
import pathlib
import threading
import time

import jax
import numpy as np
import pytest
from PIL import Image

from klbox_jax.data import loader
from klbox_jax.data.coco import CocoSource
from klbox_jax.data.loader import blank_batch, check_fits, eval_batches, restore_image_ids, train_batches
from klbox_jax.data.masks import run_lengths
from klbox_jax.data.plan import EvalPlan, Shard, TrainPlan
from klbox_jax.data.source import DataError, Record
from klbox_jax.data.transforms import Preprocessing

SHARED_DATA = pathlib.Path(__file__).parents[3] / "shared" / "data"
needs_shared_data = pytest.mark.skipif(
    not (SHARED_DATA / "aquarium").is_dir(), reason="the sample photographs are not beside the repository"
)

PREPROCESSING = Preprocessing(
    short_side=24, long_side=40, canvases=((40, 24), (24, 40), (24, 24)), max_gt=4, scale_jitter=(0.6, 1.5)
)


class MemorySource:
    """Images of three shapes made from their index."""

    name = "memory"
    class_names = ("a", "b")
    category_ids = (1, 2)
    fingerprint = None

    def __init__(self, num_images=26, *, unreadable=(), with_stds=False):
        self.unreadable = set(unreadable)
        shapes = [(50, 30), (30, 50), (40, 40)]
        self.records = [
            Record(
                image_id=1000 + index,
                file_name=f"{index}.png",
                height=shapes[index % 3][0],
                width=shapes[index % 3][1],
                boxes=np.array([[1, 2, 20, 28]] * (index % 4), np.float32).reshape(-1, 4),
                classes=np.full(index % 4, index % 2, np.int32),
                is_crowd=np.zeros(index % 4, bool),
                box_stds=np.ones((index % 4, 4), np.float32) if with_stds else None,
            )
            for index in range(num_images)
        ]

    def load_image(self, index):
        if index in self.unreadable:
            raise DataError(f"{index}.png cannot be decoded. Restore the file.")
        record = self.records[index]
        return np.random.default_rng(index).integers(0, 256, (record.height, record.width, 3), np.uint8)

    def coco_ground_truth(self):
        return {}


def _train(source, *, start=0, steps=14, threads=2, seed=7, **options):
    plan = TrainPlan(check_fits(source, PREPROCESSING), batch_size=4, seed=seed)
    iterator = train_batches(
        source, plan, PREPROCESSING, steps=range(start, start + steps), num_threads=threads, **options
    )
    with contextlib.closing(iterator):
        return list(iterator)


def _assert_equal(batches, expected):
    assert len(batches) == len(expected)
    for batch, other in zip(batches, expected, strict=True):
        assert jax.tree.structure(batch) == jax.tree.structure(other)
        for leaf, other_leaf in zip(jax.tree.leaves(batch), jax.tree.leaves(other), strict=True):
            np.testing.assert_array_equal(leaf, other_leaf)


def test_threads_and_buffers_change_nothing(monkeypatch):
    source = MemorySource(with_stds=True)
    alone = _train(source, threads=0)
    assert len({batch.images.shape for batch in alone}) == 3
    assert alone[0].gt.box_stds.shape == (4, 4, 4)
    _assert_equal(_train(source, threads=1), alone)
    monkeypatch.setattr(loader, "PREFETCH", 9)
    _assert_equal(_train(source, threads=4), alone)


@pytest.mark.parametrize("start", [1, 6, 13])
def test_a_resumed_run_has_the_batches_of_an_unbroken_one(start):
    source = MemorySource()
    _assert_equal(_train(source, start=start, steps=14 - start), _train(source)[start:])


def test_another_seed_has_other_batches():
    source = MemorySource()
    first, other = _train(source, steps=8), _train(source, steps=8, seed=8)
    assert any((a.image_id != b.image_id).any() for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("process_count", [2, 4])
def test_processes_share_the_global_batch(process_count):
    source = MemorySource()
    shares = [_train(source, steps=7, shard=Shard(index, process_count)) for index in range(process_count)]
    joined = [
        jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts) for parts in zip(*shares, strict=True)
    ]
    _assert_equal(joined, _train(source, steps=7))


def test_a_batch_that_cannot_be_shared_is_refused():
    with pytest.raises(ValueError, match="multiple of 3"):
        _train(MemorySource(), shard=Shard(0, 3))
    source = MemorySource()
    plan = TrainPlan(check_fits(source, PREPROCESSING), batch_size=4, seed=7)
    with pytest.raises(ValueError, match="multiple of 3"):
        blank_batch(source, plan.step(0), PREPROCESSING, shard=Shard(0, 3))


@pytest.mark.parametrize("with_stds", [False, True])
@pytest.mark.parametrize("process_count", [1, 2])
def test_a_blank_batch_has_the_form_of_a_real_one(with_stds, process_count):
    """Of each step, because the canvases differ: a program compiled for the one fits the other."""
    source = MemorySource(with_stds=with_stds)
    plan = TrainPlan(check_fits(source, PREPROCESSING), batch_size=4, seed=7)
    for step, batch in enumerate(_train(source, steps=7, shard=Shard(0, process_count))):
        blank = blank_batch(source, plan.step(step), PREPROCESSING, shard=Shard(0, process_count))
        assert jax.tree.structure(blank) == jax.tree.structure(batch)
        for leaf, other in zip(jax.tree.leaves(blank), jax.tree.leaves(batch), strict=True):
            assert (leaf.shape, leaf.dtype) == (other.shape, other.dtype)
        assert not blank.valid.any()
        assert not blank.gt.valid.any()


def test_flips_and_scales_vary_and_can_be_switched_off():
    source = MemorySource()
    batches = _train(source, steps=60)
    sizes = {(b.images.shape, *b.image_size[i].tolist()) for b in batches for i in range(4)}
    assert len(sizes) > 20
    # The one box lies at the left of its image, at the right after a flip.
    has_box = np.concatenate([b.gt.valid[:, 0] for b in batches])
    centre = np.concatenate(
        [(b.gt.boxes[:, 0, 0] + b.gt.boxes[:, 0, 2]) / b.image_size[:, 1] for b in batches]
    )
    flipped = (centre[has_box] > 1).mean()
    # 240 images, of which three quarters have a box: half of them, give or take 3.7 %.
    assert 0.38 < flipped < 0.62

    plain = dataclasses.replace(PREPROCESSING, flip=False, scale_jitter=(1.0, 1.0))
    plan = TrainPlan(check_fits(source, plain), batch_size=4, seed=7)
    batches = list(train_batches(source, plan, plain, steps=range(20), num_threads=0))
    assert {tuple(size) for b in batches for size in b.image_size.tolist()} == {(40, 24), (24, 40), (24, 24)}
    left = np.concatenate([b.gt.boxes[:, 0, 0][b.gt.valid[:, 0]] for b in batches])
    np.testing.assert_allclose(left, 0.8 * (left > 0.7) + 0.6 * (left <= 0.7), rtol=1e-5)


def test_masks_come_in_batches_of_fixed_shape():
    source = MemorySource()
    with pytest.raises(DataError, match=r"memory has no masks \(0\.png\)\. Set config\.data\.mask_size to 0"):
        check_fits(source, dataclasses.replace(PREPROCESSING, mask_size=5))
    for index, record in enumerate(source.records):
        # The left half of every box of MemorySource, from 1 to 20.
        left = np.zeros((record.height, record.width), bool)
        left[:, :10] = True
        masks = (run_lengths(left),) * len(record.boxes)
        source.records[index] = dataclasses.replace(record, segmentations=masks)
    assert _train(source, steps=1)[0].gt.masks is None
    preprocessing = dataclasses.replace(PREPROCESSING, mask_size=2)
    plan = TrainPlan(check_fits(source, preprocessing), batch_size=4, seed=7)
    batches = list(train_batches(source, plan, preprocessing, steps=range(14), num_threads=0))
    assert {batch.gt.masks.shape for batch in batches} == {(4, 4, 2, 2)}
    masks, valid = (np.concatenate([getattr(b.gt, name) for b in batches]) for name in ("masks", "valid"))
    assert not masks[~valid].any()
    rows = {tuple(mask.ravel().tolist()) for mask in masks[valid]}
    assert rows == {(1, 0, 1, 0), (0, 1, 0, 1)}  # as annotated, and flipped


@pytest.mark.parametrize("threads", [0, 2])
def test_evaluation_covers_every_image_once_without_augmentation(threads):
    source = MemorySource()
    plan = EvalPlan(check_fits(source, PREPROCESSING), batch_size=4)
    seen = []
    for batch in eval_batches(source, plan, PREPROCESSING, num_threads=threads):
        seen += batch.image_id[batch.valid].tolist()
        # Neither flip nor jitter: the first box begins one pixel from the left of the file.
        np.testing.assert_allclose(
            batch.gt.boxes[:, 0, 0][batch.gt.valid[:, 0]], batch.scale[:, 0][batch.gt.valid[:, 0]], rtol=1e-6
        )
    assert sorted(seen) == [1000 + index for index in range(26)]
    assert len(seen) == 26


@pytest.mark.parametrize("with_wide_ids", [False, True])
def test_results_have_the_original_image_ids(with_wide_ids):
    source = MemorySource()
    if with_wide_ids:
        wide = {3: 2**40, 7: -(2**52)}
        source.records = [
            dataclasses.replace(record, image_id=wide.get(row, record.image_id))
            for row, record in enumerate(source.records)
        ]
    plan = EvalPlan(check_fits(source, PREPROCESSING), batch_size=4)
    blank = blank_batch(source, plan.step(0), PREPROCESSING)
    results = []
    for batch in eval_batches(source, plan, PREPROCESSING, num_threads=0):
        assert batch.image_id.dtype == blank.image_id.dtype == np.int32
        for number, size in zip(batch.image_id[batch.valid].tolist(), batch.scale[batch.valid], strict=True):
            results.append({"image_id": number, "score": float(size[0])})
    restored = restore_image_ids(results, source)
    assert sorted(entry["image_id"] for entry in restored) == sorted(r.image_id for r in source.records)
    # Each result stays with its image: the scale follows from the image's size.
    scales = {record.image_id: 24 / min(record.height, record.width) for record in source.records}
    for entry in restored:
        assert entry["score"] == pytest.approx(scales[entry["image_id"]])


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_an_unreadable_image_ends_as_its_own_error(threads):
    source = MemorySource(unreadable=[11])
    with pytest.raises(DataError) as caught:
        _train(source, threads=threads)
    assert str(caught.value) == "11.png cannot be decoded. Restore the file."


def test_a_truncated_photograph_found_late_names_its_file(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "annotations").mkdir()
    path = tmp_path / "train" / "late.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 50, 3), np.uint8)).save(path)
    (tmp_path / "annotations" / "instances_train.json").write_text(
        '{"images": [{"id": 1, "file_name": "late.png", "height": 30, "width": 50}], "annotations": [],'
        ' "categories": [{"id": 1, "name": "fish"}]}'
    )
    source = CocoSource(tmp_path, "train")
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(DataError, match=r"late\.png cannot be decoded.*Restore"):
        _train(source, steps=1)


@pytest.mark.parametrize("steps_read", [0, 1, 3])
def test_closing_early_ends_the_threads(steps_read):
    source = MemorySource()
    plan = TrainPlan(check_fits(source, PREPROCESSING), batch_size=4, seed=0)
    before = set(threading.enumerate())
    iterator = train_batches(source, plan, PREPROCESSING, steps=range(10**6), num_threads=2)
    for _ in range(steps_read):
        next(iterator)
    iterator.close()
    deadline = time.monotonic() + 10
    while set(threading.enumerate()) - before:
        assert time.monotonic() < deadline, "the loader's threads are still running"
        time.sleep(0.01)


def test_what_does_not_fit_is_known_before_training():
    source = MemorySource()
    with pytest.raises(DataError, match=r"3\.png \(image 1003\) has 3 objects, but max_gt is 2"):
        check_fits(source, dataclasses.replace(PREPROCESSING, max_gt=2))
    # All such images are counted, and the remedy is one for all.
    with pytest.raises(
        DataError, match=r"has 2 objects, .* \(and 11 more\)\. Raise config\.data\.max_gt to 3"
    ):
        check_fits(source, dataclasses.replace(PREPROCESSING, max_gt=1))
    with pytest.raises(DataError, match=r"0\.png \(image 1000\).*fits none of the canvases"):
        check_fits(source, dataclasses.replace(PREPROCESSING, canvases=((24, 40),)))
    mixed = MemorySource()
    mixed.records[5] = MemorySource(with_stds=True).records[5]
    with pytest.raises(DataError, match=r"either all images have box_stds or none, but 5\.png and 0\.png"):
        check_fits(mixed, PREPROCESSING)
    with pytest.raises(DataError, match="memory has no images"):
        check_fits(MemorySource(0), PREPROCESSING)
    assert np.bincount(check_fits(source, PREPROCESSING)).tolist() == [9, 9, 8]


@needs_shared_data
def test_sample_photographs_make_batches():
    source = CocoSource(SHARED_DATA / "aquarium", "valid")
    preprocessing = Preprocessing(
        short_side=320, long_side=320, canvases=((320, 320), (320, 240), (240, 320)), max_gt=64
    )
    canvas_index = check_fits(source, preprocessing)
    assert set(canvas_index) == {1, 2}
    plan = TrainPlan(canvas_index, batch_size=2, seed=0)
    for batch in train_batches(source, plan, preprocessing, steps=range(3), num_threads=2):
        assert batch.images.shape[0] == 2
        assert batch.gt.valid.any()
