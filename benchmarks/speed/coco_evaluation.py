"""COCO's average precision of a whole validation set: our fast back end and pycocotools."""

import contextlib
import io

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from benchmarks.speed.measure import Sides, timed
from klbox_jax.evaluation.coco import evaluate_detections

IMAGES, OBJECTS, DETECTIONS, CLASSES = 5000, 7, 100, 80


def make_results(num_images: int, *, seed: int = 0) -> tuple[dict, list[dict]]:
    """Returns the ground truth of images of 640 x 480, and the detections of each.

    Half the detections are around an object, and two thirds of these have its class; the others are anywhere.
    """
    rng = np.random.default_rng(seed)
    size = np.array([640.0, 480.0])
    sides = np.exp(rng.uniform(np.log(12), np.log(300), (num_images, OBJECTS, 2)))
    boxes = np.concatenate([rng.uniform(size=sides.shape) * np.maximum(size - sides, 1.0), sides], axis=-1)
    classes = rng.integers(0, CLASSES, (num_images, OBJECTS))

    around = rng.integers(0, OBJECTS, (num_images, DETECTIONS))
    rows = np.arange(num_images)[:, None]
    found, labels = boxes[rows, around], classes[rows, around]
    found = found + rng.normal(0, 0.08, found.shape) * np.tile(found[..., 2:], 2)
    anywhere = np.arange(DETECTIONS) >= DETECTIONS // 2
    found[:, anywhere, :2] = rng.uniform(0, 300, (num_images, anywhere.sum(), 2))
    labels = np.where(rng.random(labels.shape) < 1 / 3, rng.integers(0, CLASSES, labels.shape), labels)
    found[..., 2:] = np.maximum(found[..., 2:], 1.0)
    scores = rng.random(labels.shape)

    truth = {
        "images": [{"id": i + 1, "width": 640, "height": 480} for i in range(num_images)],
        "categories": [{"id": k + 1, "name": f"class {k + 1}"} for k in range(CLASSES)],
        "annotations": [
            {
                "id": OBJECTS * i + j + 1,
                "image_id": i + 1,
                "category_id": int(classes[i, j]) + 1,
                "bbox": boxes[i, j].round(2).tolist(),
                "area": float(boxes[i, j, 2] * boxes[i, j, 3]),
                # One in fifty is a crowd.
                "iscrowd": int(rng.random() < 0.02),
            }
            for i in range(num_images)
            for j in range(OBJECTS)
        ],
    }
    results = [
        {"image_id": i + 1, "category_id": label + 1, "bbox": box, "score": score}
        for i, image in enumerate(zip(found.round(4).tolist(), labels.tolist(), scores.tolist(), strict=True))
        for box, label, score in zip(*image, strict=True)
    ]
    return truth, results


def evaluations(num_images: int = IMAGES) -> Sides:
    """Returns ours with the fast back end, from results to numbers, and pycocotools by its demo, without printing."""
    truth, results = make_results(num_images)
    fast = evaluate_detections(truth, results[:2000], backend="hotcoco")
    slow = evaluate_detections(truth, results[:2000], backend="pycocotools")
    if any(abs(fast[name] - slow[name]) > 1e-9 for name in ("AP", "AP90", "AP_small", "AR100")):
        raise ValueError("the fast evaluation differs from pycocotools', so that its time means nothing")

    def pycocotools() -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            data = COCO()
            data.dataset = truth
            data.createIndex()
            # It writes into the entries.
            evaluator = COCOeval(data, data.loadRes([dict(entry) for entry in results]), "bbox")
            evaluator.evaluate()
            evaluator.accumulate()
            evaluator.summarize()

    return Sides(timed(lambda: evaluate_detections(truth, results, backend="hotcoco")), timed(pycocotools))
