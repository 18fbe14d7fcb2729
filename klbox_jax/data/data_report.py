"""Check of a whole data set: every fault by the rules of training, the statistics, and the report as text and JSON."""

import collections
import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import tqdm

from klbox_jax.data.build import READERS, SOURCES, SourceMaker, build_preprocessing
from klbox_jax.data.coco import CocoSource
from klbox_jax.data.image import is_annotated_unturned
from klbox_jax.data.loader import find_misfits
from klbox_jax.data.source import DataError, Fault, FaultHandler, Source, printable
from klbox_jax.data.statistics import (
    DataStatistics,
    compute_statistics,
    find_problems,
    find_shared_images,
    format_statistics,
)

# In most sets some boxes exceed their image by less than this, from rounding.
_OVERHANG = 1.0
_SEVERITIES = ("fatal", "error", "warning", "note")
_COLUMNS = ("severity", "file", "record", "what", "remedy")
_MAX_WIDTHS = (8, 40, 40, 80, 80)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataReport:
    """The result of a check.

    Attributes:
        faults: all faults, fatal ones first.
        sound_images: for each split, the number of images without a fatal fault or an error.
        statistics: the statistics of the images that remain, by split; none for a split that cannot be read.
    """

    faults: Sequence[Fault]
    sound_images: Mapping[str, int]
    statistics: Mapping[str, DataStatistics]

    def exit_status(self, *, allow_warnings: bool) -> int:
        """Returns 1 if there are faults, 0 if there are notes at most, or warnings at most that are allowed."""
        harmless = ("note", "warning") if allow_warnings else ("note",)
        return int(any(fault.severity not in harmless for fault in self.faults))

    @property
    def counts(self) -> list[tuple[tuple[str, str], int]]:
        """The number of faults of each severity and kind, most frequent first."""
        return collections.Counter((fault.severity, fault.kind) for fault in self.faults).most_common()


def check_data(
    config: Any,
    splits: Sequence[str],
    *,
    num_threads: int,
    anchor_sizes: Sequence[float] = (),
    sources: Mapping[str, SourceMaker] = SOURCES,
) -> DataReport:
    """Checks splits of a data set as a training with this config would, and decodes every image.

    Args:
        config: a `config.data`. If it has `canvases`, every image is checked against them and `max_gt`.
        splits: the splits.
        num_threads: threads that decode images.
        anchor_sizes: square roots of the anchors' areas in pixels of the canvas, for the statistics.
        sources: the known data sets, see `klbox_jax.data.build.build_source`.

    Raises:
        ValueError: the config has a wrong value.
    """
    preprocessing = build_preprocessing(config) if config.get("canvases", ()) else None
    faults: list[Fault] = []
    sound, statistics, digests = {}, {}, {}
    for split in splits:
        found: list[Fault] = []
        try:
            source = _read(config, split, found.extend, sources)
        except DataError as error:
            faults += [*found, error.fault]
            sound[split] = 0
            continue
        bad_rows, image_faults, digests[split] = _decode_all(source, num_threads)
        found += image_faults
        found += _overhanging_boxes(source) if isinstance(source, CocoSource) else []
        if preprocessing is not None:
            misfits = find_misfits(source, preprocessing)
            bad_rows |= {row for row, _ in misfits}
            found += [fault for _, fault in misfits]
        statistics[split] = compute_statistics(source, preprocessing=preprocessing, anchor_sizes=anchor_sizes)
        found += find_problems(statistics[split])
        sound[split] = len(source.records) - len(bad_rows)
        faults += found
    faults += find_shared_images(digests)
    faults.sort(key=lambda fault: _SEVERITIES.index(fault.severity))
    return DataReport(faults=faults, sound_images=sound, statistics=statistics)


def _read(config: Any, split: str, on_fault: FaultHandler, sources: Mapping[str, SourceMaker]) -> Source:
    # A built-in data set with a handler that keeps all faults; one of the user's own with its own rules.
    if config.name in READERS and sources.get(config.name) is SOURCES.get(config.name):
        return READERS[config.name](config, split, on_fault)
    if config.name not in sources:
        raise ValueError(
            f"config.data.name = {config.name!r} is unknown; choose one of {', '.join(sorted(sources))}"
        )
    return sources[config.name](config, split)


def _decode_all(source: Source, num_threads: int) -> tuple[set[int], list[Fault], dict[str, str]]:
    """Returns the rows of unreadable images, the faults of images, and a digest of the pixels by file name."""
    bad_rows, faults, digests = set(), [], {}
    rows = range(len(source.records))
    with ThreadPoolExecutor(num_threads) as pool:
        results = pool.map(lambda row: _decode(source, row), rows)
        results = tqdm.tqdm(
            results, total=len(rows), desc=f"{source.name} images", unit="image", disable=None
        )
        for row, (fault, digest) in zip(rows, results, strict=True):
            if digest is None:
                bad_rows.add(row)
            else:
                digests[source.records[row].file_name] = digest
            if fault is not None:
                faults.append(fault)
    return bad_rows, faults, digests


def _decode(source: Source, row: int) -> tuple[Fault | None, str | None]:
    """Returns the fault of an image, and the digest of its pixels unless it cannot be used."""
    record = source.records[row]
    try:
        pixels = source.load_image(row)
        is_turned = os.path.isfile(record.file_name) and is_annotated_unturned(
            record.file_name, height=record.height, width=record.width
        )
    except DataError as error:
        return _of_entry(source, row, error.fault), None
    digest = hashlib.sha256(np.ascontiguousarray(pixels)).hexdigest()
    if not is_turned:
        return None, digest
    fault = Fault(
        kind="EXIF against the annotation",
        file=record.file_name,
        what=f"is shown rotated by viewers, but annotated as stored ({record.height} x {record.width})",
        remedy="Look at its boxes; if they fit the image as you see it, exchange width and height in the annotation.",
        severity="warning",
    )
    return _of_entry(source, row, fault), digest


def _of_entry(source: Source, row: int, fault: Fault) -> Fault:
    if isinstance(source, CocoSource):
        return source.image_fault(source.records[row].image_id, fault)
    return fault


def _overhanging_boxes(source: CocoSource) -> list[Fault]:
    truth = source.coco_ground_truth()
    sizes = {image["id"]: (image["width"], image["height"]) for image in truth["images"]}
    faults = []
    for entry in truth["annotations"]:
        x, y, box_width, box_height = entry["bbox"]
        width, height = sizes[entry["image_id"]]
        overhang = max(-x, -y, x + box_width - width, y + box_height - height)
        if overhang > _OVERHANG:
            what = f"has a box that exceeds image {entry['image_id']} by {overhang:.1f} pixels, which are cut off"
            faults.append(
                Fault(
                    kind="box over the edge of its image",
                    file=source.annotation_file,
                    record=f"annotation {entry['id']}",
                    what=what,
                    remedy="Look at it, if there are many.",
                    severity="warning",
                )
            )
    return faults


def format_report(report: DataReport, *, root: str = "", rows: int = 100) -> str:
    """Returns a report as text: a table of at most `rows` faults, counts, and the statistics of each split."""
    lines = []
    if report.faults:
        lines.append(_table(report.faults[:rows], root))
        if len(report.faults) > rows:
            lines.append(f"... and {len(report.faults) - rows} more; --rows and --output show them")
        lines.append("")
    lines += [f"{count:8d}  {severity}: {kind}" for (severity, kind), count in report.counts]
    lines += [f"{split}: {count} sound images" for split, count in report.sound_images.items()]
    lines += [format_statistics(statistics) for statistics in report.statistics.values()]
    return "\n".join(lines)


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 3] + "..."


def _table(faults: Sequence[Fault], root: str) -> str:
    """Returns one line for each fault; long cells are cut."""
    rows = [_COLUMNS] + [
        (
            fault.severity,
            printable(fault.file.removeprefix(root + os.sep)),
            printable(fault.record),
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


def write_report(report: DataReport, path: pathlib.Path, *, root: str, layout: str) -> None:
    """Writes a report as JSON."""
    content = {
        "root": root,
        "format": layout,
        "sound_images": report.sound_images,
        "counts": {f"{severity}: {kind}": count for (severity, kind), count in report.counts},
        "statistics": {split: dataclasses.asdict(found) for split, found in report.statistics.items()},
        "faults": [dataclasses.asdict(fault) for fault in report.faults],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2), encoding="utf-8")
