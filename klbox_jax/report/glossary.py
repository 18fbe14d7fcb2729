"""Names and definitions of all measures on the report page, and titles of logged metrics in words."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Term:
    """A measure of the report.

    Attributes:
        name: as on the page.
        meaning: definition in one or two sentences.
        better: "higher" or "lower" if that is better; "" for neither.
    """

    name: str
    meaning: str
    better: str = ""


_PAPERS = {
    "LRP": "Oksuz et al., ECCV 2018",
    "PDQ": "Hall et al., WACV 2020",
    "TIDE": "Bolya et al., ECCV 2020",
}

# By the anchor of the entry on the page.
GLOSSARY: dict[str, Term] = {
    "sigma": Term(
        "Sigma",
        "Predicted standard deviation of one edge of a box (left, top, right or bottom), in pixels of the image file. "
        "The relative sigma is its share of the side of the box across the edge.",
    ),
    "iou": Term(
        "IoU",
        "Intersection over union: the area that two boxes share, divided by the area that they cover together; 1 for "
        "equal boxes.",
    ),
    "true-positive": Term(
        "True positive",
        "A detection that matches an object of its class: best scores first, each detection takes the free object of "
        "the largest IoU, if the IoU is at least 0.5.",
    ),
    "duplicate": Term(
        "Duplicate", "A detection whose object was already taken by a detection of a better score."
    ),
    "localization-error": Term(
        "Localization error", "A detection whose largest IoU with an object of its class is from 0.1 to 0.5."
    ),
    "false-positive": Term(
        "False positive", "A detection that overlaps no object of its class with IoU above 0.1."
    ),
    "crowd": Term(
        "In a crowd", "A detection without an object inside a region annotated as a crowd; it is not counted."
    ),
    "precision": Term("Precision", "Share of the detections that are true positives.", "higher"),
    "recall": Term("Recall", "Share of the objects that are found by a true positive.", "higher"),
    "precision-recall-curve": Term(
        "Precision-recall curve",
        "Precision over recall as the score threshold falls. The area under the curve is the average precision.",
    ),
    "ap": Term(
        "AP",
        "Average precision by the COCO protocol: area under the precision-recall curve, averaged over the classes and "
        "over the IoU thresholds 0.50, 0.55, ..., 0.95. In per cent.",
        "higher",
    ),
    "ap-iou": Term(
        "AP50, AP60, AP70, AP75, AP80, AP90",
        "AP at one IoU threshold: AP80 only counts detections whose IoU with their object is at least 0.80, so it "
        "measures how exact the boxes are.",
        "higher",
    ),
    "ap-size": Term(
        "AP small, medium, large",
        "AP of the objects with an area up to 32 x 32 pixels, up to 96 x 96 pixels, and above.",
        "higher",
    ),
    "ar": Term(
        "AR100",
        "Average recall: recall with the best 100 detections of each image and class, averaged over the IoU thresholds "
        "0.50 to 0.95. In per cent.",
        "higher",
    ),
    "mask-ap": Term("Mask AP", "AP with the IoU of masks instead of boxes.", "higher"),
    "ap-voc": Term(
        "AP of VOC 2007",
        "Average precision at IoU 0.5 by the PASCAL VOC 2007 protocol, the mean of the precision at 11 recalls.",
        "higher",
    ),
    "lrp": Term(
        "Optimal LRP",
        "Localization Recall Precision error: combines loose boxes (1 - IoU), false positives and missed objects, at "
        f"the score threshold that is best for each class. In per cent; 0 is perfect ({_PAPERS['LRP']}).",
        "lower",
    ),
    "lrp-parts": Term(
        "Parts of optimal LRP",
        "At that threshold: mean 1 - IoU of the true positives (localization), 1 - precision (false positives) and "
        "1 - recall (missed objects).",
        "lower",
    ),
    "pdq": Term(
        "PDQ",
        "Probability-based Detection Quality: how much probability the detections give to the pixels and the class of "
        f"their objects, and how little to others. In per cent; 100 is perfect ({_PAPERS['PDQ']}).",
        "higher",
    ),
    "pdq-parts": Term(
        "Parts of PDQ",
        "Means over assigned pairs: spatial quality (do the boxes with their sigmas cover the right pixels) and label "
        "quality (the probability of the right class).",
        "higher",
    ),
    "objects": Term(
        "Objects, objects found", "Annotated objects without crowds, and those matched by a true positive."
    ),
    "rmse": Term("RMSE", "Root of the mean squared error of an edge, in pixels.", "lower"),
    "sharpness": Term(
        "Mean sigma", "Mean predicted sigma (sharpness). Small sigmas are only good if the coverage is right."
    ),
    "nll": Term(
        "NLL",
        "Negative log likelihood of the labelled edge under the predicted Gaussian, in nats, averaged over edges. It "
        "is small if the errors are small and the sigmas fit them.",
        "lower",
    ),
    "energy-score": Term(
        "Energy score",
        "Mean distance of draws from the prediction to the label, minus half the mean distance between two draws, over "
        "the four edges, in pixels. A proper score that outliers influence less than the NLL.",
        "lower",
    ),
    "coverage": Term(
        "Coverage",
        "Share of the labels within 1, 2 or 3 sigmas of the predicted edge, in per cent. Calibrated Gaussian sigmas "
        "give 68.3, 95.4 and 99.7; less means that the sigmas are too small.",
    ),
    "ece": Term(
        "ECE",
        "Expected calibration error: mean distance of the reliability diagram from its diagonal, between 0 and 1.",
        "lower",
    ),
    "ence": Term(
        "ENCE",
        "Expected normalized calibration error: edges are sorted by sigma into ten bins; mean over the bins of the "
        "difference between the RMS sigma and the RMS error, divided by the RMS sigma.",
        "lower",
    ),
    "ause": Term(
        "AUSE",
        "Area under the sparsification error: how much the error of the remaining edges falls as the edges of the "
        "largest sigma are removed, compared with removing the largest errors. 0 if sigma orders the edges perfectly.",
        "lower",
    ),
    "spearman": Term(
        "Spearman of sigma and error",
        "Rank correlation between the sigma and the absolute error of the edges: 1 if larger sigmas always belong to "
        "larger errors, 0 if sigma says nothing about the error.",
        "higher",
    ),
    "reliability": Term(
        "Reliability diagram",
        "For each quantile of the predicted Gaussians, the share of the labels below it. Calibrated sigmas give the "
        "diagonal.",
    ),
    "calibration": Term(
        "After calibration",
        "The same scores after each of the four edges' sigmas was multiplied by its own fitted factor.",
    ),
    "confusion": Term(
        "Confusions",
        "Detections with a score of at least 0.5 are matched with objects of any class at IoU 0.5; each pair counts "
        "for its true and its predicted class.",
    ),
    "tide": Term(
        "Error types (TIDE)",
        "Gain in AP50, in points, if all errors of one type were fixed. The types do not add up "
        f"({_PAPERS['TIDE']}).",
        "lower",
    ),
    "tide-cls": Term("Cls", "Wrong class: the box fits an object of another class.", "lower"),
    "tide-loc": Term("Loc", "Loose box: right class, IoU from 0.1 to 0.5.", "lower"),
    "tide-both": Term("Both", "Wrong class and loose box.", "lower"),
    "tide-dupe": Term("Dupe", "Duplicate: a better detection already found the object.", "lower"),
    "tide-bkg": Term("Bkg", "Detection on background: no object with IoU above 0.1.", "lower"),
    "tide-miss": Term("Miss", "Missed object that no other error type covers.", "lower"),
    "tide-fp": Term("FP", "All false positives together.", "lower"),
    "tide-fn": Term("FN", "All missed objects together.", "lower"),
}

# Title of the chart of each logged metric; `evaluation/` precedes those of the evaluation.
_TITLES = {
    "total_loss": "Total loss",
    "loss_cls": "Classification loss",
    "loss_box_reg": "Box regression loss",
    "loss_mask": "Mask loss",
    "loss_iou": "IoU head loss",
    "loss_rpn_cls": "RPN objectness loss",
    "loss_rpn_loc": "RPN box loss",
    "accuracy_foreground": "Classification accuracy of foreground RoIs",
    "box_error": "Error of coded box offsets",
    "mean_log_var": "Mean log variance of coded offsets",
    "mean_sigma": "Mean sigma of coded offsets",
    "num_foreground": "Foreground RoIs per image",
    "mask_accuracy": "Mask pixel accuracy",
    "iou_error": "Error of predicted IoU",
    "learning_rate": "Learning rate",
    "grad_norm": "Norm of the gradient",
    "param_norm": "Norm of the parameters",
    "update_norm": "Norm of the update",
    "seconds": "Training time (seconds)",
    "data_wait_share": "Share of time waiting for data",
    "skipped_steps": "Skipped steps",
}
_EVALUATION_TITLES = {"NLL": "NLL of an edge", "coverage_1sigma": "Share of labels within 1 sigma"}


def title_of(key: str) -> str:
    """Returns the title in words of a logged metric, such as `train/loss_cls` or `evaluation/AP`."""
    group, _, name = key.partition("/")
    if group == "evaluation":
        return f"{_EVALUATION_TITLES.get(name, name)} (evaluation)"
    name = name or group
    words = name.replace("_", " ").replace("/", " ")
    return _TITLES.get(name, words[:1].upper() + words[1:])
