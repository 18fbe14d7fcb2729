"""A small data set in COCO's layout: noise with coloured boxes, images of three shapes."""

import json

import numpy as np
from PIL import Image

# (height, width): under a short side of 80 and a long side of 96 they become 64 x 96, 96 x 64 and 80 x 80.
SHAPES = ((100, 150), (150, 100), (100, 100))
CATEGORIES = [{"id": 3, "name": "fish"}, {"id": 7, "name": "ray"}]


def content(split, *, images_per_shape):
    rng = np.random.default_rng(len(split))
    images, annotations = [], []
    for number in range(images_per_shape * len(SHAPES)):
        height, width = SHAPES[number % len(SHAPES)]
        images.append({"id": number + 1, "file_name": f"{number}.png", "height": height, "width": width})
        for _ in range(2):
            x, y = (int(value) for value in rng.integers(0, 50, 2))
            category = CATEGORIES[int(rng.integers(2))]["id"]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number + 1,
                    "category_id": category,
                    "bbox": [x, y, 40, 45],
                }
            )
    return {"images": images, "annotations": annotations, "categories": CATEGORIES}


def write_annotations(root, split, annotations):
    path = root / "annotations" / f"instances_{split}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(annotations if isinstance(annotations, str) else json.dumps(annotations))
    return path


def write_folder(root, *, images_per_shape=4, splits=("train", "valid")):
    rng = np.random.default_rng(0)
    for split in splits:
        annotations = content(split, images_per_shape=images_per_shape)
        write_annotations(root, split, annotations)
        (root / split).mkdir(parents=True)
        for image in annotations["images"]:
            pixels = rng.integers(0, 80, (image["height"], image["width"], 3), np.uint8)
            for entry in annotations["annotations"]:
                if entry["image_id"] == image["id"]:
                    x, y, width, height = entry["bbox"]
                    pixels[y : y + height, x : x + width, entry["category_id"] % 3] += 150
            Image.fromarray(pixels).save(root / split / image["file_name"])
    return root
