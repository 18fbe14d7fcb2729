import numpy as np
import pytest
from PIL import Image

from klbox_jax.data.image_files import ImageRules
from klbox_jax.data.source import DataError, Source
from klbox_jax.data.voc import VOC_CLASSES, VocSource
from klbox_jax.data.voc_annotations import collect_class_names
from klbox_jax.data.voc_files import annotation_dirs, find_voc_splits, parse_voc_split, split_pairs


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


def _rename(root, name, *, suffix=".jpg", text=None, encoding="utf-8"):
    """Gives image 000007 another name, suffix and annotation."""
    base = root / "VOC2007"
    (base / "JPEGImages/000007.jpg").rename(base / f"JPEGImages/{name}{suffix}")
    (base / "Annotations/000007.xml").unlink()
    (base / f"Annotations/{name}.xml").write_bytes((text or _annotation(_object())).encode(encoding))
    (base / "ImageSets/Main/test.txt").write_text(f"{name}\n", encoding="utf-8")


@pytest.mark.parametrize("suffix", [".png", ".JPG", ".jpeg", ".JPEG", ".Png", ".webp", ".jfif"])
def test_any_suffix_of_an_image(root, suffix):
    _rename(root, "a", suffix=suffix)  # the content decides how it is decoded
    source = VocSource(root, (("2007", "test"),))
    assert source.records[0].file_name.endswith(f"a{suffix}")
    assert source.load_image(0).shape == (20, 30, 3)


@pytest.mark.parametrize(
    "name",
    ["Screenshot 2026-01-02 (1)", "a+b", "x [1]", "it's", "caf\u00e9", "\u6c34", "a.b.c", "-1", "#2", "a,b"],
)
def test_names_of_images(root, name):
    _rename(root, name)
    assert len(VocSource(root, (("2007", "test"),)).records) == 1
    # With the suffix, as some tools list them.
    (root / "VOC2007/ImageSets/Main/test.txt").write_text(f"{name}.jpg\n", encoding="utf-8")
    assert len(VocSource(root, (("2007", "test"),)).records) == 1


@pytest.mark.parametrize(
    "encoding",
    ["ISO-8859-1", "iso-8859-15", "windows-1252", "US-ASCII", "UTF-8", "utf8", "UTF-16", "GBK", "Shift_JIS"],
)
def test_declared_encodings(root, encoding):
    name = {"GBK": "\u9c7c", "Shift_JIS": "\u9b5a", "US-ASCII": "fish"}.get(encoding, "poisson \u00e9")
    text = f'<?xml version="1.0" encoding="{encoding}"?>\n' + _annotation(_object(name))
    _rename(root, "a", text=text, encoding=encoding)
    record = VocSource(root, (("2007", "test"),), class_names=(name,)).records[0]
    assert record.classes.tolist() == [0]
    assert collect_class_names(annotation_dirs(root)) == tuple(sorted({"cat", "dog", "person", name}))


@pytest.mark.parametrize(
    ("declared", "encoding", "fault"),
    [
        ("UTF-9", "utf-8", "declares the encoding 'UTF-9', which is unknown"),
        ("utf-16", "utf-8", "which is unknown or is not that of the file"),
        ("zip", "utf-8", "declares the encoding 'zip'"),
        ("utf-7", "utf-8", "declares the encoding 'utf-7'"),
        ("idna", "utf-8", "declares the encoding 'idna'"),
        ("UTF-8", "latin-1", "is not UTF-8 text"),
        ("GBK", "latin-1", "is not gbk text"),
    ],
)
def test_encodings_that_are_wrong(root, declared, encoding, fault):
    text = f'<?xml version="1.0" encoding="{declared}"?>' + _annotation(_object("\u00e9"))
    assert fault in _broken(root, text.encode(encoding))


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "ISO-8859-1"])
def test_a_doctype_is_refused_in_any_encoding(root, encoding):
    declaration = encoding.removesuffix("-le").removesuffix("-be")
    text = f'<?xml version="1.0" encoding="{declaration}"?><!DOCTYPE a [<!ENTITY b "c">]><a>&b;</a>'
    assert "has a DOCTYPE" in _broken(root, text.encode(encoding))


def test_a_list_of_windows(root):
    (root / "VOC2007/ImageSets/Main/test.txt").write_bytes("000007\r\n000005\r\n".encode("utf-16"))
    assert len(VocSource(root, (("2007", "test"),)).records) == 2


def _warnings(root, box, **options):
    (root / "VOC2007/Annotations/000007.xml").write_text(_annotation(_object(box=box)))
    faults = []
    source = VocSource(root, (("2007", "test"),), on_fault=faults.extend, **options)
    return source.records[0].boxes.tolist(), [(fault.severity, fault.kind) for fault in faults], faults


def test_the_first_pixel(root):
    assert _warnings(root, (1, 2, 10, 20))[:2] == ([[0, 1, 10, 20]], [])
    # As CVAT writes: edges from 0, with fractions.
    for box in ((0, 2, 10, 20), (3, 0, 10, 20), (3.5, 2, 10, 20), (3, 2, 10, 19.25)):
        _, kinds, faults = _warnings(root, box)
        assert kinds == [("warning", "first pixel")]
        assert "Set config.data.voc_first_pixel = 0 unless the files are VOC's own" in str(faults[0])
        boxes, kinds, _ = _warnings(root, box, first_pixel=0)
        assert (boxes, kinds) == ([list(map(float, box))], [])
    with pytest.raises(ValueError, match=r"config\.data\.voc_first_pixel = 2 is not 0 or 1"):
        VocSource(root, BOTH, first_pixel=2)


def test_splits_of_a_folder(root, tmp_path):
    lists = root / "VOC2007/ImageSets/Main"
    assert find_voc_splits(root) == ["2007_test", "2007_trainval", "2012_trainval"]
    for name in ("train", "val", "dog_train", "dog_val"):
        (lists / f"{name}.txt").write_text("000007 1\n")
    assert find_voc_splits(root) == ["2007_test", "2007_trainval", "2012_trainval"]
    (lists / "trainval.txt").unlink()
    assert find_voc_splits(root) == ["2007_test", "2007_train", "2007_val", "2012_trainval"]
    assert find_voc_splits(tmp_path / "nowhere") == []


def test_one_voc_folder_alone(root):
    alone = root / "VOC2007"
    assert find_voc_splits(alone) == ["test", "trainval"]
    source = VocSource(alone, split_pairs(alone, "trainval"))
    assert (source.name, len(source.records)) == ("VOC2007/trainval", 2)
    assert split_pairs(alone, "test+trainval") == (("", "test"), ("", "trainval"))
    with pytest.raises(ValueError, match="not of the form"):
        split_pairs(root, "test")


def test_a_folder_for_each_split(tmp_path):
    for split in ("train", "valid"):
        (tmp_path / split).mkdir()
        (tmp_path / split / "a b.xml").write_text(_annotation(_object()))
        Image.new("RGB", (30, 20)).save(tmp_path / split / "a b.PNG")
    assert find_voc_splits(tmp_path) == ["train", "valid"]
    source = VocSource(tmp_path, split_pairs(tmp_path, "valid"))
    assert source.records[0].file_name == str(tmp_path / "valid/a b.PNG")


def test_links_out_of_the_folder(root, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside") / "a.jpg"
    path = root / "VOC2007/JPEGImages/000007.jpg"
    path.rename(outside)
    path.symlink_to(outside)
    with pytest.raises(DataError, match=r"000007\.jpg is a link .* config\.data\.allow_links = True"):
        VocSource(root, BOTH)
    assert len(VocSource(root, BOTH, images=ImageRules(allow_links=True)).records) == 3
    # Inside the data set's folder links are always accepted.
    path.unlink()
    outside.rename(root / "VOC2007/a.jpg")
    path.symlink_to("../a.jpg")
    assert len(VocSource(root, BOTH).records) == 3
