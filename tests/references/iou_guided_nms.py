"""IoU-guided NMS pick by pick, in the order of the paper's Algorithm 1."""

from tests.references.boxes import iou_of_pair


def iou_guided_nms(boxes, scores, predicted_ious, classes, valid, *, iou_threshold, iou=iou_of_pair):
    """Pairs (row, score of its cluster) of all kept boxes, in the order of the picks."""
    remaining = [row for row in range(len(boxes)) if valid[row]]
    kept = []
    while remaining:
        best = remaining[0]
        for row in remaining:
            if predicted_ious[row] > predicted_ious[best]:
                best = row
        score = scores[best]
        remaining.remove(best)
        for row in list(remaining):
            if classes[row] == classes[best] and iou(boxes[best], boxes[row]) > iou_threshold:
                score = max(score, scores[row])
                remaining.remove(row)
        kept.append((best, float(score)))
    return kept
