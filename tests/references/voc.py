"""VOC average precision in plain loops, on the devkit's own boxes: inclusive pixels, counted from 1."""


def voc_average_precision(ground_truth, results, *, category, iou_threshold=0.5):
    """Returns (11-point AP, area AP), or None without an object that counts."""
    objects = [
        {
            "image": entry["image_id"],
            "box": _inclusive(entry["bbox"]),
            "difficult": bool(entry.get("difficult", 0)),
            "claimed": False,
        }
        for entry in ground_truth["annotations"]
        if entry["category_id"] == category
    ]
    count = sum(not entry["difficult"] for entry in objects)
    if not count:
        return None
    mine = [(index, entry) for index, entry in enumerate(results) if entry["category_id"] == category]
    right = wrong = 0
    points = []
    for _, detection in sorted(mine, key=lambda pair: (-pair[1]["score"], pair[0])):
        best, overlap = None, -1.0
        for entry in objects:
            if entry["image"] == detection["image_id"]:
                iou = _overlap(_inclusive(detection["bbox"]), entry["box"])
                if iou > overlap:
                    best, overlap = entry, iou
        if overlap >= iou_threshold and best["difficult"]:
            continue
        if overlap >= iou_threshold and not best["claimed"]:
            best["claimed"] = True
            right += 1
        else:
            wrong += 1
        points.append((right, right / (right + wrong)))
    # Recall is right / count; compared in whole numbers.
    eleven = sum(max((p for r, p in points if 10 * r >= k * count), default=0.0) for k in range(11)) / 11
    area = sum(max((p for r, p in points if r >= k), default=0.0) for k in range(1, count + 1)) / count
    return eleven, area


def _inclusive(bbox):
    x, y, width, height = bbox
    return x + 1, y + 1, x + width, y + height


def _overlap(a, b):
    width = min(a[2], b[2]) - max(a[0], b[0]) + 1
    height = min(a[3], b[3]) - max(a[1], b[1]) + 1
    if width <= 0 or height <= 0:
        return -1.0
    areas = [(box[2] - box[0] + 1) * (box[3] - box[1] + 1) for box in (a, b)]
    return width * height / (sum(areas) - width * height)
