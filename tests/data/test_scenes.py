import contextlib
import dataclasses
import hashlib
import io
import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from klbox_jax.data import scene_painter
from klbox_jax.data.scenes import (
    SPLITS,
    Scenes,
    ScenesConfig,
    ScenesSettings,
    ScenesSource,
    fingerprint,
    make_example,
    prepare,
)
from klbox_jax.data.source import DataError

# Whoever changes the painter makes another world: raise VERSION, run every experiment again, pin anew.
PAINTER_SHA256 = "efd0683a81b8da3f20dd0fa3860fdbef8bb6bf0bb108972804280d1be7ada2e3"
TINY = {"image_size": 96, "train": 24, "validation": 8, "calibration": 8, "test": 8}


@pytest.fixture(scope="module")
def scenes():
    return [scene_painter.paint_scene((0, 1, index)) for index in range(150)]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    prepare(folder, settings=ScenesSettings(**TINY))
    return folder


def together(scenes, field):
    return np.concatenate([getattr(scene, field) for scene in scenes])


def test_the_painter_is_frozen():
    digest = hashlib.sha256(Path(scene_painter.__file__).read_bytes()).hexdigest()
    assert digest == PAINTER_SHA256, "another world: see the comment above PAINTER_SHA256"


def test_a_scene_is_a_function_of_its_seed():
    first, again, other = (scene_painter.paint_scene(seed) for seed in ((5, 0, 3), (5, 0, 3), (5, 0, 4)))
    for field in dataclasses.fields(first):
        np.testing.assert_array_equal(getattr(first, field.name), getattr(again, field.name))
    assert not np.array_equal(first.image, other.image)
    images = {scene_painter.paint_scene(s).image.tobytes() for s in ((5, 0, 3), (6, 0, 3), (5, 1, 3))}
    assert len(images) == 3


def test_shares_that_the_data_set_promises(scenes):
    sides = together(scenes, "boxes")[:, 2:] - together(scenes, "boxes")[:, :2]
    counts = np.array([len(scene.boxes) for scene in scenes])
    assert counts.min() == 1
    assert counts.max() == 8
    assert (together(scenes, "hidden") > 0.1).mean() >= 0.3
    assert together(scenes, "hidden").max() <= 0.7 + 1e-6
    assert (together(scenes, "blur") >= 2).mean() >= 0.25
    assert (together(scenes, "blur") == 0).mean() >= 0.25
    assert sides.min() >= 12 - 1e-4
    assert sides.max() <= 0.6 * 192 + 1e-4
    aspects = sides[:, 0] / sides[:, 1]
    assert aspects.min() < 0.45
    assert aspects.max() > 2.2
    shares = np.bincount(together(scenes, "classes"), minlength=6) / counts.sum()
    assert shares.min() > 0.1


def test_objects_stay_inside_the_frame(scenes):
    boxes = together(scenes, "boxes")
    assert boxes.min() >= scene_painter.MARGIN - 1e-4
    assert boxes.max() <= 192 - scene_painter.MARGIN + 1e-4


def crossings_area(contours, box, steps=600):
    """Extent and area of the silhouette by even-odd ray casting on a fine lattice of points: no OpenCV."""
    width, height = box[2:] - box[:2]
    xs = box[0] - 1 + (np.arange(steps) + 0.5) * (width + 2) / steps
    ys = box[1] - 1 + (np.arange(steps) + 0.5) * (height + 2) / steps
    inside = np.zeros((steps, steps), bool)
    for contour in contours:
        for (x1, y1), (x2, y2) in zip(contour, np.roll(contour, -1, axis=0), strict=True):
            if y1 == y2:
                continue
            rows = (ys >= min(y1, y2)) & (ys < max(y1, y2))
            meet = x1 + (ys - y1) / (y2 - y1) * (x2 - x1)
            inside ^= rows[:, None] & (xs[None] < meet[:, None])
    columns, rows = xs[inside.any(0)], ys[inside.any(1)]
    extent = np.array([columns[0], rows[0], columns[-1], rows[-1]])
    return extent, inside.sum() * (width + 2) * (height + 2) / steps**2


def test_boxes_and_masks_match_the_silhouettes():
    for seed in range(4):
        objects = scene_painter._arrange(np.random.default_rng(seed), 192)[0]
        for obj in objects:
            extent, area = crossings_area(obj.contours, obj.box)
            # A sharp tip may fall between two lines of the lattice, 0.2 pixels apart at most.
            np.testing.assert_allclose(extent, obj.box, atol=0.45)
            assert obj.coverage.sum() == pytest.approx(area, rel=0.03, abs=4)


@pytest.mark.parametrize("class_index", range(6))
def test_rendered_extent_of_large_upright_silhouettes(class_index):
    # The unblurred mask alone, without the geometry: an edge is where the covered pixels start.
    contours = scene_painter._unit_silhouette(np.random.default_rng(0), class_index)
    contours = [(c - contours[0].min(0)) * 40 + [7.3, 11.6] for c in contours]
    low, high = contours[0].min(0), contours[0].max(0)
    mask = scene_painter._coverage(contours, 5, 9, 90, 90)
    for axis in (0, 1):
        profile = mask.max(axis)  # of a column: its most covered pixel
        touched = np.flatnonzero(profile > 0)
        assert touched[0] + (5, 9)[axis] == np.floor(low[axis])
        assert touched[-1] + (5, 9)[axis] == np.ceil(high[axis]) - 1
    if class_index in (1, 5):  # straight edges: the covered share of the outermost pixel is the edge itself
        assert 1 - mask.max(0)[2] == pytest.approx(0.3, abs=0.1)
        assert 1 - mask.max(1)[2] == pytest.approx(0.6, abs=0.1)


def test_every_object_is_seen_and_inside_its_box(scenes):
    for scene in scenes[:40]:
        for i, box in enumerate(scene.boxes):
            y, x = np.nonzero(scene.instances == i + 1)
            assert len(x) > 0
            assert x.min() >= np.floor(box[0])
            assert x.max() < np.ceil(box[2])
            assert y.min() >= np.floor(box[1])
            assert y.max() < np.ceil(box[3])
        assert scene.instances.max() == len(scene.boxes)


def test_edge_hidden_by_hand():
    # A 40 x 20 rectangle whose left quarter is hidden: the strip at the left is 6 wide, all of it hidden; the
    # strips above and below are 3 high, a quarter hidden; nothing of the right one.
    coverage, hiding = np.ones((20, 40), np.float32), np.zeros((20, 40), np.float32)
    hiding[:, :10] = 1
    shares = scene_painter._edge_hidden(coverage, hiding, np.array([0.0, 0.0, 40.0, 20.0]))
    np.testing.assert_allclose(shares, [1.0, 0.25, 0.0, 0.25], atol=1e-6)
    # Hidden are the four leftmost columns of the strip's six.
    hiding[:, 4:] = 0
    shares = scene_painter._edge_hidden(coverage, hiding, np.array([0.0, 0.0, 40.0, 20.0]))
    np.testing.assert_allclose(shares, [4 / 6, 0.1, 0.0, 0.1], atol=1e-6)


def test_the_noise_rule(scenes):
    for scene in scenes[:30]:
        for box, stds, blur, hidden in zip(
            scene.boxes, scene.box_stds, scene.blur, scene.edge_hidden, strict=True
        ):
            for edge in range(4):
                side = box[2] - box[0] if edge in (0, 2) else box[3] - box[1]
                expected = (0.25 + (0.74 * blur[edge]) ** 2 + (0.144 * hidden[edge] * side) ** 2) ** 0.5
                assert stds[edge] == pytest.approx(expected, rel=1e-5)


def test_motion_blurs_an_edge_by_its_normal_component():
    # A segment of length L across an edge has a standard deviation of L / sqrt(12); along it, none.
    for direction in (0.0, 0.6, np.pi / 2):
        kernel = scene_painter._motion_kernel(14.0, direction)
        reach = kernel.shape[0] // 2
        x = np.arange(-reach, reach + 1)
        spread_x = np.sqrt(kernel.sum(0) @ x**2)
        spread_y = np.sqrt(kernel.sum(1) @ x**2)
        assert kernel.sum() == pytest.approx(1, abs=1e-5)
        assert spread_x == pytest.approx(
            14 * np.cos(direction) / 12**0.5, abs=0.08 if direction != np.pi / 2 else 0.3
        )
        assert spread_y == pytest.approx(14 * np.sin(direction) / 12**0.5, abs=0.08 if direction else 0.3)


def test_label_noise_is_gaussian_of_the_stated_std(scenes):
    errors = np.concatenate([scene_painter.noisy_boxes(s) - s.boxes for s in scenes])
    z = errors / together(scenes, "box_stds")
    drawn = together(scenes, "noise")
    cut = np.abs(z - drawn).max(axis=1) > 1e-2
    assert cut.mean() < 0.02
    z = z[~cut]
    n = z.size  # some 2500 draws
    assert abs(z.mean()) < 4 / n**0.5
    assert abs(z.std() - 1) < 4 / (2 * n) ** 0.5
    assert (np.abs(z) < 1).mean() == pytest.approx(0.683, abs=4 * 0.465 / n**0.5)
    assert (np.abs(z) < 2).mean() == pytest.approx(0.954, abs=4 * 0.209 / n**0.5)
    assert np.abs(np.corrcoef(z.T) - np.eye(4)).max() < 4 / len(z) ** 0.5


def test_noise_scale_changes_nothing_but_the_scale():
    none, one, two = (
        make_example(ScenesSettings(noise_scale=scale), "validation", 5) for scale in (0.0, 1.0, 2.0)
    )
    np.testing.assert_array_equal(none["boxes_noisy"], none["boxes"])
    assert not none["box_stds"].any()
    np.testing.assert_allclose(two["box_stds"], 2 * one["box_stds"])
    np.testing.assert_allclose(
        two["boxes_noisy"] - two["boxes"], 2 * (one["boxes_noisy"] - one["boxes"]), atol=1e-4
    )
    assert none["image"].getvalue() == one["image"].getvalue() == two["image"].getvalue()
    assert none["instances"].getvalue() == two["instances"].getvalue()


def test_noisy_boxes_are_boxes_inside_the_image(scenes):
    for scene in scenes:
        noisy = scene_painter.noisy_boxes(scene, noise_scale=8.0)
        assert (noisy[:, 2:] - noisy[:, :2]).min() >= 4 - 1e-4
        assert noisy.min() >= 0
        assert noisy.max() <= 192


def test_sources_return_what_was_painted(data_dir):
    for number, split in enumerate(SPLITS):
        source = ScenesSource(data_dir, split, boxes="noisy", **TINY)
        assert len(source.records) == TINY[split]
        for index in (0, len(source.records) - 1):
            record, detail = source.records[index], source.details[index]
            scene = scene_painter.paint_scene((0, number, index), size=96)
            assert record.image_id == number * 1_000_000 + index + 1
            assert (record.height, record.width) == (96, 96)
            np.testing.assert_array_equal(record.boxes, scene_painter.noisy_boxes(scene))
            np.testing.assert_array_equal(record.classes, scene.classes)
            np.testing.assert_array_equal(record.box_stds, scene.box_stds)
            assert record.is_crowd.shape == scene.classes.shape
            assert not record.is_crowd.any()
            for name in ("blur", "edge_hidden", "hidden"):
                np.testing.assert_array_equal(detail[name], getattr(scene, name))
            assert len(detail["boxes"]) == (0 if split == "train" else len(scene.boxes))
            np.testing.assert_array_equal(source.load_instances(index), scene.instances)
            image = source.load_image(index)
            assert image.shape == (96, 96, 3)
            assert image.dtype == np.uint8
            assert np.abs(image.astype(int) - scene.image).mean() < 3  # JPEG
    assert (source.name, source.category_ids) == ("scenes/test", (1, 2, 3, 4, 5, 6))
    assert len(source.class_names) == 6


def test_exact_and_noisy_boxes_share_their_stds(data_dir):
    exact, noisy = (ScenesSource(data_dir, "test", boxes=boxes, **TINY) for boxes in ("exact", "noisy"))
    for a, b, detail in zip(exact.records, noisy.records, exact.details, strict=True):
        np.testing.assert_array_equal(a.box_stds, b.box_stds)
        np.testing.assert_array_equal(a.boxes, detail["boxes"])
        np.testing.assert_array_equal(b.boxes, detail["boxes_noisy"])
        assert not np.array_equal(a.boxes, b.boxes)


def test_image_ids_are_unique_over_splits(data_dir):
    ids = [
        r.image_id for split in SPLITS for r in ScenesSource(data_dir, split, boxes="noisy", **TINY).records
    ]
    assert len(set(ids)) == len(ids) == 48


def test_a_source_survives_pickling(data_dir):
    source = ScenesSource(data_dir, "test", boxes="exact", **TINY)
    copy = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(copy.load_image(3), source.load_image(3))


def test_exact_boxes_evaluated_as_detections_are_perfect(data_dir):
    source = ScenesSource(data_dir, "validation", boxes="exact", **TINY)
    truth = source.coco_ground_truth()
    results = [
        {**{k: a[k] for k in ("image_id", "category_id", "bbox")}, "score": 0.9} for a in truth["annotations"]
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = truth
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    assert evaluation.stats[0] == pytest.approx(1.0)
    assert len(truth["images"]) == 8
    assert [c["id"] for c in truth["categories"]] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("boxes", ["exact", "noisy"])
def test_ground_truth_has_the_labels_and_their_noise(data_dir, boxes):
    source = ScenesSource(data_dir, "validation", boxes=boxes, **TINY)
    annotations = source.coco_ground_truth()["annotations"]
    for name, expected in (
        ("bbox", np.concatenate([record.boxes for record in source.records])),
        ("bbox_noisy", np.concatenate([detail["boxes_noisy"] for detail in source.details])),
    ):
        found = np.array([entry[name] for entry in annotations])
        found[:, 2:] += found[:, :2]
        np.testing.assert_allclose(found, expected, atol=1e-9)
    stds = [entry["bbox_std"] for entry in annotations]
    np.testing.assert_array_equal(stds, np.concatenate([record.box_stds for record in source.records]))
    assert json.loads(json.dumps(annotations)) == annotations
    assert all((entry["bbox"] == entry["bbox_noisy"]) == (boxes == "noisy") for entry in annotations)


def test_an_interrupted_preparation_is_begun_anew(tmp_path, monkeypatch):
    settings = ScenesSettings(**{**TINY, "train": 3, "validation": 3, "calibration": 3, "test": 3})

    def interrupted(self, split):
        yield 0, make_example(settings, split, 0)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Scenes, "_generate_examples", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare(tmp_path, settings=settings)
    assert prepare(tmp_path, settings=settings).info.splits["train"].num_examples == 3


def test_the_first_of_two_preparations_stays(tmp_path, monkeypatch):
    settings = ScenesSettings(**{**TINY, "train": 3, "validation": 3, "calibration": 3, "test": 3})
    whole = Scenes.download_and_prepare

    def overtaken(self):
        with monkeypatch.context() as patch:
            patch.setattr(Scenes, "download_and_prepare", whole)
            prepare(tmp_path, settings=settings)
        raise FileExistsError(17, "Cannot rename")

    monkeypatch.setattr(Scenes, "download_and_prepare", overtaken)
    assert prepare(tmp_path, settings=settings).info.splits["train"].num_examples == 3


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cannot be prepared in .*file.*set config\.data\.root to another"):
        prepare(tmp_path / "file" / "inside", settings=ScenesSettings(**TINY))


def test_the_fingerprint_tells_worlds_apart():
    worlds = [{}, {"seed": 1}, {"noise_scale": 2.0}, {"train": 10}, {"image_size": 96}]
    prints = [fingerprint(ScenesSettings(**fields)) for fields in worlds]
    assert len(set(prints)) == 5
    assert prints[0] == fingerprint(ScenesSettings())
    assert all(len(p) == 64 for p in prints)
    assert len({ScenesConfig(ScenesSettings(**fields)).name for fields in worlds}) == 5


def test_unusable_arguments_are_refused(data_dir):
    with pytest.raises(ValueError, match="no exact boxes"):
        ScenesSource(data_dir, "train", boxes="exact", **TINY)
    with pytest.raises(ValueError, match="choose one of train"):
        ScenesSource(data_dir, "dev", boxes="noisy", **TINY)
    with pytest.raises(ValueError, match="choose exact or noisy"):
        ScenesSource(data_dir, "test", boxes="true", **TINY)
    with pytest.raises(ValueError, match="negative"):
        ScenesSettings(noise_scale=-1.0)
    with pytest.raises(ValueError, match="64 pixels"):
        ScenesSettings(image_size=32)
    with pytest.raises(ValueError, match="every split"):
        ScenesSettings(test=0)


def test_masks_are_the_pixels_that_are_seen(data_dir):
    plain, source = (ScenesSource(data_dir, "train", boxes="noisy", masks=m, **TINY) for m in (False, True))
    assert plain.records[0].segmentations is None
    assert "segmentation" not in plain.coco_ground_truth()["annotations"][0]
    entries = iter(source.coco_ground_truth()["annotations"])
    for index, record in enumerate(source.records):
        instances = source.load_instances(index)
        assert len(record.segmentations) == len(record.boxes)
        for row in range(len(record.boxes)):
            counts = next(entries)["segmentation"]["counts"]
            drawn = np.repeat(np.arange(len(counts)) % 2, counts).reshape(96, 96, order="F")
            np.testing.assert_array_equal(drawn, instances == row + 1)
    assert next(entries, None) is None


def test_no_tensorflow(data_dir):
    code = (
        "import sys; from klbox_jax.data.scenes import ScenesSource; "
        f"s = ScenesSource({str(data_dir)!r}, 'test', boxes='exact', **{TINY}); s.load_image(0); "
        "assert 'tensorflow' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.parametrize("cut", [1, 65536])
def test_a_shard_that_was_cut_short_is_named(tmp_path, cut):
    settings = TINY | dict.fromkeys(SPLITS, 2)
    ScenesSource(tmp_path, "test", boxes="exact", **settings)
    (shard,) = tmp_path.rglob("*-test.array_record*")
    shard.write_bytes(shard.read_bytes()[:-cut])
    with pytest.raises(DataError) as caught:
        ScenesSource(tmp_path, "test", boxes="exact", **settings)
    assert str(caught.value).startswith(
        f"{shard} has 0 of the 2 records that were written, so it is cut short"
    )
    assert "\n" not in str(caught.value)
    # The other splits are not affected.
    assert len(ScenesSource(tmp_path, "train", boxes="noisy", **settings).records) == 2


def test_a_record_that_breaks_later_is_named(tmp_path):
    source = ScenesSource(tmp_path, "test", boxes="exact", **(TINY | dict.fromkeys(SPLITS, 2)))
    source._examples = [None]  # as a reader whose file shrank while it was open
    with pytest.raises(
        DataError, match=r"array_record-00000-of-00001: record 2 of test cannot be read, the file is"
    ):
        source.load_image(1)
