"""Files that are made to hurt: each has to be refused at once and for little memory."""

import io
import json
import os
import struct
import time
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image

from klbox_jax.data import coco_entries
from klbox_jax.data.coco import CocoSource
from klbox_jax.data.coco_annotations import read_coco_annotations
from klbox_jax.data.image import check_image, decode_image, pixel_limit, stored_size
from klbox_jax.data.image_files import ImageRules
from klbox_jax.data.masks import parse_segmentation
from klbox_jax.data.source import DataError
from klbox_jax.data.voc import VocSource
from tests.data.test_voc import _annotation, _object

UNCHECKED = ImageRules(check=False)
ENTRIES = {
    "images": [{"id": 1, "file_name": "a.png", "height": 20, "width": 30}],
    "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4]}],
    "categories": [{"id": 1, "name": "fish"}],
}


@pytest.fixture(autouse=True)
def bounds():
    """Five seconds and 64 MB for each test; Python's and NumPy's memory is counted, touched or not."""
    started = time.process_time()
    tracemalloc.start()
    yield
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**26
    assert time.process_time() - started < 5


def _read(tmp_path, content):
    path = tmp_path / "labels.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return read_coco_annotations(str(path), masks=False, skip_empty_boxes=False)


def _refused(tmp_path, content, message):
    with pytest.raises(DataError, match=message) as caught:
        _read(tmp_path, content)
    assert len(str(caught.value)) < 500
    assert str(caught.value).isprintable()


def _with(section, **fields):
    content = json.loads(json.dumps(ENTRIES))
    content[section][0].update(fields)
    return content


def test_a_file_beyond_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(coco_entries, "MAX_FILE_BYTES", 100)
    _refused(tmp_path, ENTRIES, r"has \d+ bytes, where the limit is 100\. Split")


def test_a_pipe_or_a_folder_where_a_file_belongs(tmp_path):
    os.mkfifo(tmp_path / "labels.json")
    with pytest.raises(DataError, match="is not a file"):
        read_coco_annotations(str(tmp_path / "labels.json"), masks=False, skip_empty_boxes=False)
    with pytest.raises(DataError, match="is not a file"):
        read_coco_annotations(str(tmp_path), masks=False, skip_empty_boxes=False)
    with pytest.raises(DataError, match="is missing or is not a file"):
        check_image(tmp_path / "labels.json", height=1, width=1)


@pytest.mark.parametrize("depth", [500, 990, 10_000])
def test_deep_values_in_a_field(tmp_path, depth):
    text = json.dumps(_with("images", height="deep")).replace('"deep"', "[" * depth + "]" * depth)
    _refused(tmp_path, text, "'height' of images.0.|nested too deeply")


@pytest.mark.parametrize("size", [(2**16, 1), (1, 2**31), (60_000, 60_000)])
def test_declared_sizes(tmp_path, size):
    _refused(tmp_path, _with("images", height=size[0], width=size[1]), "up to 65535|where the limit is 8947")


@pytest.mark.parametrize("name", ["a\nb", "\x1b[2Jfish", "\ud800", "fi\0sh"])
def test_class_names_that_do_not_print(tmp_path, name):
    _refused(tmp_path, _with("categories", name=name), "is '.*', not a printable text")


def test_paths_out_of_the_folder_of_links(tmp_path):
    root, secret = tmp_path / "pond", tmp_path / "secret"
    (root / "annotations").mkdir(parents=True)
    (root / "train").mkdir()
    secret.mkdir()
    Image.new("RGB", (30, 20)).save(secret / "a.png")
    (root / "train" / "sub").symlink_to(secret)
    (root / "annotations/instances_train.json").write_text(json.dumps(_with("images", file_name="sub/a.png")))
    with pytest.raises(DataError, match="does not stay in the image folder"):
        CocoSource(root, "train")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([[0, 1] * 100_001], "polygons of more than 100000 points"),
        ([[0, 1, 2, 3, 4, 5]] * 40_000, "polygons of more than 100000 points"),
        ([[0, 0, 30, 20] * 100], "absurdly long outline"),
        ([[1e308, 1, 2, 3, 4, 5]], "leads far out of its image"),
        ({"size": [20, 30], "counts": [2**62, 1]}, "not whole numbers"),
        ({"size": [20, 30], "counts": [2**31 - 1] * 3}, "run lengths of 6442450941 pixels"),
        ({"size": [2**31, 2**31], "counts": [2**62]}, "for another size"),
        ({"size": [20, 30], "counts": "o" * 1000 + "0"}, "break off"),
        ({"size": [20, 30], "counts": "ooooooo" * 9 + "0"}, "break off"),
    ],
)
def test_masks(value, message):
    with pytest.raises(ValueError, match=message):
        parse_segmentation(value, height=20, width=30)


def test_a_detailed_outline_is_no_fault():
    # A comb of one pixel's pitch through the whole image: 640 x 480 pixels of outline.
    xs = np.repeat(np.arange(640.0), 2)
    ys = np.tile([0.0, 480.0, 480.0, 0.0], 320)
    comb = np.stack([xs, ys], axis=1)[:200].ravel().tolist()
    assert len(parse_segmentation([comb], height=480, width=640)) == 1


def _png(height, width, body=b""):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def test_images_that_declare_too_much():
    bomb = _png(100_000, 100_000, zlib.compress(bytes(1000)))
    with pytest.raises(DataError, match="bomb is absurdly large"):
        decode_image(bomb, height=100_000, width=100_000, name="bomb")
    with pytest.raises(DataError, match="absurdly large"):
        stored_size(bomb, "bomb")
    with pytest.raises(DataError, match="is 9000 pixels high and 9000 wide, its annotation says 20 high"):
        decode_image(_png(9000, 9000), height=20, width=30)
    assert pixel_limit() == Image.MAX_IMAGE_PIXELS


def test_a_png_with_more_data_than_pixels():
    # 32 MB of zeros from 32 kB: the decoder stops where the picture is full.
    image = decode_image(_png(2, 3, zlib.compress(bytes(2**25), 9)), height=2, width=3)
    assert image.shape == (2, 3, 3)


def test_a_text_in_a_png_that_swells():
    text = b"Comment\0\0" + zlib.compress(bytes(2**23), 1)
    chunk = struct.pack(">I", len(text)) + b"zTXt" + text + struct.pack(">I", zlib.crc32(b"zTXt" + text))
    data = _png(2, 3, zlib.compress(bytes(20)))
    with pytest.raises(DataError, match=r"cannot be decoded|is not an image"):
        decode_image(data[:33] + chunk + data[33:], height=2, width=3)


def test_a_jpeg_of_thousands_of_scans():
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64)).save(buffer, "JPEG", progressive=True)
    data = buffer.getvalue()
    assert decode_image(data, height=64, width=64).shape == (64, 64, 3)
    # The last scan, a refinement of a few bytes, over and over.
    last = data[data.rindex(b"\xff\xda") : -2]
    with pytest.raises(DataError, match=r"absurdly large \(5\d\d\d scans, the limit is 500\)"):
        decode_image(data[:-2] + last * 5000 + data[-2:], height=64, width=64)


def _voc(tmp_path, text):
    for folder in ("ImageSets/Main", "Annotations"):
        (tmp_path / "VOC2007" / folder).mkdir(parents=True)
    (tmp_path / "VOC2007/ImageSets/Main/test.txt").write_text("1\n")
    (tmp_path / "VOC2007/Annotations/1.xml").write_text(text)
    return VocSource(tmp_path, (("2007", "test"),), images=UNCHECKED)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<a>" + " " * 2**22 + "</a>", "is absurdly large"),
        ("<a>" * 100_000, "is not valid XML"),
        (_annotation(width=70_000), "says its image is 70000 wide"),
        (_annotation(width=60_000, height=60_000), "has 60000 x 60000 pixels, where the limit"),
        (_annotation(_object(box=("1" + "0" * 3_000_000, 1, 2, 3))), "which must be a number"),
        (_annotation(_object(box=(9.5, 1, "8.5000000001", 3))), "of no width or height in float32"),
        ('<!DOCTYPE a [<!ENTITY b "&c;&c;"><!ENTITY c "&d;&d;">]><a>&b;</a>', "has a DOCTYPE"),
    ],
)
def test_xml(tmp_path, text, message):
    with pytest.raises(DataError, match=message) as caught:
        _voc(tmp_path, text)
    assert len(str(caught.value)) < 500


def test_a_pipe_for_an_annotation_of_voc(tmp_path):
    for folder in ("ImageSets/Main", "Annotations"):
        (tmp_path / "VOC2007" / folder).mkdir(parents=True)
    (tmp_path / "VOC2007/ImageSets/Main/test.txt").write_text("1\n")
    os.mkfifo(tmp_path / "VOC2007/Annotations/1.xml")
    with pytest.raises(DataError, match="is not a file"):
        VocSource(tmp_path, (("2007", "test"),), images=UNCHECKED)
