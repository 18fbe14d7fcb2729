"""Calibration of scores and its measures, from the definitions; plain loops."""


def isotonic(x, y):
    """Value of the nondecreasing least-squares curve at each x: blocks merge until their means are in order."""
    blocks = []
    for place in sorted(set(x)):
        own = [b for a, b in zip(x, y, strict=True) if a == place]
        blocks.append([[place], own])
        while len(blocks) > 1 and mean(blocks[-2][1]) > mean(blocks[-1][1]):
            places, values = blocks.pop()
            blocks[-1][0] += places
            blocks[-1][1] += values
    return {place: mean(values) for places, values in blocks for place in places}


def mean(values):
    return sum(values) / len(values)


def bin_of(score, num_bins):
    """Bins are (low, high] but for the first, which has 0 too."""
    for b in range(num_bins):
        if score <= (b + 1) / num_bins or b == num_bins - 1:
            return b
    return None


def binned_error(scores, targets, num_bins):
    total = 0.0
    for b in range(num_bins):
        own = [i for i, score in enumerate(scores) if bin_of(score, num_bins) == b]
        if own:
            gap = mean([scores[i] for i in own]) - sum(targets[i] for i in own) / len(own)
            total += len(own) / len(scores) * abs(gap)
    return total


def mean_over_classes(measure, scores, ious, classes):
    found = []
    for name in sorted(set(classes)):
        own = [i for i, c in enumerate(classes) if c == name]
        found.append(measure([scores[i] for i in own], [ious[i] for i in own]))
    return mean(found)


def laece_0(scores, ious, classes):
    return mean_over_classes(lambda s, t: binned_error(s, t, 25), scores, ious, classes)


def laace_0(scores, ious, classes):
    return mean_over_classes(
        lambda s, t: mean([abs(a - b) for a, b in zip(s, t, strict=True)]), scores, ious, classes
    )


def iou(a, b):
    """Boxes are x, y, width, height."""
    width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    shared = max(width, 0) * max(height, 0)
    return shared / (a[2] * a[3] + b[2] * b[3] - shared)


def oce(ground_truth, results, iou_thresholds=(0.5, 0.75)):
    names = [category["id"] for category in ground_truth["categories"]]
    total, count = 0.0, 0
    for threshold in iou_thresholds:
        for entry in ground_truth["annotations"]:
            if entry.get("iscrowd"):
                continue
            near = [
                r
                for r in results
                if r["image_id"] == entry["image_id"] and iou(r["bbox"], entry["bbox"]) >= threshold
            ]
            score = 0.0
            for name in names:
                probability = mean([r["score"] * (r["category_id"] == name) for r in near]) if near else 0.0
                score += ((name == entry["category_id"]) - probability) ** 2
            total, count = total + score, count + 1
    return total / count


def smallest_cross_entropy(logits, targets, *, loss, steps=60, has_intercept=True):
    """Slope and intercept by search over ever finer grids; `loss` is a function of both."""
    slope, intercept, width = 1.0, 0.0, 4.0
    for _ in range(steps):
        candidates = [
            (max(slope + i * width / 4, 0.0), intercept + (j * width / 4 if has_intercept else 0.0))
            for i in range(-4, 5)
            for j in (range(-4, 5) if has_intercept else (0,))
        ]
        slope, intercept = min(candidates, key=lambda pair: loss(pair, logits, targets))
        width *= 0.7
    return slope, intercept
