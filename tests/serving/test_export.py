"""The files of an export, and that they give the same detections without this package."""

import hashlib
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

from klbox_jax.evaluation.edge_calibration import fit_edge_calibration
from klbox_jax.files import read_json, write_json
from klbox_jax.postprocess.settings import PostprocessSettings
from klbox_jax.serving import exported_detector as loader
from klbox_jax.serving.export import OUTPUTS, export
from klbox_jax.serving.exported_detector import Detector, ModelError, resize
from klbox_jax.serving.predictor import load
from klbox_jax.train.edge_calibration_file import write_edge_calibration
from klbox_jax.train.job import Job
from klbox_jax.weights.safetensors_file import load_params, save_params
from tests.coco_folder import CATEGORIES
from tests.evaluation.test_results_calibration import drawn_results
from tests.programs import run_python
from tests.serving.thin_run import write_run
from tests.thin import coco_config

CANVASES = ((64, 96), (96, 64))
# The temperature of a calibration: factors on the stds of x1, y1, x2, y2.
TEMPERATURE = [1.0, 2.0, 0.5, 3.0]
# Runs the copied loader in a process that cannot import this package or its libraries.
ELSEWHERE = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("klbox_jax", "flax", "cv2", "orbax", "ml_collections", "absl", "safetensors", "PIL"):
            raise ImportError(f"{name} must not be imported")

sys.meta_path.insert(0, Refuse())
import numpy as np
from load_detector import Detector

images = np.load(sys.argv[1])
for number, found in enumerate(Detector(".").detect([images[name] for name in images.files])):
    np.savez(f"{sys.argv[2]}/{number}.npz", **found)
"""


@pytest.fixture(scope="module")
def job(module_path):
    fields = {"data.canvases": CANVASES, "export.batch_size": 2}
    config = coco_config("no data set is needed", "loss=kl,suppression=soft_gaussian", **fields)
    workdir = write_run(module_path / "run", config)
    settings = vars(PostprocessSettings(**config.postprocess))
    write_json(workdir.calibration_file(3), {"temperature": TEMPERATURE, "postprocess": settings})
    fitted = fit_edge_calibration(*drawn_results(0, num_images=5), data="pond")  # 15 boxes: too few for 95 %
    write_edge_calibration(workdir, 3, fitted, {"postprocess": settings})
    return Job(config=config, workdir=workdir)


@pytest.fixture(scope="module")
def predictor(job):
    return load(job.workdir.path)


@pytest.fixture(scope="module")
def exported(job, predictor):
    return export(job, predictor.settings)


@pytest.fixture(scope="module")
def images():
    """The wide canvas and the tall one, which an export for two has to run by itself; and one to be resized."""
    rng = np.random.default_rng(0)
    sizes = (*CANVASES, (128, 192))
    coarse = [rng.integers(0, 256, (h // 8, w // 8, 3)) for h, w in sizes]
    return [np.kron(image, np.ones((8, 8, 1))).astype(np.uint8) for image in coarse]


@pytest.fixture(scope="module")
def found(module_path, exported, images):
    """The results of the exported folder, moved elsewhere, in a process without this package."""
    elsewhere = shutil.copytree(exported, module_path / "elsewhere")
    results = module_path / "found"
    results.mkdir()
    np.savez(module_path / "images.npz", *images)
    arguments = (ELSEWHERE, module_path / "images.npz", results)
    run_python("-W", "error", "-c", *arguments, cwd=elsewhere)
    return [dict(np.load(results / f"{number}.npz")) for number in range(len(images))]


def test_what_an_export_writes(exported, job, predictor):
    assert exported == job.workdir.path / "export" / "3"
    programs = ["detector_64x96.stablehlo", "detector_96x64.stablehlo"]
    names = {*programs, "weights.safetensors", "model.json", "load_detector.py"}
    assert {path.name for path in exported.iterdir()} == names
    assert (exported / "load_detector.py").read_text() == pathlib.Path(loader.__file__).read_text()
    info = read_json(exported / "model.json")
    assert [each["file"] for each in info["programs"]] == programs
    assert info["classes"] == CATEGORIES
    assert info["box_stds_factors"] == TEMPERATURE
    assert info["outputs"] == {name: OUTPUTS[name] for name in OUTPUTS if name != "masks"}
    assert info["platforms"] == ["cpu", "cuda", "tpu"]
    assert info["jax"] == jax.__version__
    assert info["postprocess"]["suppression"] == "soft_gaussian"
    assert info["preprocessing"] == {"short_side": 80, "long_side": 96}
    params, metadata = load_params(exported / "weights.safetensors")
    jax.tree.map(np.testing.assert_array_equal, params, jax.device_get(predictor.params))
    assert metadata["step"] == "3"
    # Without the parameters in it, a program is small beside them in any real network.
    for name in programs:
        content = (exported / name).read_bytes()
        assert len(content) < 500_000
        assert jax.export.deserialize(bytearray(content)).platforms == ("cpu", "cuda", "tpu")


def test_elsewhere_it_finds_what_is_found_here(found, predictor, images):
    """Without this package, with other images in the batch, and with the loader's own resizing of the last one."""
    for one, image in zip(found, images, strict=True):
        wanted = predictor(image)
        assert len(wanted.scores) > 5
        assert set(one) == {"boxes", "scores", "classes", "box_stds", "names", "category_ids"}
        np.testing.assert_array_equal(one["classes"], wanted.classes)
        np.testing.assert_array_equal(one["names"], [CATEGORIES[index]["name"] for index in wanted.classes])
        ids = [CATEGORIES[index]["id"] for index in wanted.classes]
        np.testing.assert_array_equal(one["category_ids"], ids)
        for name in ("boxes", "scores", "box_stds"):
            np.testing.assert_allclose(one[name], getattr(wanted, name), rtol=1e-6, atol=1e-5, err_msg=name)


def test_intervals_of_the_loader(exported, found, predictor, images):
    detector = Detector(exported)
    for one, image in zip(found, images, strict=True):
        wanted = predictor(image)
        for coverage in (0.5, 0.9):
            intervals = wanted.intervals(coverage)
            for name, ends in detector.intervals(one, coverage).items():
                np.testing.assert_allclose(ends, getattr(intervals, name), rtol=1e-5, atol=1e-4, err_msg=name)
    tiny = {"boxes": np.zeros((1, 4)), "box_stds": np.full((1, 4), 1e-3)}
    multiple = predictor.edge_calibration.intervals(0.9).factors[0, 0]
    np.testing.assert_allclose(detector.intervals(tiny)["upper"], 0.1 * multiple)
    promises = {each["coverage"]: each["promise"] for each in read_json(exported / "model.json")["intervals"]}
    assert "at least 90 % of matched boxes" in promises[0.9]
    assert "needs 19 calibration labels and there are 15" in promises[0.95]
    for coverage in (0.95, 0.7):
        with pytest.raises(ValueError, match=r"for coverages \[0\.5, 0\.8, 0\.9\], not 0\.\d+; choose one"):
            detector.intervals(tiny, coverage)
    detector.info = detector.info | {"intervals": None}
    with pytest.raises(
        ValueError, match=r"for coverages \[\], .* calibrate on labelled images and export again"
    ):
        detector.intervals(tiny)


@pytest.mark.parametrize(
    ("height", "width"), [(60, 90), (90, 60), (100, 150), (33, 47), (400, 250), (79, 96), (20, 30), (5, 400)]
)
def test_the_loader_prepares_what_the_package_prepares(exported, predictor, height, width):
    """The same canvas, size and scale; every pixel within one grey level, for OpenCV rounds as it goes."""
    image = np.random.default_rng(height).integers(0, 256, (height, width, 3), np.uint8)
    canvas, mine = Detector(exported).prepare(image)
    theirs = predictor.prepare(image)
    assert theirs.images.shape == (1, *canvas, 3)
    np.testing.assert_array_equal(mine["image_size"], theirs.image_size[0])
    np.testing.assert_array_equal(mine["scale"], theirs.scale[0])
    difference = np.abs(mine["images"].astype(int) - theirs.images[0])
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.2


def test_resizing_by_hand():
    """Linear between centres, flat beyond them; means of areas where a side shrinks to less than a half."""
    row = np.array([[[0] * 3, [100] * 3, [50] * 3, [51] * 3]], np.uint8)
    assert resize(row, (1, 2))[0, :, 0].tolist() == [50, 50]  # 50 and 50.5, which rounds to even
    assert resize(row[:, :2], (1, 4))[0, :, 0].tolist() == [0, 25, 75, 100]
    # 3 pixels onto 2: the new centres lie at 0.25 and 1.75 of the old ones, 0.75 * 50 + 0.25 * 100 = 62.5, to even.
    assert resize(row[:, :3], (1, 2))[0, :, 0].tolist() == [25, 62]
    # 5 pixels onto 2: each new pixel has two old ones and half of the middle one, (0 + 100 + 50 / 2) / 2.5 = 50.
    wide = np.concatenate([row, np.full((1, 1, 3), 53, np.uint8)], axis=1)
    assert resize(wide, (1, 2))[0, :, 0].tolist() == [50, 52]
    assert resize(row, (1, 4)) is row


@pytest.fixture
def copy(tmp_path, exported):
    return shutil.copytree(exported, tmp_path / "copy")


def edit(folder, **fields):
    info = read_json(folder / "model.json")
    write_json(folder / "model.json", info | fields)


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def write_program(folder, content):
    """A program that is what was exported, as far as model.json can tell."""
    path = folder / "detector_64x96.stablehlo"
    path.write_bytes(content)
    digests = read_json(folder / "model.json")["sha256"] | {path.name: hashlib.sha256(content).hexdigest()}
    edit(folder, sha256=digests)


FAULTS = {
    "an unfinished export": (
        lambda folder: (folder / "model.json").unlink(),
        r"model\.json cannot be read \(No such file",
    ),
    "another format": (
        lambda folder: edit(folder, format="x"),
        r"model\.json does not describe an exported detector",
    ),
    "no object": (
        lambda folder: (folder / "model.json").write_text("[]"),
        r"model\.json does not describe an",
    ),
    "no JSON": (lambda folder: cut(folder / "model.json"), r"model\.json is not JSON"),
    "another version": (
        lambda folder: edit(folder, format_version=2),
        r"is of format version 2, and this loader reads version 1; use the load_detector\.py of that folder$",
    ),
    "a field less": (lambda folder: edit(folder, programs=[{}]), r"is incomplete \(KeyError\('canvas'\)\)"),
    "a later jax": (
        lambda folder: edit(folder, calling_convention_version=99, jax="9.9"),
        r"have calling convention 99, and jax [\d.]+ reads \d+ to \d+; install jax 9\.9, or export it again$",
    ),
    "another platform": (
        lambda folder: edit(folder, platforms=["tpu", "cuda"]),
        r"programs are for tpu, cuda, not for cpu; set JAX_PLATFORMS",
    ),
    "weights cut short": (
        lambda folder: cut(folder / "weights.safetensors"),
        r"weights\.safetensors is not the file that was exported",
    ),
    "no weights": (
        lambda folder: (folder / "weights.safetensors").unlink(),
        r"weights\.safetensors cannot be read \(No such file",
    ),
    "a program cut short": (
        lambda folder: cut(folder / "detector_64x96.stablehlo"),
        r"detector_64x96\.stablehlo is not the file that was exported",
    ),
    "a program of another kind": (
        lambda folder: write_program(folder, b"not a program"),
        r"detector_64x96\.stablehlo cannot be read by jax [\d.]+ \(.*\); it was written by jax",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_reported_in_one_line(copy, images, fault):
    damage, message = FAULTS[fault]
    damage(copy)
    with pytest.raises(ModelError, match=message) as error:
        Detector(copy)(images[0])
    assert "\n" not in str(error.value)
    assert str(copy) in str(error.value)


@pytest.mark.parametrize(
    "image", [np.zeros((4, 4, 3)), np.zeros((4, 4), np.uint8), np.zeros((0, 4, 3), np.uint8)]
)
def test_what_is_no_image_is_refused(exported, image):
    with pytest.raises(ValueError, match=r"^an image must be a uint8 array"):
        Detector(exported).prepare(image)


def test_the_loader_alone_imports_little():
    code = (
        "import runpy, sys\n"
        f"runpy.run_path({loader.__file__!r})\n"
        "print({name.split('.')[0] for name in sys.modules} & {'klbox_jax', 'flax', 'cv2', 'orbax', 'safetensors'})"
    )
    assert run_python("-c", code)[0] == "set()\n"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"platforms": ("cpu", "abacus")},
            r"config\.export\.platforms = \('cpu', 'abacus'\): choose one or more of cpu, cuda",
        ),
        ({"platforms": ()}, r"config\.export\.platforms = \(\)"),
        ({"batch_size": 0}, r"config\.export\.batch_size = 0: must be positive"),
        ({"canvas": (64,)}, r"config\.export\.canvas = \(64,\): give height and width"),
        ({"weights_dtype": "int8"}, r"config\.export\.weights_dtype = 'int8': choose float32 or float16"),
        ({"output": __file__}, r"config\.export\.output = .* cannot be used \(File exists\)"),
    ],
)
def test_a_wrong_field_is_named(job, predictor, fields, message):
    fields = {"data.canvases": CANVASES} | {f"export.{name}": value for name, value in fields.items()}
    config = coco_config("", "loss=kl", **fields)
    with pytest.raises(ValueError, match=message):
        export(Job(config=config, workdir=job.workdir), predictor.settings)


def test_the_config_of_another_detector_is_refused(job, predictor):
    config = coco_config("", "loss=kl", **{"data.canvases": CANVASES, "model.box_head.features": 8})
    with pytest.raises(ValueError, match=r"model\.box_head\.features is 8 instead of 32"):
        export(Job(config=config, workdir=job.workdir), predictor.settings)


def test_the_weights_are_read_by_definition(tmp_path, exported):
    """The loader's ten lines against the library."""
    values = np.linspace(-2, 2, 6, dtype=np.float32).reshape(2, 3)
    save_params(tmp_path / "half", {"a": {"b": values}}, metadata={"step": "3"}, dtype="float16")
    half = loader._read_safetensors((tmp_path / "half").read_bytes(), tmp_path)
    assert list(half) == ["a/b"]
    np.testing.assert_array_equal(half["a/b"], values.astype(np.float16).astype(np.float32), strict=True)

    content = (exported / "weights.safetensors").read_bytes()
    tensors = loader._read_safetensors(content, exported)
    params, _ = load_params(exported / "weights.safetensors")
    wanted = {
        "/".join(str(key.key) for key in path): value
        for path, value in jax.tree_util.tree_leaves_with_path(params)
    }
    assert tensors.keys() == wanted.keys()
    for name, value in tensors.items():
        np.testing.assert_array_equal(value, wanted[name])
    header = json.dumps({"a": {"dtype": "I64", "shape": [1], "data_offsets": [0, 8]}}).encode()
    for bad in (b"", b"\1", len(header).to_bytes(8, "little") + header + bytes(8), content[:-1]):
        with pytest.raises(ModelError, match="is not a safetensors file of float numbers"):
            loader._read_safetensors(bad, exported)
