"""Matching and uncertainty scores in plain loops, from their definitions."""

import math

from tests.references.boxes import iou_of_pair, share_inside


def corners(bbox):
    x, y, width, height = bbox
    return [x, y, x + width, y + height]


def partition(ground_truth, results, *, iou_threshold, background_iou=0.1, min_score=0.0):
    """Returns {position in results: (name, annotation or None)}.

    The scores from high to low; of each score the results in order. Each looks over all annotations.
    """
    annotations = ground_truth["annotations"]
    taken, outcome = set(), {}
    for score in sorted({entry["score"] for entry in results}, reverse=True):
        for position, entry in enumerate(results):
            if entry["score"] != score or score < min_score:
                continue
            box = corners(entry["bbox"])
            overlaps, crowd_shares = {}, [0.0]
            for number, annotation in enumerate(annotations):
                if (annotation["image_id"], annotation["category_id"]) != (
                    entry["image_id"],
                    entry["category_id"],
                ):
                    continue
                if annotation.get("iscrowd", 0):
                    crowd_shares.append(share_inside(box, corners(annotation["bbox"])))
                else:
                    overlaps[number] = iou_of_pair(box, corners(annotation["bbox"]))
            free = {n: iou for n, iou in overlaps.items() if n not in taken and iou >= iou_threshold}
            best = max(overlaps, key=overlaps.get) if overlaps else None
            if free:
                best = max(free, key=free.get)
                taken.add(best)
                outcome[position] = ("true positive", annotations[best])
            elif max(crowd_shares) >= iou_threshold:
                outcome[position] = ("ignored", None)
            elif best is not None and overlaps[best] >= iou_threshold:
                outcome[position] = ("duplicate", annotations[best])
            elif best is not None and overlaps[best] > background_iou:
                outcome[position] = ("localization error", annotations[best])
            else:
                outcome[position] = ("false positive", None)
    return outcome


def best_f1_threshold(ground_truth, results, *, iou_threshold):
    num_objects = sum(not entry.get("iscrowd", 0) for entry in ground_truth["annotations"])
    best = (-1.0, None)
    for threshold in sorted({entry["score"] for entry in results}):
        outcome = partition(ground_truth, results, iou_threshold=iou_threshold, min_score=threshold)
        names = [name for name, _ in outcome.values() if name != "ignored"]
        hits = names.count("true positive")
        precision, recall = hits / max(len(names), 1), hits / num_objects
        f1 = 0.0 if hits == 0 else 2 * precision * recall / (precision + recall)
        best = max(best, (round(f1, 12), threshold))
    return best[1]


def ranks(values):
    """1 for the smallest; equal values share the mean of their places."""
    places = {}
    for place, value in enumerate(sorted(values), start=1):
        places.setdefault(value, []).append(place)
    return [sum(places[value]) / len(places[value]) for value in values]


def spearman(a, b):
    a, b = ranks(a), ranks(b)
    mean = (len(a) + 1) / 2
    product = sum((x - mean) * (y - mean) for x, y in zip(a, b, strict=True))
    return product / math.sqrt(sum((x - mean) ** 2 for x in a) * sum((y - mean) ** 2 for y in b))


def calibration_gaps(errors, stds):
    """The 14 signed gaps of one edge: share of labels under the level's quantile, minus the level."""
    gaps = []
    for k in range(1, 15):
        below = 0
        for error, std in zip(errors, stds, strict=True):
            below += 0.5 * (1 + math.erf(-error / std / math.sqrt(2))) < k / 15
        gaps.append(below / len(errors) - k / 15)
    return gaps


def ence(errors, stds, num_bins=10):
    pairs = sorted(zip(stds, errors, strict=True))
    size, rest = divmod(len(pairs), num_bins)
    total, start = 0.0, 0
    for b in range(num_bins):
        stop = start + size + (b < rest)
        mean_variance = sum(s * s for s, _ in pairs[start:stop]) / (stop - start)
        mean_square = sum(e * e for _, e in pairs[start:stop]) / (stop - start)
        total += abs(mean_variance**0.5 - mean_square**0.5) / mean_variance**0.5
        start = stop
    return total / num_bins


def ause(errors, stds):
    """For stds that are all different."""

    def curve(keys):
        left, values = list(zip(keys, (abs(e) for e in errors), strict=True)), []
        while left:
            values.append(sum(e for _, e in left) / len(left))
            left.remove(max(left))
        return [value / values[0] for value in values]

    by_std, by_error = curve(stds), curve([abs(e) for e in errors])
    return sum(a - b for a, b in zip(by_std, by_error, strict=True)) / len(errors)
