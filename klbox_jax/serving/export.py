"""`klbox export`: a trained detector as files that run without this package.

    klbox export runs/kl

writes into `config.export.output`, by default `export/<step>` in the workdir:

    detector_<height>x<width>.stablehlo   one for each canvas: from pixels to detections, with suppression and voting
    weights.safetensors                   the parameters, an argument of the programs
    model.json                            versions, classes, and the meaning of inputs and outputs
    load_detector.py                      loads the folder; needs jax, numpy and flatbuffers, not this package

jax guarantees that its later versions read an exported program for at least six months. So the weights are for
keeping, the programs for using now.
"""

import functools
import hashlib
import os
import pathlib
import shutil
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float, Int, UInt8

import klbox_jax
from klbox_jax.evaluation.eval_step import eval_step
from klbox_jax.files import write_json
from klbox_jax.postprocess.settings import PostprocessSettings
from klbox_jax.serving import exported_detector
from klbox_jax.serving.predictor import Predictor, check_same_detector, load
from klbox_jax.structures import Batch, GroundTruth
from klbox_jax.train.job import Job
from klbox_jax.weights.safetensors_file import model_metadata, save_params

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
WEIGHTS = "weights.safetensors"
INPUTS = {
    "params": "the tensors of the weights file by name, float32",
    "images": "uint8 [batch, height, width, 3]: RGB, resized, in the top left corner of the canvas; the rest is 0",
    "image_size": "int32 [batch, 2]: height and width of the resized image",
    "scale": "float32 [batch, 2]: pixels of the canvas per pixel of the file, along x and along y",
}
OUTPUTS = {
    "boxes": "float32 [batch, n, 4]: x1, y1, x2, y2 in pixels of the file, best score first",
    "scores": "float32 [batch, n]: probability of the class, after suppression",
    "classes": "int32 [batch, n]: index into classes",
    "valid": "bool [batch, n]: False for an unused row",
    "box_stds": "float32 [batch, n, 4]: standard deviation of each edge in pixels of the file",
    "masks": "float32 [batch, n, m, m]: probability of each cell of the box, which the cells divide evenly",
}
PIXELS = (
    "edges are continuous: pixel i covers [i, i + 1), and a box over the whole image is 0, 0, width, height; an "
    "image is resized by linear interpolation, or by area averaging where a side shrinks to less than a half"
)


def export(
    job: Job,
    settings: PostprocessSettings,
    output: str | os.PathLike | None = None,
    *,
    step: int | None = None,
) -> pathlib.Path:
    """Exports a checkpoint of a run.

    The last file written is model.json: if it exists, the export is complete.

    Args:
        job: the run; its config has the fields of `export`.
        settings: the post-processing inside the programs.
        output: the folder; by default that of the config.
        step: step of the checkpoint; by default the newest sound one.

    Returns:
        The folder.

    Raises:
        ValueError: a field of `config.export` is wrong; the folder cannot be made; the config describes another
            detector than that of the workdir; or see `load`.
        CheckpointError: there is no sound checkpoint.
    """
    fields = job.config.export
    _check_fields(fields)
    predictor = load(job.workdir.path, step=step, settings=settings, extensions=job.extensions)
    check_same_detector(job, predictor)
    default = job.workdir.path / "export" / str("shipped" if predictor.step is None else predictor.step)
    folder = pathlib.Path(output or fields.output or default)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "model.json").unlink(missing_ok=True)
    except OSError as error:
        raise ValueError(
            f"config.export.output = {str(folder)!r} cannot be used ({error.strerror}); choose another"
        ) from None
    metadata = model_metadata(predictor.model) | {"step": str(predictor.step)}
    save_params(folder / WEIGHTS, predictor.params, metadata=metadata, dtype=fields.weights_dtype)
    programs = _write_programs(folder, predictor, fields)
    shutil.copyfile(exported_detector.__file__, folder / "load_detector.py")
    files = [WEIGHTS, *(each["file"] for each in programs["programs"])]
    info = _describe(predictor) | {
        "outputs": {name: OUTPUTS[name] for name in _output_names(predictor)},
        "batch_size": fields.batch_size,
        "platforms": fields.platforms,
        **programs,
        "weights": WEIGHTS,
        "weights_dtype": fields.weights_dtype,
        "sha256": {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in files},
    }
    write_json(folder / "model.json", info)
    logging.info("the detector of step %s is exported to %s", predictor.step, folder)
    return folder


def _write_programs(folder: pathlib.Path, predictor: Predictor, fields: Any) -> dict[str, Any]:
    """Writes the program of each canvas; returns the fields of model.json that describe them."""
    programs = []
    for height, width in [fields.canvas] if fields.canvas else predictor.preprocessing.canvases:
        program = export_program(
            predictor, canvas=(height, width), batch_size=fields.batch_size, platforms=fields.platforms
        )
        name = f"detector_{height}x{width}.stablehlo"
        (folder / name).write_bytes(program.serialize())
        programs.append({"file": name, "canvas": (height, width)})
        logging.info("%s: %.1f MB", folder / name, (folder / name).stat().st_size / 1e6)
    return {"programs": programs, "calling_convention_version": program.calling_convention_version}


def export_program(
    predictor: Predictor, *, canvas: tuple[int, int], batch_size: int, platforms: Sequence[str]
) -> jax.export.Exported:
    """Returns the program for one canvas; it takes `INPUTS` (the first by position) and returns `OUTPUTS`.

    One program serves all platforms: it has a variant for each where they differ.
    """
    params = {"/".join(name): value for name, value in flatten_dict(predictor.params).items()}
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
    detect = jax.jit(functools.partial(_detect, predictor))
    return jax.export.export(detect, platforms=list(platforms))(
        shapes,
        images=jax.ShapeDtypeStruct((batch_size, *canvas, 3), jnp.uint8),
        image_size=jax.ShapeDtypeStruct((batch_size, 2), jnp.int32),
        scale=jax.ShapeDtypeStruct((batch_size, 2), jnp.float32),
    )


def _detect(
    predictor: Predictor,
    params: dict[str, Float[Array, "..."]],
    *,
    images: UInt8[Array, "b h w 3"],
    image_size: Int[Array, "b 2"],
    scale: Float[Array, "b 2"],
) -> dict[str, Array]:
    size = images.shape[0]
    batch = Batch(
        images=images,
        image_size=image_size,
        scale=scale,
        image_id=jnp.zeros(size, jnp.int32),
        valid=jnp.ones(size, bool),
        # The eval step does not read the ground truth.
        gt=GroundTruth(
            boxes=jnp.zeros((size, 1, 4)),
            classes=jnp.zeros((size, 1), jnp.int32),
            is_crowd=jnp.zeros((size, 1), bool),
            valid=jnp.zeros((size, 1), bool),
        ),
    )
    nested = unflatten_dict({tuple(name.split("/")): value for name, value in params.items()})
    found = eval_step(nested, batch, model=predictor.model, settings={"": predictor.settings})[""]
    if found.box_stds is not None and predictor.temperature is not None:
        factors = jnp.asarray(predictor.temperature, jnp.float32)[None, None]
        found = found.replace(box_stds=found.box_stds * factors)
    return {name: getattr(found, name) for name in _output_names(predictor)}


def _output_names(predictor: Predictor) -> list[str]:
    heads = predictor.model.roi_heads
    left_out = {"box_stds": not heads.box_loss.has_variances, "masks": heads.mask_head is None}
    return [name for name in OUTPUTS if not left_out.get(name, False)]


def _describe(predictor: Predictor) -> dict[str, Any]:
    return {
        "format": exported_detector.FORMAT,
        "format_version": exported_detector.FORMAT_VERSION,
        "klbox_jax": klbox_jax.__version__,
        "jax": jax.__version__,
        "step": predictor.step,
        "classes": [
            {"name": name, "id": category}
            for name, category in zip(predictor.class_names, predictor.category_ids, strict=True)
        ],
        "preprocessing": {
            "short_side": predictor.preprocessing.short_side,
            "long_side": predictor.preprocessing.long_side,
        },
        "pixels": PIXELS,
        "inputs": INPUTS,
        "postprocess": predictor.settings.to_dict(),
        # The temperature of a calibration; the programs multiply the stds by it.
        "box_stds_factors": None if predictor.temperature is None else predictor.temperature.tolist(),
    }


def _check_fields(fields: Any) -> None:
    unknown = [name for name in fields.platforms if name not in PLATFORMS]
    if unknown or not fields.platforms:
        raise ValueError(
            f"config.export.platforms = {fields.platforms!r}: choose one or more of {', '.join(PLATFORMS)}"
        )
    if fields.batch_size < 1:
        raise ValueError(f"config.export.batch_size = {fields.batch_size}: must be positive")
    if len(fields.canvas) not in (0, 2) or any(side < 1 for side in fields.canvas):
        raise ValueError(
            f"config.export.canvas = {fields.canvas!r}: give height and width, or () for the canvases of config.data"
        )
    if fields.weights_dtype not in ("float32", "float16"):
        raise ValueError(f"config.export.weights_dtype = {fields.weights_dtype!r}: choose float32 or float16")
