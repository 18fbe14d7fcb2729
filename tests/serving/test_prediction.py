"""What a program does with the objects of an image: select, name, draw, write and convert them."""

import dataclasses
import io
import sys
import types

import numpy as np
import pytest
from PIL import Image

import klbox_jax
from klbox_jax.files import read_json
from klbox_jax.serving.prediction import Prediction
from tests.programs import run_python

PIXELS = np.random.default_rng(0).integers(0, 256, (60, 90, 3), np.uint8)


def prediction_of(**fields):
    return dataclasses.replace(
        Prediction(
            boxes=np.array([[4, 5, 30, 40], [20, 10, 60, 50], [1, 2, 9, 9], [50, 5, 80, 44]], np.float32),
            scores=np.array([0.9, 0.7, 0.5, 0.2], np.float32),
            classes=np.array([1, 0, 1, 1]),
            class_names=("fish", "ray"),
            category_ids=(3, 7),
            box_stds=np.arange(16, dtype=np.float32).reshape(4, 4) / 4 + 0.5,
            masks=None,
            image_size=(60, 90),
            source=PIXELS,
        ),
        **fields,
    )


def test_a_name_for_each_object():
    found = prediction_of()
    assert found.names == ["ray", "fish", "ray", "ray"]
    assert len(found) == len(found.names) == len(found.boxes) == 4
    assert list(zip(found.names, found.scores.round(1).tolist(), strict=True))[1] == (
        "fish",
        pytest.approx(0.7),
    )


def test_the_text_of_a_prediction_is_short():
    assert (
        repr(prediction_of()) == "Prediction(4 objects in 90 x 60 pixels: ray 0.90, fish 0.70, ray 0.50, ...)"
    )
    assert repr(prediction_of()[1]) == "Prediction(1 object in 90 x 60 pixels: fish 0.70)"
    assert repr(prediction_of()[:0]) == "Prediction(0 objects in 90 x 60 pixels)"


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (0, [0]),
        (-1, [3]),
        (np.int64(2), [2]),
        (slice(1, 3), [1, 2]),
        (slice(None, None, -1), [3, 2, 1, 0]),
        ([True, False, True, False], [0, 2]),
        (np.array([0.9, 0.7, 0.5, 0.2]) > 0.6, [0, 1]),
        ([3, 1], [3, 1]),
        ([], []),
        (np.zeros(4, bool), []),
    ],
)
def test_objects_are_selected(rows, expected):
    found, chosen = prediction_of(masks=np.arange(16, dtype=np.float32).reshape(4, 2, 2)), None
    chosen = found[rows]
    assert len(chosen) == len(expected)
    for name in ("boxes", "scores", "classes", "box_stds", "masks"):
        np.testing.assert_array_equal(getattr(chosen, name), getattr(found, name)[expected])
    assert chosen.names == [found.names[row] for row in expected]
    assert (chosen.class_names, chosen.image_size) == (found.class_names, found.image_size)


def test_a_wrong_index_is_refused():
    found = prediction_of()
    for rows in (4, [0, 9], [True, False]):
        with pytest.raises(IndexError):
            found[rows]
    for rows in ("fish", 1.5, [[0, 1]], None, True):
        with pytest.raises(TypeError, match="by an index, a slice or a mask"):
            found[rows]
    assert [one.names for one in found] == [["ray"], ["fish"], ["ray"], ["ray"]]


def test_the_objects_above_a_score():
    found = prediction_of(box_stds=None)
    assert len(found.above(0.5)) == 3
    assert found.above(0.5).box_stds is None
    assert len(found.above(2)) == 0


def test_a_picture(tmp_path):
    found = prediction_of()
    picture = found.above(0.6).draw()
    assert isinstance(picture, Image.Image)
    # Small images are enlarged.
    assert picture.size == (90 * 7, 60 * 7)
    plain = np.asarray(found[:0].draw())
    changed = (np.asarray(picture) != plain).any(axis=2)
    assert changed[20 * 7 : 25 * 7, 28 * 7 : 31 * 7].any()  # at the right edge of the first box
    assert not changed[55 * 7 :, 85 * 7 :].any()
    path = tmp_path / "photo.png"
    Image.fromarray(PIXELS).save(path)
    file = io.BytesIO(path.read_bytes())
    file.read()  # as the detector leaves it
    for source in (path, str(path), Image.fromarray(PIXELS), file, path.read_bytes()):
        np.testing.assert_array_equal(
            np.asarray(prediction_of(source=source)[:2].draw()), np.asarray(picture)
        )
        np.testing.assert_array_equal(
            np.asarray(prediction_of(source=None)[:2].draw(source)), np.asarray(picture)
        )
    with pytest.raises(ValueError, match=r"does not know its image; give it: found\.draw\(image\)"):
        prediction_of(source=None).draw()
    with pytest.raises(
        ValueError, match="is 90 x 50 pixels, but the objects are those of an image of 90 x 60"
    ):
        found.draw(PIXELS[:50])


def test_files(tmp_path, monkeypatch):
    found = prediction_of()
    monkeypatch.setenv("HOME", str(tmp_path))
    found.save("~/found.jpg")
    found.save(tmp_path / "found.PNG")
    assert (tmp_path / "found.jpg").read_bytes().startswith(b"\xff\xd8")
    assert (tmp_path / "found.PNG").read_bytes().startswith(b"\x89PNG")
    found.save(tmp_path / "found.json")
    assert [entry["category"] for entry in read_json(tmp_path / "found.json")] == found.names
    assert found.to_coco()[0]["image_id"] == 1
    with pytest.raises(ValueError, match=r"found\.txt ends in no known suffix; use \.jpg or \.png"):
        found.save(tmp_path / "found.txt")
    with pytest.raises(ValueError, match="nowhere is not a folder; create it"):
        found.save(tmp_path / "nowhere" / "found.jpg")


def test_a_table(monkeypatch):
    stand_in = types.ModuleType("pandas")
    stand_in.DataFrame = dict
    monkeypatch.setitem(sys.modules, "pandas", stand_in)
    found = prediction_of()
    table = found.to_pandas()
    edges = [f"{kind}{edge}" for kind in ("", "std_") for edge in ("x1", "y1", "x2", "y2")]
    assert list(table) == ["name", "score", *edges, "class_index", "category_id"]
    np.testing.assert_array_equal(table["x2"], [30, 60, 9, 80])
    np.testing.assert_array_equal(table["std_y1"], found.box_stds[:, 1])
    assert table["category_id"] == [7, 3, 7, 7]
    assert "std_x1" not in prediction_of(box_stds=None).to_pandas()
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match="pip install pandas"):
        found.to_pandas()


def test_the_package_exports_its_names_lazily():
    code = """
        import sys
        import klbox_jax
        print(sorted({"jax", "numpy", "flax", "PIL", "absl"} & set(sys.modules)))
        print("load" in dir(klbox_jax), "kl_loss" in klbox_jax.__all__)
        from klbox_jax import load_config
        print(load_config("scenes").seed)
        """
    assert run_python("-c", code)[0].splitlines() == ["[]", "True True", "0"]
    for name in klbox_jax.__all__:
        assert callable(getattr(klbox_jax, name))
    with pytest.raises(AttributeError, match="has no attribute 'laod'; it has "):
        _ = klbox_jax.laod
