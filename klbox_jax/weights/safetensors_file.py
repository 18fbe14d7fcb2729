"""Weight files in the safetensors format: our own, and those of other libraries.

In our own files every parameter of a detector has its path as its name, joined by '/', such as 'backbone/stem/kernel'.
The format is a JSON header and raw numbers, so reading a foreign file runs no code from it. The library checks the
length of the header, and that the tensors fill the file exactly.
"""

import json
import os
import pathlib
from collections.abc import Collection, Mapping
from typing import Any

import jax
import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict

from klbox_jax.models.generalized_rcnn import GeneralizedRCNN
from klbox_jax.weights.listing import MAX_LISTED, listed, nearest
from klbox_jax.weights.restricted_unpickler import FETCH, WeightFileError

# Key in the metadata of the network's conventions, a JSON object; see `model_metadata`.
CONVENTIONS = "conventions"
# The types of our own files.
_OWN_DTYPES = ("F16", "F32")
# The types of other files. NumPy knows bfloat16 by ml_dtypes only.
_DTYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8,
    "U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip


def save_params(
    path: str | os.PathLike,
    params: Mapping[str, Any],
    *,
    metadata: Mapping[str, str],
    dtype: str = "float32",
) -> None:
    """Writes a weight file atomically; makes the folder if it is missing.

    Args:
        path: the file, which ends in `.safetensors`.
        params: nested dictionaries of arrays.
        metadata: texts that are stored with the tensors; with those of `model_metadata`, `load_weights` can fill a
            detector from the file.
        dtype: type of the stored numbers: `float32`, or `float16`, which halves the file and rounds to 11 bits.

    Raises:
        ValueError: `dtype` is another type, or a number is not finite in it.
    """
    if dtype not in ("float32", "float16"):
        raise ValueError(f"dtype must be float32 or float16, not {dtype!r}")
    with np.errstate(over="ignore"):
        tensors = {
            "/".join(name): np.ascontiguousarray(np.asarray(value, np.float32).astype(dtype))
            for name, value in flatten_dict(jax.device_get(dict(params))).items()
        }
    broken = [name for name, value in tensors.items() if not np.isfinite(value).all()]
    if broken:
        raise ValueError(f"not finite as {dtype}, so {os.fspath(path)} is not written: {listed(broken)}")
    content = safetensors.numpy.save(tensors, metadata=dict(metadata))
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_params(path: str | os.PathLike) -> tuple[dict[str, Any], dict[str, str]]:
    """Returns the parameters of one of our weight files as nested dictionaries of float32 arrays, and its metadata.

    Raises:
        WeightFileError: the file is missing, is not a safetensors file, is truncated, or holds a tensor of another
            type than float16 and float32, a number that is not finite, or names that do not form a tree.
    """
    tensors, metadata = read_tensors(path, dtypes=_OWN_DTYPES)
    names = {name: tuple(name.split("/")) for name in tensors}
    inner = {parts[:length] for parts in names.values() for length in range(1, len(parts))}
    wrong = [name for name, parts in names.items() if parts in inner or not all(parts)]
    if wrong:
        raise WeightFileError(
            f"{os.fspath(path)}: the names of its tensors are not paths of parameters: {listed(wrong)}; {FETCH}."
        )
    return unflatten_dict({names[name]: value for name, value in tensors.items()}), metadata


def read_tensors(
    path: str | os.PathLike, *, dtypes: Collection[str] = tuple(_DTYPES)
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Returns the tensors of a file by name, and its metadata.

    Floating-point numbers become float32. Integers and booleans, such as torch's counters of batch norms, keep their
    type.

    Args:
        path: the file.
        dtypes: accepted types, by their names in the format.

    Raises:
        WeightFileError: see `load_params`.
    """
    path = os.fspath(path)
    tensors = {}
    try:
        with safetensors.safe_open(path, framework="np") as file:
            metadata = dict(file.metadata() or {})
            for name in sorted(file.keys()):
                if (dtype := file.get_slice(name).get_dtype()) not in dtypes:
                    own = "not float16 or float32" if dtypes == _OWN_DTYPES else "which is not read"
                    raise WeightFileError(
                        f"{path}: {name!r} is of type {dtype}, {own}; write it again with float16 or float32."
                    )
                value = file.get_tensor(name)
                is_float = dtype in ("F64", "F32", "F16", "BF16")
                tensors[name] = value.astype(np.float32) if is_float else value
    except OSError as error:
        raise WeightFileError(f"{path}: cannot be read ({error}); check the path.") from error
    except safetensors.SafetensorError as error:
        raise WeightFileError(
            f"{path}: is not a safetensors file, or is truncated or damaged ({error}); {FETCH}."
        ) from error
    for name, value in tensors.items():
        if not np.isfinite(value).all():
            raise WeightFileError(f"{path}: {name!r} is not finite; give an earlier checkpoint.")
    return tensors, metadata


def check_params(loaded: Mapping[str, Any], expected: Mapping[str, Any], *, path: str | os.PathLike) -> None:
    """Raises WeightFileError, which lists the differences, if parameters do not fit a model.

    Args:
        loaded: parameters of a file, nested dictionaries of arrays.
        expected: parameters of the model, arrays or anything else with a `shape`.
        path: path of the file, for the message.
    """
    found, wanted = (
        {"/".join(name): tuple(value.shape) for name, value in flatten_dict(dict(tree)).items()}
        for tree in (loaded, expected)
    )
    missing = sorted(wanted.keys() - found.keys())
    unknown = sorted(found.keys() - wanted.keys())
    other = sorted(name for name in found.keys() & wanted.keys() if found[name] != wanted[name])
    parts = []
    if missing:
        # The search for similar names is slow, so it is done for the listed ones only.
        near = [f"{name} (none{nearest(name, unknown)})" for name in missing[:MAX_LISTED]]
        parts.append(f"parameters that the file does not have: {listed(near + missing[MAX_LISTED:])}")
    if unknown:
        near = [f"{name} (unknown{nearest(name, missing)})" for name in unknown[:MAX_LISTED]]
        parts.append(f"tensors that the model has no place for: {listed(near + unknown[MAX_LISTED:])}")
    if other:
        shapes = [f"{name} (shape {found[name]} here, not {wanted[name]})" for name in other]
        parts.append(f"tensors of another shape: {listed(shapes)}")
    if parts:
        raise WeightFileError(
            f"{os.fspath(path)}: does not fit the model; {'; '.join(parts)}. Build the model that it was trained as."
        )


def model_metadata(model: GeneralizedRCNN) -> dict[str, str]:
    """Returns the conventions of a detector that are not in its tensors, as metadata for `save_params`.

    These are the fields of `Provenance`; a box coder is given by its class and weights.
    """
    conventions = {
        "pixel_mean": model.pixel_mean,
        "pixel_std": model.pixel_std,
        "stride_in_1x1": getattr(model.backbone, "stride_in_1x1", None),
        "box_coder": _coder(model.roi_heads.box_coder),
        "rpn_box_coder": _coder(model.rpn.box_coder),
        "anchor_offset": model.rpn.anchor_generator.offset,
        "aligned_pooling": model.roi_heads.box_pooler.aligned,
    }
    return {CONVENTIONS: json.dumps(conventions)}


def _coder(coder: Any) -> dict[str, Any]:
    return {"name": type(coder).__name__, "weights": coder.weights}
