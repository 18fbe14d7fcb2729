"""COCO matching and accumulation by `hotcoco`, an optional library with the same numbers at many times the speed.

It is installed with the extra `fast`.
"""

import importlib.util

from jaxtyping import Float
from numpy import ndarray


def is_installed() -> bool:
    """Returns True if hotcoco is installed."""
    return importlib.util.find_spec("hotcoco") is not None


def check_installed() -> None:
    """Raises ValueError if hotcoco is not installed."""
    if not is_installed():
        raise ValueError("the fast COCO evaluation needs hotcoco: pip install 'klbox-jax[fast]'")


def accumulate(
    truth: dict, found: dict, *, iou_type: str, iou_thresholds: list[float], limits: list[int]
) -> tuple[Float[ndarray, "t r k a m"], Float[ndarray, "t k a m"]]:
    """Returns precision and recall of `COCOeval.eval` for two COCO dictionaries.

    Args:
        truth: the ground truth.
        found: the detections, in the same form.
        iou_type: bbox or segm.
        iou_thresholds: T thresholds.
        limits: M numbers of detections to count per image and class, increasing.
    """
    import hotcoco

    evaluator = hotcoco.COCOeval(hotcoco.COCO(truth), hotcoco.COCO(found), iou_type)
    evaluator.params.iou_thrs = iou_thresholds
    evaluator.params.max_dets = limits
    evaluator.evaluate()
    evaluator.accumulate()
    return evaluator.eval["precision"], evaluator.eval["recall"]


def tide_errors(truth: dict, found: dict, *, iou_threshold: float, background_iou: float) -> dict:
    """Returns hotcoco's TIDE analysis of two COCO dictionaries; the best 100 detections of an image and class count.

    Args:
        truth: the ground truth.
        found: the detections, in the same form.
        iou_threshold: least IoU of a true positive.
        background_iou: largest IoU of a false positive on background.
    """
    import hotcoco

    evaluator = hotcoco.COCOeval(hotcoco.COCO(truth), hotcoco.COCO(found), "bbox")
    evaluator.evaluate()
    return evaluator.tide_errors(pos_thr=iou_threshold, bg_thr=background_iou)
