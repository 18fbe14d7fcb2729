import numpy as np
import pytest
from PIL import Image

from klbox_jax.data.image_files import ImageRules
from klbox_jax.data.source import DataError, Source
from klbox_jax.data.voc import VOC_CLASSES, VocSource
from klbox_jax.data.voc_files import parse_voc_split


def _object(name="dog", box=(1, 1, 30, 20), difficult=0, more=""):
    corners = "".join(
        f"<{key}>{value}</{key}>" for key, value in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
    )
    flag = "" if difficult is None else f"<difficult>{difficult}</difficult>"
    return f"<object><name>{name}</name>{flag}<bndbox>{corners}</bndbox>{more}</object>"


def _annotation(*objects, width=30, height=20):
    size = f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size>"
    return f"<annotation>{size}{''.join(objects)}</annotation>"


PART = (
    "<part><name>head</name><bndbox><xmin>2</xmin><ymin>2</ymin><xmax>3</xmax><ymax>3</ymax></bndbox></part>"
)
ANNOTATIONS = {
    ("2007", "000005"): _annotation(_object(), _object("person", (3, 5, 3, 9), 1, PART)),
    ("2007", "000007"): _annotation(),
    ("2012", "2008_000008"): _annotation(_object("cat", (29.5, 2, 31, 25), None)),
}
LISTS = {
    ("2007", "trainval"): "000007\n000005 \n\n",
    ("2007", "test"): "000007",
    ("2012", "trainval"): "2008_000008\n",
}
BOTH = (("2007", "trainval"), ("2012", "trainval"))


@pytest.fixture
def root(tmp_path):
    for folder in ("ImageSets/Main", "Annotations", "JPEGImages"):
        for year in ("2007", "2012"):
            (tmp_path / f"VOC{year}" / folder).mkdir(parents=True)
    for (year, split), names in LISTS.items():
        (tmp_path / f"VOC{year}" / "ImageSets" / "Main" / f"{split}.txt").write_text(names)
    for (year, name), text in ANNOTATIONS.items():
        (tmp_path / f"VOC{year}" / "Annotations" / f"{name}.xml").write_text(text)
        Image.new("RGB", (30, 20), (90, 0, 0)).save(tmp_path / f"VOC{year}" / "JPEGImages" / f"{name}.jpg")
    return tmp_path


def test_records_by_hand(root):
    source = VocSource(root, BOTH)
    assert isinstance(source, Source)
    assert source.name == f"{root.name}/2007_trainval+2012_trainval"
    assert source.class_names == VOC_CLASSES
    assert (len(VOC_CLASSES), source.category_ids[-1]) == (20, 20)
    assert [record.image_id for record in source.records] == [1, 2, 3]
    assert [record.file_name.rpartition("/")[2] for record in source.records] == [
        "000007.jpg",
        "000005.jpg",
        "2008_000008.jpg",
    ]
    empty, first, last = source.records
    assert empty.boxes.shape == (0, 4)
    # The first box names every pixel of the image, the second one column and five rows.
    np.testing.assert_array_equal(first.boxes, [[0, 0, 30, 20], [2, 4, 3, 9]])
    assert [VOC_CLASSES[index] for index in first.classes] == ["dog", "person"]
    np.testing.assert_array_equal(first.is_crowd, [False, True])
    # Parts of a pixel stay; what hangs over the image is cut.
    np.testing.assert_array_equal(last.boxes, [[28.5, 1, 30, 20]])
    np.testing.assert_array_equal(last.is_crowd, [False])
    assert source.load_image(1).shape == (20, 30, 3)


def test_ground_truth_hands_on_what_is_difficult(root):
    truth = VocSource(root, BOTH).coco_ground_truth()
    assert [(entry["image_id"], entry["difficult"], entry["iscrowd"]) for entry in truth["annotations"]] == [
        (2, 0, 0),
        (2, 1, 1),
        (3, 0, 0),
    ]
    assert truth["annotations"][1]["bbox"] == [2, 4, 1, 5]
    assert truth["categories"][0] == {"id": 1, "name": "aeroplane"}
    assert truth["images"][2]["file_name"].endswith("2008_000008.jpg")


def test_own_classes(root):
    source = VocSource(root, BOTH, class_names=("cat", "person", "dog"))
    assert [record.classes.tolist() for record in source.records] == [[], [2, 1], [0]]


def test_splits_by_name():
    assert parse_voc_split("2007_test") == (("2007", "test"),)
    assert parse_voc_split("2007_trainval+2012_trainval") == BOTH
    for wrong in ("", "2007", "test", "2007_", "2007_test+", "2007_../x", "../2007_test"):
        with pytest.raises(ValueError, match="not of the form 2007_trainval"):
            parse_voc_split(wrong)


def _broken(root, text, name="000005"):
    path = root / "VOC2007" / "Annotations" / f"{name}.xml"
    if isinstance(text, bytes):
        path.write_bytes(text)
    else:
        path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError) as caught:
        VocSource(root, BOTH)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "is not valid XML: no element found"),
        ("<annotation><size>", "is not valid XML"),
        ("<a>" * 20_000, "is not valid XML"),
        ("<a>&lol;</a>", "is not valid XML: undefined entity"),
        ("<a>\0</a>", "is not valid XML"),
        ('<!DOCTYPE a [<!ENTITY b "ha">]><a>&b;</a>', "has a DOCTYPE"),
        ('<?xml version="1.0"?>\n<!DOCTYPE a SYSTEM "file:///etc/hostname"><a/>', "has a DOCTYPE"),
        ('<!DOCTYPE a><a/>'.encode("utf-16"), "has a DOCTYPE"),
        ("<annotation/>", "000005.xml has no 'size/width', which must be a number"),
        (_annotation(width="wide"), "000005.xml has 'wide' as its 'size/width'"),
        (_annotation(width=0), "says its image is 0 wide and 20 high"),
        (_annotation(height=2.5), "says its image is 30 wide and 2.5 high"),
        (_annotation(height="1e99"), "has '1e99' as its 'size/height'"),
        (_annotation(_object("dragon")), "object 1 is of the unknown class 'dragon'"),
        (_annotation(_object(), "<object/>"), "object 2 is of the unknown class ''"),
        (_annotation("<object><name>dog</name></object>"), "object 1 has no 'bndbox/xmin'"),
        (_annotation(_object(box=("nan", 1, 2, 3))), "object 1 has 'nan' as its 'bndbox/xmin'"),
        (_annotation(_object(box=(9, 1, 8, 3))), "[9.0, 1.0, 8.0, 3.0] without width or height"),
        (_annotation(_object(box=(31, 1, 40, 3))), "no part inside the image of 30 x 20 pixels"),
        (_annotation(_object(box=(-5, 1, 0, 3))), "no part inside the image"),
        (_annotation(_object(difficult=2)), "object 1 has '2' as its 'difficult', not 0 or 1"),
    ],
)  # fmt: skip
def test_faults_of_an_annotation_name_its_file(root, text, fault):
    assert fault in _broken(root, text)


def test_unusable_images_are_counted(root):
    (root / "VOC2012" / "Annotations" / "2008_000008.xml").unlink()
    assert _broken(root, "").endswith("(and 1 more). Restore or export it again.")


def test_an_image_of_another_size(root):
    (root / "VOC2007" / "Annotations" / "000007.xml").write_text(_annotation(width=31))
    with pytest.raises(DataError, match=r"000007\.jpg is 20 pixels high and 30 wide, .* 20 high and 31 wide"):
        VocSource(root, BOTH)


def test_missing_files(root):
    (root / "VOC2007" / "JPEGImages" / "000005.jpg").unlink()
    with pytest.raises(DataError, match=r"000005\.jpg is missing"):
        VocSource(root, BOTH)
    assert len(VocSource(root, BOTH, images=ImageRules(check=False)).records) == 3
    (root / "VOC2007" / "Annotations" / "000005.xml").unlink()
    with pytest.raises(DataError, match=r"000005\.xml cannot be read \(No such file"):
        VocSource(root, BOTH)
    with pytest.raises(DataError, match=r"val\.txt cannot be read \(No such file"):
        VocSource(root, (("2007", "val"),))
    with pytest.raises(
        DataError, match=r"VOC2010 is not a folder\. Point config\.data\.root to the folder that"
    ):
        VocSource(root, (("2010", "test"),))


@pytest.mark.parametrize("line", ["000005  1", "../000005", "a/b", ".", "..", "\\x"])
def test_lines_that_are_no_names(root, line):
    (root / "VOC2007" / "ImageSets" / "Main" / "test.txt").write_text(f"000007\n{line}\n")
    with pytest.raises(DataError, match=r"test\.txt has the line .* which is not the name of an image"):
        VocSource(root, (("2007", "test"),))


def test_an_image_twice_and_none_at_all(root):
    with pytest.raises(DataError, match=r"000007\.jpg is listed twice in 2007_test\+2007_trainval"):
        VocSource(root, (("2007", "test"), ("2007", "trainval")))
    (root / "VOC2007" / "ImageSets" / "Main" / "test.txt").write_text("\n")
    with pytest.raises(DataError, match=r"test\.txt lists no images"):
        VocSource(root, (("2007", "test"),))
