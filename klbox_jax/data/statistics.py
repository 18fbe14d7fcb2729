"""Statistics of a data set, and warnings about a set that is valid entry by entry but cannot be learned from."""

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from klbox_jax.data.source import DataError, Fault, Record, Source, shown
from klbox_jax.data.transforms import Preprocessing, resized_size

# Height over width of the anchors that objects are compared with, as in most configs.
ASPECT_RATIOS = (0.5, 1.0, 2.0)
# Below this IoU with the anchor of the best shape an object is hard to match: RPNs train on anchors of 0.7 or, for
# lack of one, on the best.
GOOD_IOU = 0.5
# Share of objects smaller than a pixel above which a set is reported.
_MANY_TINY = 0.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataStatistics:
    """Counts of a data set. An object is one to learn: no crowd, and not difficult.

    Attributes:
        name: of the data set.
        images: number of images.
        empty_images: images without any annotation.
        objects: objects to learn.
        ignored: crowds and difficult objects, which training ignores.
        objects_by_class: objects to learn of each class, by its name.
        tiny: objects to learn with a side of less than a pixel of the file.
        unit_boxes: objects to learn whose box is inside the first pixel, as if in fractions of the image.
        sizes: objects to learn by the square root of their area on the canvas: the upper limit of each range in
            pixels (None for the last) and the count. The ranges are those between the anchor sizes.
        far_from_anchors: objects to learn whose shape has an IoU below 0.5 with every anchor; None without anchors.
    """

    name: str
    images: int
    empty_images: int
    objects: int
    ignored: int
    objects_by_class: Mapping[str, int]
    tiny: int
    unit_boxes: int
    sizes: Sequence[tuple[float | None, int]]
    far_from_anchors: int | None


def compute_statistics(
    source: Source, *, preprocessing: Preprocessing | None = None, anchor_sizes: Iterable[float] = ()
) -> DataStatistics:
    """Returns the statistics of a data set; looks at no image.

    Args:
        source: the data set.
        preprocessing: resizing, for the sizes on the canvas; without it sizes are those in the file.
        anchor_sizes: square roots of the areas of the anchors, in pixels of the canvas.
    """
    by_class = np.zeros(len(source.class_names), np.int64)
    boxes, scaled, ignored = [], [], 0
    for record in source.records:
        learned = ~record.is_crowd
        ignored += int(record.is_crowd.sum())
        by_class += np.bincount(record.classes[learned], minlength=len(by_class))
        boxes.append(record.boxes[learned].astype(np.float64))
        scaled.append(boxes[-1] * _scale(record, preprocessing))
    corners = np.concatenate([np.zeros((0, 4)), *boxes])
    canvas = np.concatenate([np.zeros((0, 4)), *scaled])
    sides, sides_on_canvas = corners[:, 2:] - corners[:, :2], canvas[:, 2:] - canvas[:, :2]
    anchors = sorted(set(map(float, anchor_sizes)))
    return DataStatistics(
        name=source.name,
        images=len(source.records),
        empty_images=sum(not len(record.boxes) for record in source.records),
        objects=len(corners),
        ignored=ignored,
        objects_by_class=dict(zip(source.class_names, by_class.tolist(), strict=True)),
        tiny=int((sides < 1).any(axis=1).sum()),
        unit_boxes=int((corners <= 1).all(axis=1).sum()),
        sizes=_histogram(sides_on_canvas, anchors),
        far_from_anchors=_far_from_anchors(sides_on_canvas, anchors) if anchors else None,
    )


def _scale(record: Record, preprocessing: Preprocessing | None) -> float:
    if preprocessing is None:
        return 1.0
    sides = {"short_side": preprocessing.short_side, "long_side": preprocessing.long_side}
    return resized_size(record.height, record.width, **sides)[0] / record.height


def _histogram(sides: Float[ndarray, "n 2"], anchors: Sequence[float]) -> list[tuple[float | None, int]]:
    # Without anchors the limits of COCO's small, medium and large objects.
    limits = list(anchors) if len(anchors) > 1 else [32.0, 96.0]
    sizes = np.sqrt(sides.prod(axis=1))
    counts = np.bincount(np.searchsorted(limits, sizes, side="right"), minlength=len(limits) + 1)
    return list(zip([*limits, None], counts.tolist(), strict=True))


def _far_from_anchors(sides: Float[ndarray, "n 2"], anchors: Sequence[float]) -> int:
    ratios = np.sqrt(np.array(ASPECT_RATIOS))
    shapes = np.array([(size / ratio, size * ratio) for size in anchors for ratio in ratios])
    best = np.zeros(len(sides))
    for shape in shapes:
        common = np.minimum(sides, shape).prod(axis=1)
        best = np.maximum(best, common / (sides.prod(axis=1) + shape.prod() - common))
    return int((best < GOOD_IOU).sum())


def find_problems(statistics: DataStatistics) -> list[Fault]:
    """Returns warnings about a whole set: no objects to learn or to evaluate, boxes in fractions, tiny boxes."""

    def warning(kind: str, what: str, remedy: str) -> Fault:
        return Fault(kind=kind, file=statistics.name, what=what, remedy=remedy, severity="warning")

    if not statistics.images:
        return []  # The faults of the images, or of the file, say why.
    if not statistics.objects:
        return [warning("no objects", *_nothing_to_learn(statistics))]
    problems = []
    if statistics.unit_boxes == statistics.objects:
        what = f"has {statistics.objects} objects, all inside the first pixel of their images"
        remedy = "The boxes seem to be fractions of the image; multiply them by its width and height."
        problems.append(warning("boxes in fractions", what, remedy))
    elif statistics.tiny > _MANY_TINY * statistics.objects:
        what = f"has {statistics.tiny} of {statistics.objects} objects with a side of less than a pixel"
        problems.append(warning("tiny boxes", what, "Check the unit of the boxes: pixels of the file."))
    return problems


def check_learnable(statistics: DataStatistics) -> None:
    """Raises DataError if a training set has no object to learn."""
    if not statistics.objects:
        what, remedy = _nothing_to_learn(statistics)
        raise DataError(
            Fault(kind="no objects", file=statistics.name, what=what, remedy=remedy, severity="fatal")
        )


def _nothing_to_learn(statistics: DataStatistics) -> tuple[str, str]:
    if statistics.ignored:
        what = (
            f"has no object to learn or to evaluate: all {statistics.ignored} annotations of "
            f"{statistics.images} images are crowds (iscrowd = 1) or difficult, which are ignored"
        )
        return what, "Set iscrowd to 0 for single objects; some tools write 1 for every mask."
    what = f"has no object to learn or to evaluate: none of its {statistics.images} images has an annotation"
    return what, "Check that the annotations belong to this split, and export them again."


def find_shared_images(digests: Mapping[str, Mapping[str, str]]) -> list[Fault]:
    """Returns a note for each pair of splits that contain the same photograph.

    Args:
        digests: for each split, the digest of the pixels of each image by its file name.
    """
    faults = []
    splits = list(digests)
    for i, first in enumerate(splits):
        names = {digest: name for name, digest in digests[first].items()}
        for second in splits[i + 1 :]:
            shared = [(names[digest], name) for name, digest in digests[second].items() if digest in names]
            if shared:
                what = f"has the same pixels as {shared[0][0]}"
                more = f" (and {len(shared) - 1} more of {second} are in {first})" if len(shared) > 1 else ""
                faults.append(
                    Fault(
                        kind="photograph in two splits",
                        file=shared[0][1],
                        what=what + more,
                        remedy=f"Keep each photograph in one of {first} and {second}, or results are too good.",
                        severity="note",
                    )
                )
    return faults


def summary_line(statistics: DataStatistics) -> str:
    """Returns the counts of a set in one line, for the log."""
    parts = [f"{statistics.images} images ({statistics.empty_images} without annotations)"]
    parts.append(f"{statistics.objects} objects of {len(statistics.objects_by_class)} classes")
    if statistics.ignored:
        parts.append(f"{statistics.ignored} ignored (crowds, difficult)")
    if statistics.tiny:
        parts.append(f"{statistics.tiny} smaller than a pixel")
    return f"{statistics.name}: {', '.join(parts)}"


def format_statistics(statistics: DataStatistics) -> str:
    """Returns the statistics as lines of text."""
    counts = Counter(statistics.objects_by_class)
    classes = ", ".join(f"{shown(name)[1:-1]} {count}" for name, count in counts.most_common())
    unit = "pixels of the canvas" if statistics.far_from_anchors is not None else "pixels"
    ranges, low = [], 0.0
    for high, count in statistics.sizes:
        ranges.append(f"{low:g} to {high:g}: {count}" if high is not None else f"from {low:g}: {count}")
        low = high or low
    lines = [
        summary_line(statistics),
        f"  by class: {classes}",
        f"  by size (root of the area, {unit}): {', '.join(ranges)}",
    ]
    if statistics.far_from_anchors is not None:
        lines.append(f"  below IoU {GOOD_IOU:g} with every anchor: {statistics.far_from_anchors}")
    return "\n".join(lines)
