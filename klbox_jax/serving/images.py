"""Images in every form in which a program has them, as RGB pixels."""

import os
from typing import Any

import numpy as np
from jaxtyping import UInt8
from numpy import ndarray
from PIL import Image, ImageOps

from klbox_jax.config.paths import local_path
from klbox_jax.data.image import decode_image, upright_size
from klbox_jax.data.source import DataError

_FORMS = "a path, the bytes of a file, an open file, a Pillow image or an array [height, width, 3] of uint8"


def read_image(image: Any) -> UInt8[ndarray, "h w 3"]:
    """Returns the RGB pixels of an image after its EXIF rotation.

    Args:
        image: a path; the bytes of an image file, or a file that is open for reading bytes; a Pillow image of 8 bits;
            or an array of NumPy, jax or torch, with the channels last. The rules for arrays:
            uint8 in the order red, green, blue is used as it is;
            a grey image, [height, width] or [height, width, 1], is repeated in all three channels;
            the fourth channel of RGBA is an opacity over black, as for files;
            a float array must be within 0 and 1, and is multiplied by 255 and rounded.

    Raises:
        DataError: the file is missing, truncated, not an image or too large; a Pillow image has more than 8 bits; or
            an array is something else, for which the message says what to do. A ValueError.
    """
    if isinstance(image, str | os.PathLike):
        return _read_file(image)
    if isinstance(image, bytes | bytearray | memoryview):
        return _decode(bytes(image), "the bytes")
    if isinstance(image, Image.Image):
        return _from_pillow(image)
    if hasattr(image, "read"):
        content, name = image.read(), str(getattr(image, "name", "the file"))
        if not isinstance(content, bytes):
            raise DataError(f"{name} is open as text; open it for reading bytes, as in open(path, 'rb').")
        if not content:
            raise DataError(
                f"{name} has no bytes left to read; open it again, or go to its start with seek(0)."
            )
        return _decode(content, name)
    if hasattr(image, "__array__") and not np.isscalar(image):
        return _from_array(_to_numpy(image))
    raise DataError(f"An image is {_FORMS}; got {type(image).__name__}.")


def _read_file(path: str | os.PathLike) -> UInt8[ndarray, "h w 3"]:
    file = local_path(path, "the image")
    if os.path.isdir(file):
        raise DataError(
            f"{file} is a folder; give a list of its images, such as sorted(Path(folder).glob('*.jpg')), or run "
            "klbox predict."
        )
    if not os.path.exists(file):
        raise DataError(f"{file} does not exist; check the path. Relative paths start at {os.getcwd()}.")
    height, width = upright_size(file)
    return decode_image(file, height=height, width=width)


def _decode(content: bytes, name: str) -> UInt8[ndarray, "h w 3"]:
    height, width = upright_size(content, name=name)
    return decode_image(content, height=height, width=width, name=name)


def _from_pillow(image: Image.Image) -> UInt8[ndarray, "h w 3"]:
    if image.mode.startswith(("I", "F")):
        raise DataError(
            f"A Pillow image of mode {image.mode!r} has more than 8 bits; give the path of its file."
        )
    image = ImageOps.exif_transpose(image)
    if image.has_transparency_data:
        image = _over_black(image.convert("RGBA"))
    return np.array(image.convert("RGB"))


def _over_black(image: Image.Image) -> Image.Image:
    return Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)


def _to_numpy(array: Any) -> ndarray:
    # A tensor of torch that is on an accelerator, or that has a gradient, is no array yet.
    for method in ("detach", "cpu"):
        if hasattr(array, method):
            array = getattr(array, method)()
    return np.asarray(array)


def _from_array(array: ndarray) -> UInt8[ndarray, "h w 3"]:
    shape = f"{array.dtype} {list(array.shape)}"
    if array.ndim == 4:
        raise DataError(f"An array of {shape} is a batch; give list(array), a list of images.")
    if array.size == 0:
        raise DataError(f"An array of {shape} has no pixels.")
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4):
        is_first = array.ndim == 3 and array.shape[0] in (1, 3, 4)
        remedy = "; move its channels to the end, as in array.transpose(1, 2, 0) or tensor.permute(1, 2, 0)"
        raise DataError(
            f"An array must be [height, width], or [height, width, channels] with 1, 3 or 4 channels, not {shape}"
            f"{remedy if is_first else ''}."
        )
    array = _to_bytes(array, shape)
    if array.shape[2] == 1:
        return np.repeat(array, 3, axis=2)
    if array.shape[2] == 4:
        return np.array(_over_black(Image.fromarray(np.ascontiguousarray(array))).convert("RGB"))
    return array


def _to_bytes(array: ndarray, shape: str) -> UInt8[ndarray, "h w c"]:
    if array.dtype == np.uint8:
        return array
    # bfloat16 of jax is no kind of float to NumPy.
    if array.dtype.kind == "f" or array.dtype.name == "bfloat16":
        array = array.astype(np.float32)
        low, high = float(array.min()), float(array.max())
        if not 0.0 <= low <= high <= 1.0:
            raise DataError(
                f"A float array must be within 0 and 1, not {shape} from {low:g} to {high:g}; give uint8, "
                "or undo the normalization of its mean and standard deviation."
            )
        return np.rint(array * 255.0).astype(np.uint8)
    raise DataError(f"An array must be uint8, or float within 0 and 1, not {shape}; convert it to uint8.")
