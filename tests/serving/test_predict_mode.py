import html
import logging
import pathlib
import re
import signal

import numpy as np
import pytest
from absl import logging as absl_logging
from PIL import Image
from pycocotools.coco import COCO

from klbox_jax.errors import CheckpointError, Preempted
from klbox_jax.files import read_json
from klbox_jax.main import run
from klbox_jax.report.pictures import shrink
from klbox_jax.serving import predict_mode
from klbox_jax.serving.gallery import Entry, render
from klbox_jax.serving.predict_mode import find_images
from klbox_jax.serving.predictor import load
from klbox_jax.train.job import Job
from klbox_jax.train.preemption import Preemption
from tests.serving.thin_run import TWO_CANVASES, write_run
from tests.thin import coco_config

# Random parameters give low scores; with this threshold some objects are drawn and counted.
FIELDS = TWO_CANVASES | {"predict.score_threshold": 0.34}


@pytest.fixture(scope="module")
def workdir(module_path):
    # No data set is needed.
    return write_run(module_path / "run", coco_config("", **FIELDS))


def config(photographs, arg=None, **fields):
    return coco_config("", arg, **FIELDS, **{"predict.input": str(photographs)} | fields)


@pytest.fixture(scope="module")
def output(workdir, photographs):
    messages = []
    handler = logging.Handler(logging.INFO)
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = absl_logging.get_absl_logger()
    logger.addHandler(handler)
    verbosity = absl_logging.get_verbosity()
    absl_logging.set_verbosity(absl_logging.INFO)
    try:
        assert run(config(photographs[0]), str(workdir.path), "predict") == {}
    finally:
        absl_logging.set_verbosity(verbosity)
        logger.removeHandler(handler)
    return workdir.path / "predict", messages


@pytest.fixture
def loaded(workdir, monkeypatch):
    """One predictor for all calls, so that it is compiled once."""
    predictor = load(workdir.path)
    monkeypatch.setattr(predict_mode, "load", lambda path, **_: predictor)
    return predictor


def test_a_folder_of_photographs(workdir, output, photographs):
    path, messages = output
    content = read_json(path / "detections.json")
    names = sorted(photographs[1] | {"damaged.jpg": None})
    shown = [image["file_name"] for image in content["images"]]
    assert shown == [name for name in names if name != "damaged.jpg"]
    assert [entry["file_name"] for entry in content["failed"]] == ["damaged.jpg"]
    assert content["failed"][0]["reason"].startswith("cannot be decoded")
    assert [m for m in messages if m.startswith("damaged.jpg is left out: ")]
    assert [m for m in messages if re.search(r"6 images, 1 failed; network \d+ % of [\d.]+ s", m)]
    assert content["categories"] == [{"id": 3, "name": "fish"}, {"id": 7, "name": "ray"}]
    predictor = load(workdir.path)
    assert content["info"]["step"] == predictor.step == 3
    for image in content["images"]:
        pixels = photographs[1][image["file_name"]]
        assert (image["height"], image["width"]) == pixels.shape[:2]
        found = [entry for entry in content["annotations"] if entry["image_id"] == image["id"]]
        assert found
        for entry in found:
            assert len(entry["bbox_std"]) == 4
            assert entry["area"] == pytest.approx(entry["bbox"][2] * entry["bbox"][3])
            assert entry["category"] == {3: "fish", 7: "ray"}[entry["category_id"]]
    # It is a data set, too.
    dataset = COCO(str(path / "detections.json"))
    assert len(dataset.getAnnIds()) == len(content["annotations"])


def test_pictures_and_their_page(output, photographs):
    path, _ = output
    images = read_json(path / "detections.json")["images"]
    page = (path / "index.html").read_text()
    assert sorted(file.name for file in (path / "pictures").iterdir()) == [
        f"{image['id']:05d}.jpg" for image in images
    ]
    drawn = 0
    for image in images:
        link = f"pictures/{image['id']:05d}.jpg"
        assert f'<a href="{link}"><img src="{link}"' in page
        assert html.escape(image["file_name"]) in page
        with Image.open(path / link) as picture:
            scale = picture.width / image["width"]
            assert picture.size == (image["width"] * scale, image["height"] * scale)
            plain = Image.fromarray(photographs[1][image["file_name"]]).resize(
                picture.size, Image.Resampling.BICUBIC
            )
            drawn += (np.abs(np.asarray(picture).astype(int) - np.asarray(plain)) > 60).any()
    assert drawn > 0
    assert "<b>" not in page
    assert '<li><span class="name">damaged.jpg</span>: ' in page
    assert "1 file left out" in page


def test_as_many_pictures_as_asked_for(workdir, loaded, photographs, tmp_path):
    fields = {"predict.output": str(tmp_path / "few"), "predict.max_pictures": 1}
    glob = str(photographs[0] / "*r*.png")  # four_by_three, grey, square and turned
    run(config(glob, **fields), str(workdir.path), "predict")
    assert [file.name for file in (tmp_path / "few" / "pictures").iterdir()] == ["00001.jpg"]
    assert len(read_json(tmp_path / "few" / "detections.json")["images"]) == 4
    assert (tmp_path / "few" / "index.html").read_text().count("<img") == 1
    # All of two canvases, however many images.
    assert loaded._step.num_traces == 2


def test_images_that_cannot_be_read(workdir, loaded, photographs, tmp_path):
    fields = {"predict.output": str(tmp_path / "none")}
    with pytest.raises(
        ValueError, match=r"none of the 1 images can be read; damaged.jpg: .*cannot be decoded"
    ):
        run(config(photographs[0] / "damaged.jpg", **fields), str(workdir.path), "predict")
    assert len(read_json(tmp_path / "none" / "detections.json")["failed"]) == 1
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"config.predict.output = .*file' cannot be written"):
        run(
            config(photographs[0], **{"predict.output": str(tmp_path / "file")}),
            str(workdir.path),
            "predict",
        )


def test_what_was_found_before_a_signal_is_kept(workdir, loaded, photographs, tmp_path):
    class AfterTwo(Preemption):
        asked = 0

        def signal(self):
            self.asked += 1
            return signal.SIGTERM if self.asked > 2 else 0

    output = tmp_path / "stopped"
    job = Job(config=config(photographs[0], **{"predict.output": str(output)}), workdir=workdir)
    with pytest.raises(Preempted, match=r"SIGTERM: 2 of 7 images are in .*stopped"):
        predict_mode.predict(job, preemption=AfterTwo())
    content = read_json(output / "detections.json")
    assert len(content["images"]) + len(content["failed"]) == 2
    assert (output / "index.html").exists()


def test_what_there_is_to_predict_on(photographs, tmp_path, monkeypatch):
    folder, images = photographs
    assert [path.name for path in find_images(str(folder))] == sorted([*images, "damaged.jpg"])
    assert find_images(str(folder / "grey.png")) == {folder / "grey.png": "grey.png"}
    assert [path.name for path in find_images(str(folder / "[gp]*"))] == ["grey.png", "portrait.PNG"]
    (tmp_path / "[brackets]").mkdir()
    with pytest.raises(
        ValueError, match=r"there is no image in the folder .*brackets.; names of images end in"
    ):
        find_images(str(tmp_path / "[brackets]"))
    with pytest.raises(ValueError, match=r"there is no image in the matches of .*\*\.jpg; names"):
        find_images(str(tmp_path / "*.jpg"))
    with pytest.raises(ValueError, match="there is no such file or folder"):
        find_images(str(tmp_path / "nowhere"))
    with pytest.raises(
        ValueError, match=r"no images are given; name an image, a folder .*config\.predict\.input"
    ):
        find_images("")
    monkeypatch.setenv("HOME", str(folder))
    assert find_images("~/grey.png") == {pathlib.Path(folder / "grey.png"): "grey.png"}


def test_nothing_is_passed_over_in_silence(tmp_path, caplog):
    """Sub-folders, every suffix of the formats that are read, any depth of a glob; the log counts the rest."""
    names = ["a.jpg", "b.JFIF", "deep/c.jpe", "deep/er/d.PNG", "deep/er/e.jpg"]
    for name in [*names, "notes.txt", "deep/raw.cr2", "deep/er/README", ".hidden.jpg", ".cache/f.jpg"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    with caplog.at_level(logging.INFO, "absl"):
        assert list(find_images(str(tmp_path)).values()) == names
    (message,) = caplog.messages
    assert re.search(
        r": 5 images; passed over 3 other files \(1 of no suffix, 1 of \.cr2, 1 of \.txt\)", message
    )
    assert list(find_images(f"{tmp_path}/**/*.jpg").values()) == [
        f"{tmp_path}/{n}" for n in ("a.jpg", "deep/er/e.jpg")
    ]
    # One image is found once, however often it is given; its first name is kept.
    both = find_images(str(tmp_path / "deep"), str(tmp_path), str(tmp_path / "a.jpg"))
    assert list(both.values()) == ["c.jpe", "er/d.PNG", "er/e.jpg", "a.jpg", "b.JFIF"]
    with pytest.raises(ValueError, match="there is no such file or folder"):
        find_images(str(tmp_path), str(tmp_path / "nowhere"))


def test_a_config_of_another_detector(workdir, photographs):
    image = photographs[0] / "grey.png"
    with pytest.raises(
        ValueError, match=r"model\.box_loss is 'smooth_l1' instead of 'kl'; give the --config"
    ):
        run(config(image, "loss=smooth_l1"), str(workdir.path), "predict")
    other = config(image, **{"data.long_side": 90})
    with pytest.raises(ValueError, match=r": data\.long_side is 90 instead of 96; give the --config"):
        run(other, str(workdir.path), "predict")


def test_folders_without_a_detector(workdir, photographs, tmp_path):
    with pytest.raises(ValueError, match=r"it has no config\.json; train first"):
        run(config(photographs[0]), str(tmp_path / "nowhere"), "predict")
    assert not (tmp_path / "nowhere").exists()
    (tmp_path / "untrained").mkdir()
    for name in ("config.json", "classes.json"):
        (tmp_path / "untrained" / name).write_bytes((workdir.path / name).read_bytes())
    with pytest.raises(CheckpointError, match="has no checkpoint; train first"):
        run(config(photographs[0]), str(tmp_path / "untrained"), "predict")


def test_large_images_are_shrunk_to_be_drawn_on():
    # Columns of 0 and 200 in turns: each new pixel is the mean of two.
    image = np.zeros((40, 100, 3), np.uint8)
    image[:, ::2] = 200
    small = shrink(image, long_side=50)
    assert small.shape == (20, 50, 3)
    assert (small == 100).all()
    assert shrink(image, long_side=100) is image


def test_a_page_of_names_that_are_no_text():
    entries = [Entry("\udcff&.jpg", "pictures/00001.jpg", {"<i>": 2}), Entry("plain.jpg", None, {})]
    page = render(entries, title="A & B", failed={"<x>": "it's bad"}, score_threshold=0.3)
    assert page.encode("utf-8")
    assert "?&amp;.jpg" in page
    assert "&lt;i&gt; 2" in page
    assert "A &amp; B" in page
    assert "&lt;x&gt;" in page
    assert "nothing found" in page
    assert "2 images, 2 objects with a score of 0.3 or more" in page
    assert page.count("<img") == 1
