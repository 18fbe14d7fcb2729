"""Finds objects with an exported detector. Needs only jax, numpy and flatbuffers.

Every exported folder has a copy of this file, as load_detector.py:

    from load_detector import Detector
    detect = Detector("path/to/the/folder")
    found = detect(image)            # uint8 [height, width, 3], RGB
    found["boxes"], found["box_stds"], found["scores"], found["names"]

The folder's model.json says what the arrays mean. Load only folders that you trust: a program that jax reads from a
file may call any function of its libraries.
"""

import hashlib
import json
import os
import pathlib
import struct
from collections.abc import Sequence

import jax
import jax.export
import numpy as np

FORMAT = "klbox_jax detector"
FORMAT_VERSION = 1
_COPY_AGAIN = "copy the whole folder again, or export it again"


class ModelError(ValueError):
    """A folder cannot be used; the message names the file, the reason and the remedy."""


class Detector:
    """An exported detector; call it on an image.

    Attributes:
        info: the content of model.json.
    """

    def __init__(self, folder: str | os.PathLike):
        """Reads and checks a folder; each program is compiled with its first image.

        Raises:
            ModelError: a file is missing, damaged, or of a version that this file does not read.
        """
        self.folder = pathlib.Path(folder)
        self.info = _read_info(self.folder / "model.json")
        try:
            self._canvases = {tuple(each["canvas"]): each["file"] for each in self.info["programs"]}
            self._sha256 = dict(self.info["sha256"])
            self._check_jax()
            weights = self.info["weights"]
            params = _read_safetensors(self._read(weights), self.folder / weights)
        except (KeyError, TypeError) as error:
            raise ModelError(
                f"{self.folder / 'model.json'} is incomplete ({error!r}); {_COPY_AGAIN}"
            ) from None
        self._params = jax.device_put(params)
        self._programs = {}

    def __call__(self, image: np.ndarray) -> dict[str, np.ndarray]:
        """Returns the objects in one image, best first: the outputs that model.json describes, one row per object.

        `names` and `category_ids` of their classes are added.

        Args:
            image: uint8 [height, width, 3], RGB.
        """
        return self.detect([image])[0]

    def detect(self, images: Sequence[np.ndarray]) -> list[dict[str, np.ndarray]]:
        """Returns the objects in each image; images of the same canvas run in batches.

        Raises:
            ValueError: an image has another shape or type.
        """
        size = self.info["batch_size"]
        waiting: dict[tuple[int, int], list] = {canvas: [] for canvas in self._canvases}
        found: dict[int, dict] = {}
        for index, image in enumerate(images):
            canvas, prepared = self.prepare(image)
            waiting[canvas].append((index, prepared))
            if len(waiting[canvas]) == size:
                found |= self._run(canvas, waiting[canvas])
                waiting[canvas] = []
        for canvas, rest in waiting.items():
            if rest:
                found |= self._run(canvas, rest)
        return [found[index] for index in range(len(found))]

    def intervals(self, found: dict[str, np.ndarray], coverage: float = 0.9) -> dict[str, np.ndarray]:
        """Returns an interval for each edge of the objects of one image; `intervals` of model.json has the promises.

        Args:
            found: from a call of this detector.
            coverage: one of those in model.json.

        Returns:
            `lower` and `upper`: ends of the intervals of x1, y1, x2, y2 of each box. `outer` and `inner`: the largest
            and the smallest box whose edges are in their intervals; an inner box may be empty.

        Raises:
            ValueError: the export has no intervals of this coverage.
        """
        stored = self.info.get("intervals") or []
        known = {each["coverage"]: each for each in stored if each["factors"] is not None}
        if coverage not in known:
            raise ValueError(
                f"{self.folder / 'model.json'} has intervals for coverages {sorted(known)}, not {coverage}; choose one "
                "of them, or calibrate on labelled images and export again"
            )
        half = np.maximum(found["box_stds"] * np.array(known[coverage]["factors"]), known[coverage]["least"])
        lower, upper = found["boxes"] - half, found["boxes"] + half
        is_first = np.array([True, True, False, False])
        outer, inner = np.where(is_first, lower, upper), np.where(is_first, upper, lower)
        return {"lower": lower, "upper": upper, "outer": outer, "inner": inner}

    def prepare(self, image: np.ndarray) -> tuple[tuple[int, int], dict[str, np.ndarray]]:
        """Returns the canvas for an image, and the inputs of the program: `images`, `image_size`, `scale`.

        The canvas is the smallest one that holds the resized image. If none does, it is the one on which the image
        stays largest.
        """
        if (
            getattr(image, "dtype", None) != np.uint8
            or image.ndim != 3
            or image.shape[2] != 3
            or not image.size
        ):
            raise ValueError("an image must be a uint8 array [height, width, 3], RGB")
        height, width = image.shape[:2]
        sides = self.info["preprocessing"]
        scale = min(sides["short_side"] / min(height, width), sides["long_side"] / max(height, width))

        def resized(scale: float) -> tuple[int, int]:
            return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))

        size = resized(scale)
        fitting = [c for c in self._canvases if size[0] <= c[0] and size[1] <= c[1]]
        if fitting:
            canvas = min(fitting, key=lambda c: c[0] * c[1])
        else:
            scales = {c: min(scale, c[0] / height, c[1] / width) for c in self._canvases}
            canvas = max(scales, key=scales.get)
            size = resized(scales[canvas])
        pixels = np.zeros((*canvas, 3), np.uint8)
        pixels[: size[0], : size[1]] = resize(image, size)
        return canvas, {
            "images": pixels,
            "image_size": np.array(size, np.int32),
            "scale": np.array([size[1] / width, size[0] / height], np.float32),
        }

    def _run(self, canvas: tuple[int, int], examples: list) -> dict[int, dict]:
        rows = [prepared for _, prepared in examples]
        # The last image is repeated to fill the batch.
        rows += rows[-1:] * (self.info["batch_size"] - len(rows))
        batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
        outputs = jax.device_get(self._program(canvas)(self._params, **batch))
        names = np.array([each["name"] for each in self.info["classes"]])
        ids = np.array([each["id"] for each in self.info["classes"]])
        found = {}
        for row, (index, _) in enumerate(examples):
            valid = outputs["valid"][row]
            one = {name: value[row][valid] for name, value in outputs.items() if name != "valid"}
            found[index] = one | {"names": names[one["classes"]], "category_ids": ids[one["classes"]]}
        return found

    def _program(self, canvas: tuple[int, int]):
        if canvas not in self._programs:
            self._programs[canvas] = self._load_program(canvas)
        return self._programs[canvas]

    def _load_program(self, canvas: tuple[int, int]):
        name = self._canvases[canvas]
        content = self._read(name)
        try:
            exported = jax.export.deserialize(bytearray(content))
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ModelError(
                f"{self.folder / name} cannot be read by jax {jax.__version__} ({reason}); it was written by jax "
                f"{self.info['jax']}: install that version (and flatbuffers), or export it again"
            ) from error
        return jax.jit(exported.call)

    def _check_jax(self) -> None:
        """Raises ModelError if this jax, on this device, cannot run the programs."""
        version = self.info["calling_convention_version"]
        low = jax.export.minimum_supported_calling_convention_version
        high = jax.export.maximum_supported_calling_convention_version
        if not low <= version <= high:
            raise ModelError(
                f"{self.folder}: its programs have calling convention {version}, and jax {jax.__version__} reads "
                f"{low} to {high}; install jax {self.info['jax']}, or export it again"
            )
        platform = jax.export.default_export_platform()
        if platform not in self.info["platforms"]:
            raise ModelError(
                f"{self.folder}: its programs are for {', '.join(self.info['platforms'])}, not for {platform}; set "
                f"JAX_PLATFORMS to one of them, or export it again with config.export.platforms"
            )

    def _read(self, name: str) -> bytes:
        path = self.folder / name
        try:
            content = path.read_bytes()
        except OSError as error:
            raise ModelError(f"{path} cannot be read ({error.strerror}); {_COPY_AGAIN}") from None
        if hashlib.sha256(content).hexdigest() != self._sha256[name]:
            raise ModelError(f"{path} is not the file that was exported (another sha256); {_COPY_AGAIN}")
        return content


def resize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Returns an image resized to `size`, (height, width), within one grey level of the training images.

    The interpolation is linear (OpenCV's INTER_LINEAR). If a side shrinks to less than a half, each new pixel is the
    mean over its area (INTER_AREA). Only the rounding differs from OpenCV. Pixel `i` covers [i, i + 1).
    """
    if image.shape[:2] == size:
        return image
    sides = list(zip(image.shape[:2], size, strict=True))
    averages = any(2 * new < old for old, new in sides)
    rows, columns = (_resampling(old, new, averages=averages) for old, new in sides)
    narrow = np.tensordot(columns, image.astype(np.float32), axes=(1, 1))  # [new width, height, 3]
    pixels = np.tensordot(rows, narrow, axes=(1, 1))  # [new height, new width, 3]
    return np.clip(np.rint(pixels), 0, 255).astype(np.uint8)


def _resampling(old: int, new: int, *, averages: bool) -> np.ndarray:
    """Returns the weight of each old pixel in each new one, [new, old]; rows sum to 1."""
    scale = old / new
    pixels = np.arange(old)[None]
    if averages and new < old:
        edges = np.arange(new + 1)[:, None] * scale
        overlap = np.minimum(edges[1:], pixels + 1) - np.maximum(edges[:-1], pixels)
        weights = np.maximum(overlap, 0) / scale
    else:
        centres = np.clip((np.arange(new) + 0.5) * scale - 0.5, 0, old - 1)[:, None]
        weights = np.maximum(1 - np.abs(centres - pixels), 0)
    return weights.astype(np.float32)


def _read_info(path: pathlib.Path) -> dict:
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(
            f"{path} cannot be read ({error.strerror}); give the folder of a finished export"
        ) from None
    except ValueError as error:
        raise ModelError(f"{path} is not JSON ({error}); {_COPY_AGAIN}") from None
    if not isinstance(info, dict) or info.get("format") != FORMAT:
        raise ModelError(f"{path} does not describe an exported detector; give the folder of one")
    if info.get("format_version") != FORMAT_VERSION:
        raise ModelError(
            f"{path} is of format version {info.get('format_version')}, and this loader reads version "
            f"{FORMAT_VERSION}; use the load_detector.py of that folder"
        )
    return info


def _read_safetensors(content: bytes, path: pathlib.Path) -> dict[str, np.ndarray]:
    """Returns the tensors of a safetensors file as float32.

    The file has the length of the header in 8 bytes, the header as JSON, and the numbers.
    """
    dtypes = {"F32": "<f4", "F16": "<f2"}
    try:
        start = 8 + struct.unpack("<Q", content[:8])[0]
        header = json.loads(content[8:start])
        header.pop("__metadata__", None)
        tensors = {}
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            numbers = np.frombuffer(content[start + begin : start + end], dtypes[entry["dtype"]])
            tensors[name] = numbers.reshape(entry["shape"]).astype(np.float32)
        return tensors
    except (AttributeError, KeyError, TypeError, ValueError, struct.error) as error:
        raise ModelError(
            f"{path} is not a safetensors file of float numbers ({error!r}); {_COPY_AGAIN}"
        ) from None
