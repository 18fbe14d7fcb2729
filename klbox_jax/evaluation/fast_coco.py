"""COCO's matching and accumulation by `hotcoco`, an optional library: the same numbers, many times faster.

It is installed with the extra `fast`.
"""

import importlib.util

from jaxtyping import Float
from numpy import ndarray


def check_installed() -> None:
    """Raises ValueError where the library is not installed."""
    if importlib.util.find_spec("hotcoco") is None:
        raise ValueError("the fast COCO evaluation needs hotcoco: pip install 'klbox-jax[fast]'")


def accumulate(
    truth: dict, found: dict, *, iou_type: str, iou_thresholds: list[float], limits: list[int]
) -> tuple[Float[ndarray, "t r k a m"], Float[ndarray, "t k a m"], list[int]]:
    """Returns the precision, the recall and the category ids of the `COCOeval.eval` of two COCO dictionaries.

    Args:
        truth: the ground truth.
        found: the detections, in the same form.
        iou_type: bbox or segm.
        iou_thresholds: T of them.
        limits: detections of an image and class that count, M of them, increasing.
    """
    import hotcoco

    evaluator = hotcoco.COCOeval(hotcoco.COCO(truth), hotcoco.COCO(found), iou_type)
    evaluator.params.iou_thrs = iou_thresholds
    evaluator.params.max_dets = limits
    evaluator.evaluate()
    evaluator.accumulate()
    return evaluator.eval["precision"], evaluator.eval["recall"], list(evaluator.params.cat_ids)
