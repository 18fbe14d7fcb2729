"""Statistics of the embedded scenes, a contact sheet, and a detector that must fail on them.

    python -m experiments.scenes --out=docs

writes docs/scenes.json and docs/scenes.jpg, after preparing the data set under `--data_dir` (a minute).

The control is thresholding and contours with every benefit: fifteen maps of an image (grey, colour channels,
saturation, distance from the border's colour and from the mean, local contrast, gradients), each cut by Otsu's
threshold and by an adaptive one, in both polarities. The outlines of the pieces, as they are and opened and closed,
give boxes scored by their area; classes are ignored. The best of the maps counts. Its AP50 must stay under 15.
"""

import io
import json
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np
from absl import flags
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from klbox_jax import cli
from klbox_jax.data import scene_painter
from klbox_jax.data.scenes import SPLITS, ScenesSettings, ScenesSource, prepare
from klbox_jax.evaluation.coco import evaluate_detections

_OUT = flags.DEFINE_string("out", "docs", "Folder of scenes.json and scenes.jpg.")
_DATA_DIR = flags.DEFINE_string("data_dir", "runs/data", "Folder in which data sets are prepared.")

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


def statistics(source: ScenesSource) -> dict:
    """Returns numbers that describe a split, as plain lists and floats."""
    boxes = np.concatenate([r.boxes for r in source.records])
    stds = np.concatenate([r.box_stds for r in source.records])
    classes = np.concatenate([r.classes for r in source.records])
    blur, edge_hidden, hidden = (
        np.concatenate([d[key] for d in source.details]) for key in ("blur", "edge_hidden", "hidden")
    )
    sides = boxes[:, 2:] - boxes[:, :2]
    objects = np.array([len(r.boxes) for r in source.records])

    def quantiles(values):
        return {f"{q:g}": round(float(np.quantile(values, q)), 4) for q in QUANTILES}

    return {
        "images": len(source.records),
        "objects": len(boxes),
        "objects_an_image": np.bincount(objects, minlength=scene_painter.MAX_OBJECTS + 1).tolist(),
        "class_counts": dict(zip(source.class_names, np.bincount(classes).tolist(), strict=True)),
        "side_px": quantiles(sides),
        "width_over_height": quantiles(sides[:, 0] / sides[:, 1]),
        "objects_hidden_over_10_percent": round(float((hidden > 0.1).mean()), 4),
        "edges_blurred_2_px_or_more": round(float((blur >= 2).mean()), 4),
        "edges_hidden_over_half": round(float((edge_hidden > 0.5).mean()), 4),
        "noise_std_px": quantiles(stds),
        "noise_std_over_side": quantiles(stds / np.tile(sides, 2)),
    }


def _maps(image: np.ndarray) -> dict[str, np.ndarray]:
    """Single-channel 8-bit maps in which objects might be visible."""
    lab, hsv = cv2.cvtColor(image, cv2.COLOR_RGB2LAB), cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
    smooth = cv2.GaussianBlur(lab, (0, 0), 3).astype(np.float32)
    border = np.concatenate([strip.reshape(-1, 3) for strip in (smooth[:8], smooth[-8:], smooth[:, :8])])
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    raw = {
        "grey": grey,
        "grey_smooth": cv2.GaussianBlur(grey, (0, 0), 3),
        **{f"rgb{i}": cv2.GaussianBlur(image[:, :, i], (0, 0), 2) for i in range(3)},
        **{f"lab{i}": cv2.GaussianBlur(lab[:, :, i], (0, 0), 2) for i in (1, 2)},
        "saturation": cv2.GaussianBlur(hsv[:, :, 1], (0, 0), 2),
        "from_border": np.linalg.norm(smooth - np.median(border, axis=0), axis=2),
        "from_mean": np.linalg.norm(smooth - smooth.mean((0, 1)), axis=2),
        "lab_from_mean_fine": np.linalg.norm(lab.astype(np.float32) - lab.mean((0, 1)), axis=2),
    }
    for sigma in (3, 6):
        wide = grey.astype(np.float32)
        mean = cv2.GaussianBlur(wide, (0, 0), sigma)
        raw[f"contrast{sigma}"] = np.sqrt(np.maximum(cv2.GaussianBlur(wide**2, (0, 0), sigma) - mean**2, 0))
        gradient = np.hypot(cv2.Sobel(wide, -1, 1, 0), cv2.Sobel(wide, -1, 0, 1))
        raw[f"gradient{sigma}"] = cv2.GaussianBlur(gradient, (0, 0), sigma)
    return {k: cv2.normalize(v, None, 0, 255, cv2.NORM_MINMAX).astype(np.uint8) for k, v in raw.items()}


def _contour_boxes(binary: np.ndarray) -> list[tuple[float, float, float, float]]:
    boxes = []
    for radius in (0, 2):
        kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * radius + 1, 2 * radius + 1))
        cleaned = cv2.morphologyEx(cv2.morphologyEx(binary, cv2.MORPH_CLOSE, kernel), cv2.MORPH_OPEN, kernel)
        for contour in cv2.findContours(cleaned, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)[0]:
            x, y, w, h = cv2.boundingRect(contour)
            inside = w < 0.65 * binary.shape[1] and h < 0.65 * binary.shape[0]  # no object is larger
            if min(w, h) >= 10 and inside:
                boxes.append((float(x), float(y), float(w), float(h)))
    return boxes


def control(source: ScenesSource) -> dict[str, float]:
    """Returns the AP50 of thresholding and contours for every map and threshold, and for all pooled."""
    results: dict[str, list[dict]] = {}

    def add(name: str, image_id: int, boxes: set[tuple]) -> None:
        results.setdefault(name, []).extend(
            {"image_id": image_id, "category_id": 1, "bbox": list(box), "score": box[2] * box[3]}
            for box in boxes
        )

    for index, record in enumerate(source.records):
        pooled: dict[tuple, None] = {}
        for name, channel in _maps(source.load_image(index)).items():
            otsu = cv2.threshold(channel, 0, 255, cv2.THRESH_BINARY + cv2.THRESH_OTSU)[1]
            adaptive = cv2.adaptiveThreshold(
                channel, 255, cv2.ADAPTIVE_THRESH_GAUSSIAN_C, cv2.THRESH_BINARY, 101, -8
            )
            for way, binary in (("otsu", otsu), ("adaptive", adaptive)):
                found = {*_contour_boxes(binary), *_contour_boxes(255 - binary)}
                pooled |= dict.fromkeys(found)
                add(f"{name}_{way}", record.image_id, found)
        add("pooled", record.image_id, pooled)
    truth = source.coco_ground_truth()
    one_class = [entry | {"category_id": 1} for entry in truth["annotations"]]
    truth |= {"annotations": one_class, "categories": [{"id": 1, "name": "object"}]}
    return {
        name: round(evaluate_detections(truth, entries)["AP50"] if entries else 0.0, 2)
        for name, entries in results.items()
    }


def decode_milliseconds(source: ScenesSource) -> float:
    """Returns the processor time of reading and decoding an image, in milliseconds."""
    start = time.process_time()
    for index in range(len(source.records)):
        source.load_image(index)
    return round((time.process_time() - start) / len(source.records) * 1e3, 2)


def contact_sheet(source: ScenesSource, path: Path, *, rows: int = 4, columns: int = 6) -> None:
    """Writes a picture of the first scenes: boxes, and a band of one sigma on either side of each edge."""
    colours = dict(zip(source.class_names, ("#fff", "#ff0", "#0ff", "#f80", "#f7f", "#7f3"), strict=True))
    figure = Figure(figsize=(columns * 2.0, rows * 2.0 + 0.35))
    for index, axis in enumerate(figure.subplots(rows, columns).flat):
        record = source.records[index]
        axis.imshow(source.load_image(index))
        # The centre of the first pixel is 0 for matplotlib, 0.5 here.
        for box, stds, class_index in zip(record.boxes - 0.5, record.box_stds, record.classes, strict=True):
            colour = colours[source.class_names[class_index]]
            (x1, y1, x2, y2), (left, top, right, bottom) = box, stds
            for corner, width, height in (
                ((x1 - left, y1), 2 * left, y2 - y1),
                ((x2 - right, y1), 2 * right, y2 - y1),
                ((x1, y1 - top), x2 - x1, 2 * top),
                ((x1, y2 - bottom), x2 - x1, 2 * bottom),
            ):
                axis.add_patch(Rectangle(corner, width, height, color=colour, alpha=0.4, lw=0))
            axis.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, color=colour, lw=0.7))
        axis.set(xlim=(-0.5, record.width - 0.5), ylim=(record.height - 0.5, -0.5), xticks=[], yticks=[])
    handles = [Rectangle((0, 0), 1, 1, facecolor=c, edgecolor="black", lw=0.5) for c in colours.values()]
    figure.legend(handles, colours, loc="lower center", ncols=len(handles), frameon=False, fontsize=9)
    figure.subplots_adjust(left=0.003, right=0.997, top=0.997, bottom=0.045, wspace=0.02, hspace=0.02)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    with Image.open(buffer) as picture:  # a JPEG is smaller than a PNG with a palette
        picture.convert("RGB").save(path, quality=85, optimize=True, progressive=True)


def describe(out: Path, data_dir: Path) -> dict:
    """Measures, writes `scenes.json` and `scenes.jpg` into `out`, and returns the numbers."""
    settings = ScenesSettings()
    with tempfile.TemporaryDirectory() as fresh:  # timed as a whole, even if the data set exists already
        start, start_cpu = time.perf_counter(), time.process_time()
        prepare(fresh, settings=settings)
        generation_seconds, generation_cpu = time.perf_counter() - start, time.process_time() - start_cpu
    sources = {
        split: ScenesSource(data_dir, split, boxes="noisy" if split == "train" else "exact")
        for split in SPLITS
    }
    validation = sources["validation"]
    scores = control(validation)
    best = max(scores, key=scores.get)
    result = {
        "fingerprint": validation.fingerprint,
        "painter_version": scene_painter.VERSION,
        "generation_seconds": round(generation_seconds, 1),
        "generation_cpu_seconds": round(generation_cpu, 1),
        "decode_cpu_ms": decode_milliseconds(validation),
        "splits": {split: statistics(source) for split, source in sources.items()},
        "control": {"best": best, "AP50": scores[best], "AP50_by_map": scores},
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "scenes.json").write_text(json.dumps(result, indent=1) + "\n")
    contact_sheet(validation, out / "scenes.jpg")
    return result


def main(_: list[str]) -> None:
    """Writes the files and prints the numbers."""
    print(json.dumps(describe(Path(_OUT.value), Path(_DATA_DIR.value)), indent=1))


if __name__ == "__main__":
    cli.start(main)
