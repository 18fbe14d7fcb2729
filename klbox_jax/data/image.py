"""Decoding of image files, in one way for the whole package.

Every file is decoded to 8-bit RGB of exactly the annotated size:

    grey, palette   expanded to RGB
    transparency    composed over black, the colour of the padding around an image
    CMYK            converted by Pillow (Adobe's inverted CMYK JPEGs included)
    16 bits         the high byte of each sample: scaled, not clipped
    animations      the first frame

Photographs (RGB JPEGs) are decoded by simplejpeg, which takes 60 % of Pillow's time and gives the same bits. Files
that simplejpeg refuses are decoded by Pillow. Pillow also checks every header first.

The EXIF orientation is applied if the rotated size is the annotated one (as viewers and annotation tools show the
photograph). If only the stored size agrees, the annotation was drawn without the orientation, and the pixels are left
as stored. All functions may be called from several threads.
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

# Pillow also reads formats that run other programs (EPS); a data set does not need them.
_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM")

# The bytes at the end of a complete file. Entropy-coded JPEG data never contains the end marker by chance.
_END_MARKERS = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND"}
_TAIL_BYTES = 4096

# Photographs have about ten scans. Each scan costs the decoder a pass over the whole image, but the file only a few
# bytes. A small image may have more scans than one at the size limit.
_MAX_JPEG_SCANS = 500
_SCANS_AT_THE_LIMIT = 20
_JPEG_SCAN = b"\xff\xda"

# Enough for a camera's notes, profile and preview before the pixels.
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
        name: name of the image in messages, for an image given as bytes.

    Raises:
        DataError: the file is missing, truncated, not an image, too large, or of another size.
    """
    with _opened(path_or_bytes, name) as image:
        named = _name(path_or_bytes, name)
        _check_size(image, named, height=height, width=width)
        _check_scans(image, named)
        pixels = _decode_photograph(image)
        if pixels is None:
            pixels = np.array(_to_rgb(image, named))
        # After decoding, because a PNG may store its EXIF block behind its pixels.
        orientation = _orientation(image)
        turned_size = image.size[::-1] if orientation >= 5 else image.size
        if orientation in _UPRIGHT and turned_size == (width, height):
            pixels = np.array(Image.fromarray(pixels).transpose(_UPRIGHT[orientation]))
        return pixels


def check_image(path: str | os.PathLike, *, height: int, width: int, full: bool = False) -> None:
    """Raises DataError if `path` is not a complete image of the given size; avoids decoding if possible.

    Reads the header and the last bytes. A file without the end marker of JPEG or PNG, or of another format, is
    decoded, so that an intact file is never refused. Damage in the middle of a file with an intact end is not found
    here; `decode_image` finds it if the decoder reports it.

    Args:
        path: the image file.
        height: annotated height in pixels.
        width: annotated width in pixels.
        full: decode every file.

    Raises:
        DataError: see `decode_image`.
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


def upright_size(path_or_bytes: str | os.PathLike | bytes, *, name: str = "image bytes") -> tuple[int, int]:
    """Returns the height and width of an image file as a viewer shows it (EXIF orientation applied).

    Args:
        path_or_bytes: the file, or its contents.
        name: name of the image in messages, for an image given as bytes.

    Raises:
        DataError: see `decode_image`; the size is checked before anything is decoded.
    """
    with _opened(path_or_bytes, name) as image:
        _check_size(image, _name(path_or_bytes, name), height=image.height, width=image.width)
        size = image.size[::-1] if _orientation(image) >= 5 else image.size
    return size[::-1]


def is_annotated_unturned(path: str | os.PathLike, *, height: int, width: int) -> bool:
    """Returns True if EXIF asks for a 90 degree rotation but the annotated size matches the unrotated image.

    The pixels of such an image are used as stored. Most annotation tools show it rotated, so the annotated size may
    be wrong.

    Raises:
        DataError: the file cannot be opened.
    """
    with _opened(path, "") as image:
        return image.size == (width, height) and height != width and _orientation(image) >= 5


def pixel_limit() -> int | float:
    """Returns the largest accepted number of pixels of an image: Pillow's limit, 89 million by default."""
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
    """Opens an image; converts every exception of Pillow, on opening or in the body, to one DataError."""
    named = _name(path_or_bytes, name)
    file = io.BytesIO(path_or_bytes) if isinstance(path_or_bytes, bytes) else path_or_bytes
    # `isfile` also refuses a pipe, which would block the reader forever.
    if file is path_or_bytes and not os.path.isfile(file):
        raise _error(
            named,
            "missing image",
            "is missing or is not a file",
            "Check its path, or restore it.",
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
    """Raises DataError for a progressive JPEG with so many scans that decoding would not end."""
    if not image.info.get("progressive"):
        return
    image.fp.seek(0)
    scans = image.fp.read().count(_JPEG_SCAN)
    limit = min(_MAX_JPEG_SCANS, _SCANS_AT_THE_LIMIT * pixel_limit() / (image.width * image.height))
    if scans > limit:
        raise _too_large(name, f"{scans} scans, the limit is {limit:.0f}")


def _check_size(image: Image.Image, name: str, *, height: int, width: int) -> None:
    """Raises DataError unless the stored or the rotated image has the annotated size; avoids reading pixels."""
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
    """Returns the pixels of an RGB JPEG without any error, and None for all other images."""
    if image.format != "JPEG" or image.mode != "RGB":
        return None
    # Allocated for the checked size: if two decoders read a header differently, no more memory is used.
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
