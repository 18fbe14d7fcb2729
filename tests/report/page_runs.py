"""A small data set, runs on it with hostile names, and a parser of pages."""

import html.parser
import json

import numpy as np
from PIL import Image

from klbox_jax.evaluation.uncertainty import evaluate_uncertainty

HOSTILE = "</script><script>alert(1)</script>"


CLASSES = (HOSTILE, 'ray & "eel"')


FILE_NAME = "<b>&'\".png"


SIZE = (720, 450)  # wider than the pictures of a report


NUM_IMAGES = 4


def annotations():
    images = [
        {"id": 10 + i, "file_name": FILE_NAME if i == 0 else f"{i}.png", "width": SIZE[0], "height": SIZE[1]}
        for i in range(NUM_IMAGES)
    ]
    objects = [
        {"id": 1, "image_id": 10, "category_id": 3, "bbox": [10, 10, 40, 60]},
        *(
            {"id": 2 + i, "image_id": 11 + i, "category_id": 5, "bbox": [100 + 20 * i, 50, 80, 40]}
            for i in range(3)
        ),
    ]
    categories = [{"id": 3, "name": CLASSES[0]}, {"id": 5, "name": CLASSES[1]}]
    return {"images": images, "annotations": objects, "categories": categories}


def detections(with_stds=True):
    """Returns one detection of each kind in the first image, and ten random ones in each other image."""

    def entry(image_id, category_id, bbox, score, stds):
        return {"image_id": image_id, "category_id": category_id, "bbox": bbox, "score": score} | (
            {"bbox_std": stds} if with_stds else {}
        )

    rows = [
        entry(10, 3, [10, 10, 40, 60], 0.9, [1.0, 2.0, 3.0, 4.0]),  # its object, exactly
        entry(
            10, 3, [10, 10, 40, 50], 0.8, [1.0, 1.0, 1.0, 1.0]
        ),  # its object is taken: a duplicate, IoU 50/60
        entry(10, 3, [10, 40, 40, 60], 0.7, [5.0, 5.0, 5.0, 5.0]),  # IoU 30/90: a localization error
        entry(10, 5, [200, 10, 40, 60], 0.6, [9.0, 9.0, 9.0, 9.0]),  # nothing is there
    ]
    rng = np.random.default_rng(0)
    for image_id in (11, 12, 13):
        for _ in range(10):
            x, y = rng.integers(60, 160), rng.integers(30, 70)
            score, stds = round(float(rng.uniform(0.1, 1)), 3), (rng.integers(1, 30, 4) / 4).tolist()
            rows.append(entry(image_id, 5, [float(x), float(y), 80.0, 40.0], score, stds))
    return rows


def write_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def write_data(root):
    content = annotations()
    write_json(root / "annotations" / "instances_valid.json", content)
    (root / "valid").mkdir()
    rng = np.random.default_rng(0)
    for image in content["images"]:
        pixels = rng.integers(0, 255, (SIZE[1], SIZE[0], 3), np.uint8)
        Image.fromarray(pixels).save(root / "valid" / image["file_name"])


def write_run(workdir, root, *, ap=40.0, settings=("",), data="sea/valid", with_stds=True):
    config = {
        "seed": 7,
        "model": {"box_loss": "kl", "init_weights": "<img src=x onerror=alert(1)>" + HOSTILE},
        "data": {"name": "coco", "root": str(root), "eval_split": "train"},
        "postprocess": {"voting": "variance"},
    }
    write_json(workdir / "config.json", config)
    lines = [{"step": step, "train/total_loss": 10.0 - step, "train/rate": 0.1} for step in range(1, 6)]
    lines[2]["train/total_loss"] = None
    (workdir / "metrics.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 6, "tra'
    )
    results = detections(with_stds)
    for setting in settings:
        metrics = {
            "AP": ap,
            "AP90": None,
            "AP_by_iou": [ap - i for i in range(10)],
            "AP_by_class": {CLASSES[0]: ap, CLASSES[1]: None},
            "uncertainty": evaluate_uncertainty(annotations(), results),
            "LRP": {"oLRP": 61.5, "oLRP_localization": None},
            "data": data,
            "seed": 7,
            "versions": {"jax": "0.0.1", "devices": {"cpu: <x>": 1}},
            "postprocess": {"voting": "none"},
        }
        write_json(workdir / "eval" / "5" / setting / "metrics.json", metrics)
        write_json(workdir / "eval" / "5" / setting / "detections.json", results)


VOID = {"meta", "input", "br", "link", "img"}


class Page(html.parser.HTMLParser):
    """Parses a page into elements with attributes and text; fails on tags that are not closed."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open = [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs)
        regions = [e["aria-label"] for e in self.open if e.get("role") == "region"]
        parents = [e["tag"] for e in self.open]
        element = {"tag": tag, "parents": parents, "regions": regions, "text": "", **dict(attrs)}
        self.elements.append(element)
        if tag not in VOID and not self.get_starttag_text().endswith("/>"):
            self.open.append(element)

    def handle_endtag(self, tag):
        if not self.get_starttag_text().endswith("/>") or self.open[-1]["tag"] == tag:
            assert self.open.pop()["tag"] == tag

    def handle_data(self, data):
        for element in self.open:
            element["text"] += data

    def all(self, tag):
        return [element for element in self.elements if element["tag"] == tag]

    def block(self, name):
        (found,) = [e for e in self.all("script") if e.get("id") == name]
        assert found["type"] == "application/json"
        return json.loads(found["text"])

    def rows(self, region):
        """Returns the other cells of each row by the first one, for the table in a region of this name."""
        lines, found = {}, None
        for element in self.elements:
            if region not in element["regions"]:
                continue
            if element["tag"] == "tr":
                found = []
            elif element["tag"] in ("th", "td"):
                found.append(element["text"])
                lines[found[0]] = found[1:]
        return lines
