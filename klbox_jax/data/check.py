"""Lists everything that is wrong with a data set, by the rules that the readers have.

    python -m klbox_jax.data.check --root=data/coco
    python -m klbox_jax.data.check --root=data/VOCdevkit --format=voc --split=2007_trainval --output=check.json

Every annotation is checked, and every image decoded, which takes about ten milliseconds each. Masks are checked in
files that have any. The exit status is 1 if there is any fault, 0 if there is none, and 2 if the command itself is
wrong. A training stops at faults of severity "fatal" or "error", or leaves their images out, and uses what has a
"warning" as it is: with `--allow_warnings` these alone make no 1.
"""

import argparse
import collections
import dataclasses
import json
import os
import pathlib
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import tqdm

from klbox_jax.data.coco import CocoSource
from klbox_jax.data.image import check_image, is_annotated_unturned
from klbox_jax.data.source import DataError, Fault, Record, printable
from klbox_jax.data.voc import VOC_CLASSES, VocSource, parse_voc_split

# Boxes hang over the edge by less than this in most sets, from rounding.
_OVERHANG = 1.0
_COLUMNS = ("severity", "file", "record", "what", "remedy")
_MAX_WIDTHS = (8, 40, 40, 80, 80)


def check_coco(root: str | os.PathLike, split: str, *, num_threads: int) -> tuple[int, list[Fault]]:
    """Returns how many images of a split in COCO's layout are sound, and all faults."""
    faults: list[Fault] = []
    try:
        source = CocoSource(root, split, masks=None, check_images=False, report=faults.extend)
    except DataError as error:
        return 0, [*faults, error.fault]
    found = [
        (record.image_id, source.image_fault(record.image_id, fault))
        for record, fault in _image_faults(source.records, f"{source.name} images", num_threads)
    ]
    faults += [fault for _, fault in found]
    faults += _overhanging_boxes(source)
    lost = {image_id for image_id, fault in found if fault.severity == "error"}
    return len(source.records) - len(lost), faults


def check_voc(
    root: str | os.PathLike, split: str, *, num_threads: int, class_names: tuple[str, ...] = VOC_CLASSES
) -> tuple[int, list[Fault]]:
    """Returns how many images of a split in VOC's layout are sound, and all faults; raises ValueError."""
    faults: list[Fault] = []
    pairs = parse_voc_split(split)
    try:
        source = VocSource(root, pairs, class_names=class_names, check_images=False, report=faults.extend)
    except DataError as error:
        return 0, [*faults, error.fault]
    found = list(_image_faults(source.records, f"{source.name} images", num_threads))
    faults += [fault for _, fault in found]
    lost = {record.image_id for record, fault in found if fault.severity == "error"}
    return len(source.records) - len(lost), faults


def find_splits(root: pathlib.Path, layout: str) -> list[str]:
    """Returns the splits that a folder has, for `check_coco` or `check_voc`."""
    if layout == "coco":
        names = sorted(path.stem for path in root.glob("annotations/instances_*.json"))
        return [name.removeprefix("instances_") for name in names]
    # The other lists are parts of these, or for one class.
    lists = sorted(root.glob("VOC*/ImageSets/Main/*.txt"))
    return [
        f"{path.parents[2].name.removeprefix('VOC')}_{path.stem}"
        for path in lists
        if path.stem in ("trainval", "test")
    ]


def _image_faults(
    records: Sequence[Record], description: str, num_threads: int
) -> Iterator[tuple[Record, Fault]]:
    """Decodes every image, with a bar on a terminal."""
    with ThreadPoolExecutor(num_threads) as pool:
        results = pool.map(_image_fault, records)
        results = tqdm.tqdm(results, total=len(records), desc=description, unit="image", disable=None)
        for record, fault in zip(records, results, strict=True):
            if fault is not None:
                yield record, fault


def _image_fault(record: Record) -> Fault | None:
    size = {"height": record.height, "width": record.width}
    try:
        check_image(record.file_name, full=True, **size)
        if not is_annotated_unturned(record.file_name, **size):
            return None
    except DataError as error:
        return error.fault
    return Fault(
        kind="EXIF against the annotation",
        file=record.file_name,
        what=f"is to be shown turned on its side, but annotated as stored ({record.height} x {record.width})",
        remedy="Look at its boxes; if they are as you see the image, exchange width and height in the annotation.",
        severity="warning",
    )


def _overhanging_boxes(source: CocoSource) -> Iterator[Fault]:
    truth = source.coco_ground_truth()
    sizes = {image["id"]: (image["width"], image["height"]) for image in truth["images"]}
    for entry in truth["annotations"]:
        x, y, box_width, box_height = entry["bbox"]
        width, height = sizes[entry["image_id"]]
        overhang = max(-x, -y, x + box_width - width, y + box_height - height)
        if overhang > _OVERHANG:
            yield Fault(
                kind="box over the edge of its image",
                file=source.annotation_file,
                record=f"annotation {entry['id']}",
                what=f"has a box that hangs over image {entry['image_id']} by {overhang:.1f} pixels, which are cut off",
                remedy="Look at it, if there are many.",
                severity="warning",
            )


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 3] + "..."


def _table(faults: Sequence[Fault], root: str) -> str:
    """Returns one line for each fault; what is too long is cut."""
    rows = [_COLUMNS] + [
        (
            fault.severity,
            fault.file.removeprefix(root + os.sep),
            fault.record,
            printable(fault.what.replace(root + os.sep, "")),
            fault.remedy,
        )
        for fault in faults
    ]
    cut = [[_cut(cell, width) for cell, width in zip(row, _MAX_WIDTHS, strict=True)] for row in rows]
    widths = [max(len(row[column]) for row in cut) for column in range(len(_COLUMNS))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cut
    ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Checks what the command line names, prints the result, and returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m klbox_jax.data.check", description="Lists everything that is wrong with a data set."
    )
    parser.add_argument("--root", type=pathlib.Path, required=True, help="the data set's folder")
    parser.add_argument("--format", choices=("coco", "voc"), default="coco", help="its layout")
    parser.add_argument("--split", default="", help="one split; all that the folder has by default")
    parser.add_argument(
        "--class_names", default="", help="of VOC's layout, with commas; VOC's own by default"
    )
    parser.add_argument("--output", type=pathlib.Path, help="also write all faults as JSON")
    parser.add_argument(
        "--allow_warnings", action="store_true", help="exit with 0 where there are only warnings"
    )
    parser.add_argument("--rows", type=int, default=100, help="print so many faults at most")
    parser.add_argument("--num_threads", type=int, default=os.cpu_count() or 1, help="threads that decode")
    arguments = parser.parse_args(argv)
    root, layout = arguments.root, arguments.format
    if not root.is_dir():
        parser.error(f"{root} is not a folder")
    if arguments.num_threads < 1:
        parser.error("--num_threads must be positive")
    splits = [arguments.split] if arguments.split else find_splits(root, layout)
    if not splits:
        parser.error(f"{root} has no splits in the layout of {layout}; choose another --root or --format")
    names = tuple(arguments.class_names.split(",")) if arguments.class_names else VOC_CLASSES

    faults, images = [], {}
    for split in splits:
        if layout == "coco":
            images[split], found = check_coco(root, split, num_threads=arguments.num_threads)
        else:
            try:
                images[split], found = check_voc(
                    root, split, num_threads=arguments.num_threads, class_names=names
                )
            except ValueError as error:
                parser.error(str(error))
        faults += found

    severities = ("fatal", "error", "warning")
    faults.sort(key=lambda fault: severities.index(fault.severity))
    counts = collections.Counter((fault.severity, fault.kind) for fault in faults)
    if faults:
        print(_table(faults[: arguments.rows], os.fspath(root)))
        if len(faults) > arguments.rows:
            print(f"... and {len(faults) - arguments.rows} more; --rows and --output show them")
        print()
    for (severity, kind), count in counts.most_common():
        print(f"{count:8d}  {severity}: {kind}")
    for split, count in images.items():
        print(f"{split}: {count} sound images")
    if arguments.output:
        content = {
            "root": os.fspath(root),
            "format": layout,
            "sound_images": images,
            "counts": {f"{severity}: {kind}": count for (severity, kind), count in counts.items()},
            "faults": [dataclasses.asdict(fault) for fault in faults],
        }
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(content, indent=2), encoding="utf-8")
    return int(any(fault.severity != "warning" or not arguments.allow_warnings for fault in faults))


if __name__ == "__main__":
    sys.exit(main())
