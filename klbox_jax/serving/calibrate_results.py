"""Calibrates the COCO results files of any detector, and applies a calibration to other results files.

The two functions behind `klbox calibrate --detections` and `klbox apply`. Nothing here needs a network or JAX.
"""

import dataclasses
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from klbox_jax import __version__
from klbox_jax.evaluation.results_calibration import CalibrationSettings, ResultsCalibration, fit_results
from klbox_jax.files import read_json, write_json

FILE_NAME = "results_calibration.json"


@dataclasses.dataclass(frozen=True)
class AppliedCalibration:
    """Summary of a file that `apply_calibration` wrote.

    Attributes:
        output: the results file.
        num_results: entries in it.
        num_without_intervals: entries whose score is below that of the calibration.
        calibration: that was applied; `calibration.lines()` has the promise.
    """

    output: pathlib.Path
    num_results: int
    num_without_intervals: int
    calibration: ResultsCalibration


def calibrate_results(
    results: str | os.PathLike,
    annotations: str | os.PathLike,
    output_dir: str | os.PathLike,
    *,
    settings: CalibrationSettings | None = None,
    postprocess: Mapping[str, Any] | None = None,
) -> ResultsCalibration:
    """Fits a calibration to a results file and writes `results_calibration.json`.

    Args:
        results: COCO results file, `[{image_id, category_id, bbox, score}, ...]`, with or without `bbox_std` (stds of
            `x1, y1, x2, y2` in pixels).
        annotations: COCO annotations of the same images, which the detector was not trained on.
        output_dir: folder to write to; made where it is missing.
        settings: by default intervals of 50, 80, 90 and 95 % of boxes and isotonic scores.
        postprocess: what the detections were made with (NMS threshold, score threshold, weights); stored, and compared
            by `apply_calibration`.

    Returns:
        The calibration; `lines()` says what it promises and what was measured on images left out.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is no COCO file, names unknown images or holds NaN, nothing matches, or there are too few
            images; the message names the file and the remedy.
        WorkdirError: the folder cannot be written to.
    """
    settings = settings or CalibrationSettings()
    entries, ground_truth = _read_results(results), _read_annotations(annotations)
    if not entries:
        raise ValueError(f"{results} has no detections; write the results with a lower score threshold")
    try:
        found = fit_results(ground_truth, entries, settings)
    except ValueError as error:
        raise ValueError(f"{results} with {annotations}: {error}") from None
    write_json(
        pathlib.Path(output_dir) / FILE_NAME,
        found.to_dict()
        | {
            "postprocess": None if postprocess is None else dict(postprocess),
            "results": str(results),
            "annotations": str(annotations),
            "num_results": len(entries),
            "num_images": len(ground_truth["images"]),
            "version": __version__,
        },
    )
    return found


def apply_calibration(
    results: str | os.PathLike,
    calibration_dir: str | os.PathLike,
    output: str | os.PathLike,
    *,
    postprocess: Mapping[str, Any] | None = None,
) -> AppliedCalibration:
    """Writes a results file with calibrated scores and intervals, see `ResultsCalibration.apply`.

    Args:
        results: COCO results file of the same detector.
        calibration_dir: folder of `calibrate_results`.
        output: file to write.
        postprocess: what these detections were made with; None leaves the comparison out.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is not what it should be, or the post-processing differs from that of the calibration.
        WorkdirError: the output cannot be written.
    """
    path = pathlib.Path(calibration_dir) / FILE_NAME
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing; fit a calibration into this folder first")
    fields = read_json(path)
    stored = fields.get("postprocess")
    if postprocess is not None and stored is not None and dict(postprocess) != stored:
        raise ValueError(
            f"{path} was fitted under the post-processing {stored}, and these results were made under "
            f"{dict(postprocess)}; its promise does not hold for them: calibrate under the same settings"
        )
    names = [field.name for field in dataclasses.fields(ResultsCalibration)]
    try:
        calibration = ResultsCalibration.from_dict({name: fields[name] for name in names})
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is no calibration of this version ({error!r}); fit it again") from None
    try:
        found = calibration.apply(_read_results(results))
    except ValueError as error:
        raise ValueError(f"{results}: {error}") from None
    write_json(output, found)
    return AppliedCalibration(
        output=pathlib.Path(output),
        num_results=len(found),
        num_without_intervals=sum(entry["edge_intervals"] is None for entry in found),
        calibration=calibration,
    )


def _read_results(path: str | os.PathLike) -> list[dict]:
    content = read_json(path)
    if not isinstance(content, list) or not all(isinstance(entry, dict) for entry in content):
        raise ValueError(
            f"{path} is no list of COCO results; give [{{image_id, category_id, bbox, score}}, ...]"
        )
    return content


def _read_annotations(path: str | os.PathLike) -> dict:
    content = read_json(path)
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise ValueError(f"{path} has no list of {key}; give a COCO annotation file")
    return content
