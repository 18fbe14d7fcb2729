"""Valid seed files of every untrusted input format, and the ways in which they are damaged."""

import copy
import io
import json
import math
import pickle
import re
import struct
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np
import safetensors.numpy
from PIL import Image

Rng = np.random.Generator

SIZE = (24, 32)  # height and width of every image
NUMBERS = tuple(b"0 -1 1e308 99999999999999999999 2147483648 NaN 1e-9 4294967295 7".split())
WORDS = (0, 1, 2**7, 2**8 - 1, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1)
# The most changes of a file, chosen so that some files of every kind are still read.
STRENGTHS = {"coco": 3, "voc": 1, "images": 3, "weights": 2}
JSON_VALUES = (
    None, True, -1, 0, 1, 2, 3.5, 1e308, -1e30, 10**30, 2**31, 2**53, math.nan, math.inf, "", "7", "../../x", "a\0b",
    "\ud800", [], {}, [[]], [1, 2, 3, 4], [1, 2, 3, -4], [1, 2, 0, 4], {"size": [24, 32], "counts": [768]},
    {"size": [24, 32], "counts": "0" * 50}, {"size": [2**31, 2**31], "counts": [2**62]}, [[1, 2] * 5000],
    [[0, 0, 1e5, 1e5, 0, 1e5]],
)  # fmt: skip


def coco_seeds() -> dict[str, bytes]:
    """Returns annotation files in COCO's format."""
    height, width = SIZE
    images = [
        {"id": i, "file_name": f"{i}.png", "height": height, "width": width, "license": 4} for i in range(4)
    ]
    polygon = [[1.0, 2.0, 9.5, 2.0, 9.5, 8.0, 1.0, 8.0]]
    masks = (polygon, {"size": [height, width], "counts": [10, 5, 753]}, polygon * 2)
    annotations = [
        {"id": 10 + i, "image_id": i % 4, "category_id": 1 + i % 2, "iscrowd": i % 3 // 2}
        | {"bbox": [1 + i, 2, 9.5, 6], "area": 57.0, "segmentation": masks[i % 3]}
        | {"attributes": {"occluded": False, "score": 0.25, "tags": ["a", "b", [1, 2]]}}
        for i in range(6)
    ]
    content = {
        "info": {"description": "a set", "year": 2024, "contributor": "nobody", "url": "http://example.org"},
        "licenses": [{"id": 4, "name": "none", "url": ""}],
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 1, "name": "fish"}, {"id": 2, "name": "ray", "supercategory": "animal"}],
    }
    return {"plain": json.dumps(content).encode(), "indented": json.dumps(content, indent=1).encode()}


def voc_seeds() -> dict[str, bytes]:
    """Returns an annotation file in VOC's format."""
    height, width = SIZE
    thing = (
        "<object><name>{}</name><pose>Left</pose><truncated>1</truncated><difficult>{}</difficult>"
        "<bndbox><xmin>{}</xmin><ymin>2</ymin><xmax>20</xmax><ymax>18</ymax></bndbox></object>"
    )
    origin = (
        "<source><database>The VOC2007 Database</database><annotation>PASCAL VOC2007</annotation><image>flickr</image>"
        "<flickrid>325991873</flickrid></source><owner><flickrid>archintent louisville</flickrid><name>?</name></owner>"
        "<comment>Photographs of the first days of the summer, taken from the other side of the river</comment>"
    )
    objects = thing.format("dog", 0, 1) + thing.format("person", 1, "3.5")
    text = (
        f"<annotation><folder>VOC2007</folder><filename>1.jpg</filename>{origin}"
        f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size>"
        f"<segmented>0</segmented>{objects}</annotation>"
    )
    return {"voc": text.encode()}


def image_seeds() -> dict[str, bytes]:
    """Returns one picture in every format that is read."""
    rng = np.random.default_rng(0)
    smooth = np.linspace(0, 200, SIZE[1])[None, :, None] + rng.integers(0, 40, (*SIZE, 3))
    rgb = Image.fromarray(smooth.astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 3
    deep = Image.fromarray((smooth[..., 0] * 200).astype(np.uint16))
    writers: dict[str, tuple[Image.Image, str, dict]] = {
        "jpeg": (rgb, "JPEG", {"exif": exif}),
        "progressive": (rgb, "JPEG", {"progressive": True}),
        "cmyk": (rgb.convert("CMYK"), "JPEG", {}),
        "png": (rgb, "PNG", {}),
        "palette": (rgb.convert("P"), "PNG", {"transparency": 3}),
        "deep": (deep, "PNG", {}),
        "gif": (rgb.convert("P"), "GIF", {}),
        "bmp": (rgb, "BMP", {}),
        "tiff": (rgb, "TIFF", {}),
        "tiff_lzw": (rgb, "TIFF", {"compression": "tiff_lzw"}),
        "tiff_deep": (deep, "TIFF", {"compression": "tiff_adobe_deflate"}),
        "webp": (rgb, "WEBP", {"lossless": True}),
        "webp_lossy": (rgb.convert("RGBA"), "WEBP", {}),
        "ppm": (rgb, "PPM", {}),
    }
    seeds = {}
    for name, (image, layout, options) in writers.items():
        buffer = io.BytesIO()
        image.save(buffer, layout, **options)
        seeds[name] = buffer.getvalue()
    return seeds


def weight_seeds() -> dict[str, bytes]:
    """Returns weight files in every layout that is read."""
    arrays = {f"layer{i}.weight": np.arange(300 + i, dtype=np.float32) for i in range(3)}
    state = b"\x80\x02}(" + b"".join(
        _text(name) + _torch_tensor(str(i), array.size) for i, (name, array) in enumerate(arrays.items())
    )
    legacy_state = state.replace(b"tQ", b"NtQ") + b"u."
    keys = b"\x80\x02](" + b"".join(_text(str(i)) for i in range(3)) + b"e."
    system = pickle.dumps({"protocol_version": 1001, "little_endian": True, "type_sizes": {"int": 4}}, 2)
    legacy = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2) + system + legacy_state + keys
    legacy += b"".join(struct.pack("<q", array.size) + array.tobytes() for array in arrays.values())
    members = {"archive/data.pkl": state + b"u.", "archive/byteorder": b"little", "archive/version": b"3\n"}
    members |= {f"archive/data/{i}": array.tobytes() for i, array in enumerate(arrays.values())}
    nested = {"model": arrays, "__author__": "nobody", "count": np.float32(3)}
    return {
        "torch.zip": _zip(members),
        "torch.legacy": legacy,
        "old.pkl": pickle.dumps({"blobs": arrays, "cfg": "XYXY: true"}, 2),
        "new.pkl": pickle.dumps(nested, 5),
        "plain.safetensors": safetensors.numpy.save(arrays, metadata={"by": "nobody"}),
    }


def _text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def _torch_tensor(key: str, numel: int) -> bytes:
    """Pickle opcodes of a flat tensor in torch's format; the named classes need not exist here."""
    storage = b"((" + _text("storage") + b"ctorch\nFloatStorage\n" + _text(key) + _text("cpu")
    count = b"M" + struct.pack("<H", numel)
    storage += count + b"tQ"
    shape = count + b"\x85K\x01\x85"
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n" + storage + b"K\x00" + shape
    return tensor + b"\x89ccollections\nOrderedDict\n)RtR"


def _zip(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def mutate_bytes(data: bytes, rng: Rng, others: list[bytes], *, strength: int) -> bytes:
    """Returns the file with up to `strength` changes of its bytes."""
    changed = bytearray(data)
    for _ in range(int(rng.integers(1, strength + 1))):
        if not changed:
            break
        at = int(rng.integers(len(changed)))
        kind = int(rng.integers(8))
        if kind <= 1:
            changed[at] ^= 1 << int(rng.integers(8))
        elif kind == 2:
            changed[at] = int(rng.integers(256))
        elif kind == 3:
            changed[at : at + int(rng.integers(1, 9))] = rng.bytes(int(rng.integers(0, 9)))
        elif kind == 4:
            del changed[at if rng.random() < 0.3 else -1 - int(rng.integers(min(8, len(changed)))) :]
        elif kind == 5:
            other = others[int(rng.integers(len(others)))]
            start = int(rng.integers(len(other)))
            length = int(rng.integers(1, 65))
            changed[at : at + length * int(rng.integers(2))] = other[start : start + length]
        elif kind == 6:
            word = struct.pack("<I" if rng.random() < 0.5 else ">I", WORDS[int(rng.integers(len(WORDS)))])
            width = 2 ** int(rng.integers(3))
            changed[at : at + width] = word[:width]
        else:
            numbers = list(re.finditer(rb"\d+", bytes(changed[:20_000])))
            if numbers:
                found = numbers[int(rng.integers(len(numbers)))]
                changed[found.start() : found.end()] = NUMBERS[int(rng.integers(len(NUMBERS)))]
    return bytes(changed)


def mutate_json(data: bytes, rng: Rng) -> bytes:
    """Returns the file with some of its values dropped, doubled, nested or replaced."""
    content = json.loads(data)
    for _ in range(int(rng.integers(1, 4))):
        _mutate_value(content, rng)
    # Deep nesting is written into the text: no JSON writer makes such deep lists.
    text = re.sub(r'"nested (\d+)"', lambda m: "[" * int(m[1]) + "]" * int(m[1]), json.dumps(content))
    return text.encode()


def _mutate_value(node: Any, rng: Rng) -> None:
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        if not keys:
            return
        key = keys[int(rng.integers(len(keys)))]
        is_leaf = not isinstance(node[key], (dict, list))
        if is_leaf or rng.random() < 0.15:
            break
        node = node[key]
    kind = int(rng.integers(6))
    if kind == 0:
        del node[key]
    elif kind == 1 and isinstance(node, list):
        node.append(copy.deepcopy(node[key]))
    elif kind == 2:
        node[key] = f"nested {rng.choice([2, 50, 900, 100_000])}"
    elif kind == 3 and isinstance(node[key], (int, float)):
        node[key] = node[key] * float(rng.choice([-1, 0, 0.5, 1.5, 1e3, 1e9]))
    else:
        node[key] = copy.deepcopy(JSON_VALUES[int(rng.integers(len(JSON_VALUES)))])


def mutate_zip(data: bytes, rng: Rng, others: list[bytes]) -> bytes:
    """Returns the archive with one member changed and its checksums right."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    # The pickle can fail in most ways.
    names = list(members)
    name = names[0] if rng.random() < 0.5 else names[int(rng.integers(len(names)))]
    members[name] = mutate_bytes(members[name], rng, others, strength=3)
    if rng.random() < 0.1:
        members["../" * 3 + "etc/passwd"] = b"x"
    return _zip(members)


def mutate(kind: str, name: str, seeds: dict[str, bytes], rng: Rng) -> bytes:
    """Returns a damaged file of a kind, made from the seed `name`."""
    others = list(seeds.values())
    if kind == "coco" and rng.random() < 0.7:
        return mutate_json(seeds[name], rng)
    if name.endswith(".zip") and rng.random() < 0.8:
        return mutate_zip(seeds[name], rng, others)
    return mutate_bytes(seeds[name], rng, others, strength=STRENGTHS[kind])


SEEDS: dict[str, Callable[[], dict[str, bytes]]] = {
    "coco": coco_seeds,
    "voc": voc_seeds,
    "images": image_seeds,
    "weights": weight_seeds,
}
