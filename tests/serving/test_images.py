"""One photograph in every form in which a program has it."""

import io
import types

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from klbox_jax.data.source import DataError
from klbox_jax.serving.images import read_image

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 9, 3), np.uint8)


def encoded(pixels=PIXELS, suffix="png", **options):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, suffix, **options)
    return buffer.getvalue()


class Tensor:
    """As torch has it: no array while it is on an accelerator or has a gradient."""

    def __init__(self, array, state=("gradient", "accelerator")):
        self.array, self.state = array, state

    def detach(self):
        return Tensor(self.array, tuple(s for s in self.state if s != "gradient"))

    def cpu(self):
        return Tensor(self.array, tuple(s for s in self.state if s != "accelerator"))

    def __array__(self, dtype=None, copy=None):
        assert not self.state
        return self.array


@pytest.mark.parametrize(
    "make",
    [
        lambda path: PIXELS,
        lambda path: jnp.asarray(PIXELS),
        lambda path: Tensor(PIXELS),
        lambda path: PIXELS[::-1][::-1],
        lambda path: PIXELS / 255.0,
        lambda path: (PIXELS / 255.0).astype(np.float32),
        lambda path: jnp.asarray(PIXELS) / 255,
        lambda path: Image.fromarray(PIXELS),
        lambda path: path,
        lambda path: str(path),
        lambda path: path.read_bytes(),
        lambda path: memoryview(path.read_bytes()),
        lambda path: io.BytesIO(path.read_bytes()),
    ],
)
def test_all_forms_are_one(make, tmp_path):
    path = tmp_path / "photo.png"
    path.write_bytes(encoded())
    found = read_image(make(path))
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, PIXELS)


def test_an_open_file(tmp_path):
    path = tmp_path / "photo.png"
    path.write_bytes(encoded())
    with path.open("rb") as file:
        np.testing.assert_array_equal(read_image(file), PIXELS)
        with pytest.raises(DataError, match=r"photo\.png has no bytes left to read"):
            read_image(file)


def test_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "photo.png").write_bytes(encoded())
    np.testing.assert_array_equal(read_image("~/photo.png"), PIXELS)


def test_a_file_in_memory_is_turned_as_a_file_on_disk(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "turned.png"
    path.write_bytes(encoded(exif=exif))
    on_disk = read_image(path)
    assert on_disk.shape == (9, 6, 3)
    np.testing.assert_array_equal(read_image(path.read_bytes()), on_disk)


def test_grey_is_repeated_and_opacity_is_over_black():
    grey = PIXELS[..., 0]
    for array in (grey, grey[..., None], grey / 255.0):
        np.testing.assert_array_equal(read_image(array), np.repeat(grey[..., None], 3, axis=2))
    opacity = np.full((6, 9, 1), 255, np.uint8)
    opacity[0], opacity[1] = 0, 128
    found = read_image(np.concatenate([PIXELS, opacity], axis=2))
    np.testing.assert_array_equal(found[2:], PIXELS[2:])
    assert not found[0].any()
    np.testing.assert_allclose(found[1], PIXELS[1] * (128 / 255), atol=1)
    np.testing.assert_array_equal(
        found, read_image(Image.fromarray(np.concatenate([PIXELS, opacity], axis=2)))
    )


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((2, 8, 8, 3), np.uint8), r"uint8 \[2, 8, 8, 3\] is a batch; give list\(array\)"),
        (
            np.zeros((3, 8, 8), np.uint8),
            r"not uint8 \[3, 8, 8\]; move its channels to the end, as in array\.transpose",
        ),
        (np.zeros((8, 8, 2), np.uint8), r"with 1, 3 or 4 channels, not uint8 \[8, 8, 2\]\.$"),
        (np.zeros(8, np.uint8), r"must be \[height, width\], or "),
        (np.zeros((0, 8, 3), np.uint8), r"uint8 \[0, 8, 3\] has no pixels"),
        (
            np.zeros((8, 8, 3), np.uint16),
            r"must be uint8, or float within 0 and 1, not uint16 \[8, 8, 3\]; convert",
        ),
        (np.zeros((8, 8, 3), bool), r"not bool \[8, 8, 3\]"),
        (np.full((8, 8, 3), 255.0), r"within 0 and 1, not float64 \[8, 8, 3\] from 255 to 255"),
        (np.full((8, 8, 3), -0.5, np.float32), r"from -0\.5 to -0\.5; give uint8, or undo the normalization"),
        (np.full((8, 8, 3), np.nan), r"from nan to nan"),
        ({"boxes": 1}, r"^An image is a path, .*; got dict\.$"),
        (None, "got NoneType"),
        (3.5, "got float"),
        (np.float32(3), "got float32"),
        (b"", "image bytes|the bytes"),
        (b"no image", "the bytes is not an image of a known format"),
        (io.BytesIO(), "has no bytes left to read"),
        (io.StringIO("text"), "is open as text; open it for reading bytes"),
        ("nowhere/photo.jpg", r"^nowhere/photo\.jpg does not exist; check the path"),
        ("gs://bucket/photo.jpg", "is not a path of this machine"),
        (".", r"^\. is a folder; give a list of its images"),
    ],
)
def test_what_is_no_image_is_one_sentence(image, message):
    with pytest.raises(ValueError, match=message) as error:
        read_image(image)
    assert "annotation" not in str(error.value)


def test_a_pillow_image_of_more_bits():
    with pytest.raises(DataError, match=r"mode 'I;16' has more than 8 bits; give the path"):
        read_image(Image.fromarray(np.zeros((8, 8), np.uint16)))


def test_torch_if_it_is_there():
    torch = pytest.importorskip("torch")
    assert isinstance(torch, types.ModuleType)
    np.testing.assert_array_equal(read_image(torch.from_numpy(PIXELS)), PIXELS)
