"""Decodes image files, one way for the whole package.

Every file becomes 8-bit RGB of exactly the size its annotation states:

    grey, palette   expanded to RGB
    transparency    composed over black, the colour of the padding around an image
    CMYK            converted by Pillow (Adobe's inverted CMYK JPEGs included)
    16 bits         the high byte of each sample: scaled, not clipped
    animations      the first frame

Photographs, that is RGB JPEGs, are decoded by simplejpeg: it takes 60 % of Pillow's time, for the same bits. What
it refuses is Pillow's to judge, which has also looked at every header before.

The EXIF orientation is applied where the turned size is the annotated one (as viewers and annotation tools
show the photograph). Where only the stored size agrees, the annotation was drawn without it and the pixels
are left as they lie. All functions may be called from several threads.
"""

import contextlib
import io
import os
from collections.abc import Iterator

import numpy as np
import simplejpeg
from jaxtyping import UInt8
from numpy import ndarray
from PIL import Image, UnidentifiedImageError

from klbox_jax.data.source import DataError, Fault

# Pillow also knows formats that run other programs (EPS); a data set has no need of them.
_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM")

# The bytes a complete file ends with. Entropy-coded JPEG data never holds its end marker by chance.
_END_MARKERS = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND"}
_TAIL_BYTES = 4096

# Photographs have about ten. Each pass over the picture costs the decoder the whole of it, and the file next to
# nothing. A small picture may have more than one at the limit of size.
_MAX_JPEG_SCANS = 500
_SCANS_AT_THE_LIMIT = 20
_JPEG_SCAN = b"\xff\xda"

# Room for a camera's notes, profile and preview in front of the pixels.
_MAX_JPEG_HEADER = 2**22

_ORIENTATION_TAG = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode_image(
    path_or_bytes: str | os.PathLike | bytes, *, height: int, width: int, name: str = "image bytes"
) -> UInt8[ndarray, "h w 3"]:
    """Returns the RGB pixels of an encoded image.

    Args:
        path_or_bytes: the file, or its contents.
        height: annotated height in pixels.
        width: annotated width in pixels.
        name: what messages call the image when its contents are given.

    Raises:
        DataError: the file is missing, truncated, no image, absurdly large, or of another size.
    """
    with _opened(path_or_bytes, name) as image:
        named = _name(path_or_bytes, name)
        _check_size(image, named, height=height, width=width)
        _check_scans(image, named)
        pixels = _decode_photograph(image)
        if pixels is None:
            pixels = np.array(_to_rgb(image, named))
        # Only now: a PNG may carry its EXIF block behind its pixels.
        orientation = _orientation(image)
        turned_size = image.size[::-1] if orientation >= 5 else image.size
        if orientation in _UPRIGHT and turned_size == (width, height):
            pixels = np.array(Image.fromarray(pixels).transpose(_UPRIGHT[orientation]))
        return pixels


def check_image(path: str | os.PathLike, *, height: int, width: int, full: bool = False) -> None:
    """Raises if `path` is not a complete image of the given size, without decoding it where possible.

    Reads the header and the last bytes. A file that does not end as JPEG and PNG files end, or is of another
    format, is decoded to be sure, so a healthy file is never refused. Damage in the middle of a file that
    keeps its end stays unseen here; `decode_image` finds what its decoder reports of that.

    Args:
        path: the image file.
        height: annotated height in pixels.
        width: annotated width in pixels.
        full: decode every file.

    Raises:
        DataError: as `decode_image`.
    """
    if not full:
        with _opened(path, "") as image:
            _check_size(image, os.fspath(path), height=height, width=width)
            marker = _END_MARKERS.get(image.format)
        if marker is not None and marker in _tail(path):
            return
    decode_image(path, height=height, width=width)


def stored_size(encoded: bytes, name: str) -> tuple[int, int]:
    """Returns the height and width of an encoded image, without its EXIF orientation; raises DataError."""
    with _opened(encoded, name) as image:
        return image.height, image.width


def upright_size(path: str | os.PathLike) -> tuple[int, int]:
    """Returns the height and width of an image file as a viewer shows it.

    Raises:
        DataError: as `decode_image`; the size is looked at before anything is decoded.
    """
    with _opened(path, "") as image:
        _check_size(image, os.fspath(path), height=image.height, width=image.width)
        size = image.size[::-1] if _orientation(image) >= 5 else image.size
    return size[::-1]


def is_annotated_unturned(path: str | os.PathLike, *, height: int, width: int) -> bool:
    """Whether EXIF says to turn an image on its side that the annotation knows as it is stored.

    The pixels of such an image are used as they lie. Most annotation tools show it turned, so that it may well be
    the annotation's size that is wrong.

    Raises:
        DataError: the file cannot be opened.
    """
    with _opened(path, "") as image:
        return image.size == (width, height) and height != width and _orientation(image) >= 5


def pixel_limit() -> int | float:
    """Returns the number of pixels from which on an image is refused: Pillow's limit, 89 million by default."""
    return float("inf") if Image.MAX_IMAGE_PIXELS is None else Image.MAX_IMAGE_PIXELS


def _name(path_or_bytes, name: str) -> str:
    return name if isinstance(path_or_bytes, bytes) else os.fspath(path_or_bytes)


def _tail(path: str | os.PathLike) -> bytes:
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.path.getsize(path) - _TAIL_BYTES))
            return file.read()
    except OSError as error:
        raise _error(
            path, "unreadable image", f"cannot be read: {error}", "Check the file and its permissions."
        ) from error


@contextlib.contextmanager
def _opened(path_or_bytes: str | os.PathLike | bytes, name: str) -> Iterator[Image.Image]:
    """Opens an image; whatever Pillow raises, then or in the body, leaves as one DataError."""
    named = _name(path_or_bytes, name)
    file = io.BytesIO(path_or_bytes) if isinstance(path_or_bytes, bytes) else path_or_bytes
    # `isfile` also keeps a pipe from blocking the reader for ever.
    if file is path_or_bytes and not os.path.isfile(file):
        raise _error(
            named,
            "missing image",
            "is missing or no file",
            "Restore the image or remove its annotation entry.",
        )
    try:
        with Image.open(file, formats=_FORMATS) as image:
            yield image
    except DataError:
        raise
    except UnidentifiedImageError as error:
        raise _error(
            named,
            "no image",
            f"is not an image of a known format ({', '.join(_FORMATS)}), or its header is truncated",
            "Restore or convert it.",
        ) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_large(named, str(error)) from error
    except Exception as error:  # Pillow's decoders raise a dozen types on damaged files.
        raise _error(
            named,
            "damaged image",
            f"cannot be decoded, it is truncated or damaged ({error})",
            "Restore the file.",
        ) from error


def _error(name: str | os.PathLike, kind: str, what: str, remedy: str) -> DataError:
    return DataError(Fault(kind=kind, file=os.fspath(name), what=what, remedy=remedy))


def _too_large(name: str, size: str) -> DataError:
    remedy = "Downscale it, or remove it if it is not a photograph."
    return _error(name, "absurdly large image", f"is absurdly large ({size})", remedy)


def _check_scans(image: Image.Image, name: str) -> None:
    """Raises for a progressive JPEG that would keep its decoder busy for ever."""
    if not image.info.get("progressive"):
        return
    image.fp.seek(0)
    scans = image.fp.read().count(_JPEG_SCAN)
    limit = min(_MAX_JPEG_SCANS, _SCANS_AT_THE_LIMIT * pixel_limit() / (image.width * image.height))
    if scans > limit:
        raise _too_large(name, f"{scans} scans, the limit is {limit:.0f}")


def _check_size(image: Image.Image, name: str, *, height: int, width: int) -> None:
    """Raises unless the stored or the turned image has the annotated size; reads no pixels if it can."""
    limit = pixel_limit()
    if image.width * image.height > limit:
        raise _too_large(name, f"{image.height} x {image.width} pixels, the limit is {limit:g}")
    if image.size == (width, height):
        return
    if image.size == (height, width) and _orientation(image) >= 5:
        return
    raise _error(
        name,
        "image of another size",
        f"is {image.height} pixels high and {image.width} wide, its annotation says {height} high and {width} wide",
        "Correct the annotation, or restore the image it was drawn on.",
    )


def _orientation(image: Image.Image) -> int:
    orientation = image.getexif().get(_ORIENTATION_TAG, 1)
    return orientation if orientation in _UPRIGHT else 1


def _decode_photograph(image: Image.Image) -> UInt8[ndarray, "h w 3"] | None:
    """Returns the pixels of an RGB JPEG of which not the least is wrong, None for anything else."""
    if image.format != "JPEG" or image.mode != "RGB":
        return None
    # Of the size that was checked: a header which two decoders read in two ways gets no more memory than that.
    pixels = np.empty((image.height, image.width, 3), np.uint8)
    if image.fp.seek(0, os.SEEK_END) > 2 * pixels.size + _MAX_JPEG_HEADER:
        return None
    image.fp.seek(0)
    try:
        decoded = simplejpeg.decode_jpeg(image.fp.read(), buffer=pixels)
    except ValueError:
        return None
    return pixels if decoded.shape == pixels.shape else None


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    image.load()
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise _error(
            name,
            "samples of 32 bits",
            "has 32-bit samples of unknown range",
            "Convert it to 8 or 16 bits.",
        )
    elif image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, (0, 0, 0, 255)), rgba).convert("RGB")
    return image.convert("RGB")
