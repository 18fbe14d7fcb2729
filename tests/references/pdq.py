"""Probability-based Detection Quality, pixel by pixel, every assignment tried."""

import itertools
import math

from tests.references.boxes import share_inside
from tests.references.uncertainty import corners


def gaussian_below(x, mean, std):
    return 0.5 * math.erfc(-(x - mean) / std / math.sqrt(2))


def probability(entry, row, column, height, width):
    """Probability that the box covers a pixel: first corner before the end of the pixel, second after its start."""
    x1, y1, x2, y2 = corners(entry["bbox"])
    sx1, sy1, sx2, sy2 = entry["bbox_std"]
    first_x = gaussian_below(column + 1, x1, sx1) - gaussian_below(0, x1, sx1)
    first_y = gaussian_below(row + 1, y1, sy1) - gaussian_below(0, y1, sy1)
    second_x = gaussian_below(width, x2, sx2) - gaussian_below(column, x2, sx2)
    second_y = gaussian_below(height, y2, sy2) - gaussian_below(row, y2, sy2)
    product = first_x * first_y * second_x * second_y
    return product if product >= 0.0027 else 0.0


def in_box(entry, row, column):
    x1, y1, x2, y2 = corners(entry["bbox"])
    return x1 < column + 1 and x2 > column and y1 < row + 1 and y2 > row


def spatial_quality(annotation, mask, detection, height, width):
    foreground = background = 0.0
    pixels = 0
    for row in range(height):
        for column in range(width):
            p = probability(detection, row, column, height, width)
            is_object = in_box(annotation, row, column) if mask is None else mask[row][column]
            if is_object:
                pixels += 1
                foreground += math.log(p + 1e-14)
            if p > 0 and not in_box(annotation, row, column):
                background += math.log(1 - p + 1e-14)
    quality = math.exp((foreground + background) / pixels)
    return quality if quality >= 1e-8 else 0.0


def pdq(ground_truth, results, masks=None):
    """(PDQ, number of hits, of false positives, of misses); `masks` has the ids of the annotations as keys."""
    total, num_hits, num_objects, num_false = 0.0, 0, 0, 0
    num_classes = len(ground_truth["categories"])
    for image in ground_truth["images"]:
        mine = [a for a in ground_truth["annotations"] if a["image_id"] == image["id"]]
        objects = [a for a in mine if not a["iscrowd"]]
        found = [r for r in results if r["image_id"] == image["id"]]
        table = {}
        for g, annotation in enumerate(objects):
            for d, detection in enumerate(found):
                same = annotation["category_id"] == detection["category_id"]
                label = detection["score"] if same else (1 - detection["score"]) / (num_classes - 1)
                mask = None if masks is None else masks[annotation["id"]]
                spatial = spatial_quality(annotation, mask, detection, image["height"], image["width"])
                table[g, d] = math.sqrt(spatial * label)
        short, long = sorted((range(len(objects)), range(len(found))), key=len)
        best = []
        for chosen in itertools.permutations(long, len(short)):
            pairs = list(zip(short, chosen, strict=True))
            pairs = [(a, b) if len(objects) <= len(found) else (b, a) for a, b in pairs]
            pairs = [pair for pair in pairs if table[pair] > 0]
            if not best or sum(table[pair] for pair in pairs) > best[0]:
                best = [sum(table[pair] for pair in pairs), pairs]
        total += best[0]
        num_hits += len(best[1])
        num_objects += len(objects)
        for d in set(range(len(found))) - {d for _, d in best[1]}:
            crowds = [a for a in mine if a["iscrowd"] and a["category_id"] == found[d]["category_id"]]
            box = corners(found[d]["bbox"])
            num_false += not any(share_inside(box, corners(a["bbox"])) >= 0.5 for a in crowds)
    return total / (num_objects + num_false), num_hits, num_false, num_objects - num_hits
