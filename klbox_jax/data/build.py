"""From `config.data` to a data set and its preprocessing."""

from typing import Any

from absl import logging

from klbox_jax.data.coco import CocoSource
from klbox_jax.data.hold_out import split_held_out
from klbox_jax.data.scenes import ScenesSource
from klbox_jax.data.source import LeaveOut, Report, Source, refuse
from klbox_jax.data.tfds_source import TfdsSource
from klbox_jax.data.transforms import Preprocessing
from klbox_jax.data.voc import VOC_CLASSES, VocSource, parse_voc_split
from klbox_jax.files import cache_folder


def build_source(config: Any, split: str) -> Source:
    """Returns a split of the data set that `config` (a `config.data`) names.

    What the names of sets and splits mean:

        scenes  the embedded scenes; `root` is where they are kept once made; train, validation, calibration, test
        coco    a folder in COCO's layout, `root`; the splits are those of the folder
        voc     the folder that holds VOC2007 and others, `root`; a split is `2007_test`, or several in one:
                `2007_trainval+2012_trainval`; other classes than VOC's are named in `class_names`
        tfds    the set `tfds_name` (e.g. `voc/2007`) of tensorflow-datasets, prepared in `root`; TFDS' splits

    Images that are at fault, or have an object at fault, are refused, or with `on_bad_record = "skip"` left out with
    a warning each. The scenes have none.

    Raises:
        DataError: the data set is unusable.
        ValueError: its name, its root or a split is missing or unknown.
    """
    if config.name not in ("scenes", "coco", "voc", "tfds"):
        raise ValueError(f"config.data.name = {config.name!r} is unknown; choose scenes, coco, voc or tfds")
    if config.name == "scenes":
        boxes = "noisy" if split == "train" else "exact"
        root = config.root or cache_folder() / "scenes"
        masks = config.get("mask_size", 0) > 0
        return ScenesSource(
            root, split, boxes=boxes, masks=masks, noise_scale=config.noise_scale, **config.num_images
        )
    if not config.root:
        raise ValueError(f"config.data.root is empty; set it to the folder of the {config.name} data set")
    if config.get("on_bad_record", "stop") != "skip":
        return _build_foreign_source(config, split, refuse)
    left_out = LeaveOut()
    source = _build_foreign_source(config, split, left_out)
    if left_out.count:
        logging.warning(
            "%s: images were left out for %d faults; %d remain",
            source.name,
            left_out.count,
            len(source.records),
        )
    return source


def _build_foreign_source(config: Any, split: str, report: Report) -> Source:
    if config.name == "coco":
        return CocoSource(
            config.root,
            split,
            masks=config.get("mask_size", 0) > 0,
            skip_empty_boxes=config.get("skip_empty_boxes", False),
            report=report,
        )
    if config.name == "voc":
        return VocSource(
            config.root,
            parse_voc_split(split),
            class_names=config.get("class_names", ()) or VOC_CLASSES,
            report=report,
        )
    if not config.get("tfds_name", ""):
        raise ValueError(
            "config.data.tfds_name is empty; set it to the name of a prepared set, e.g. voc/2007"
        )
    return TfdsSource(config.tfds_name, split, data_dir=config.root, report=report)


def build_train_source(config: Any) -> Source:
    """Returns the training split less what `config.hold_out`, a share of its images, keeps out of the training.

    Raises:
        DataError, ValueError: see `build_source`; the share is not one, or leaves nothing.
    """
    source = build_source(config, config.train_split)
    share = config.get("hold_out", 0.0)
    return split_held_out(source, share)[0] if share else source


def build_calibration_source(config: Any) -> Source:
    """Returns the images that stds are calibrated on: what `hold_out` keeps, or else the `calibration_split`.

    Raises:
        DataError: the data set is unusable.
        ValueError: there is neither, the split is (a part of) what is trained on or reported, or see `build_source`.
    """
    share = config.get("hold_out", 0.0)
    if share:
        return split_held_out(build_source(config, config.train_split), share)[1]
    split = config.get("calibration_split", "")
    if not split:
        raise ValueError(
            "there are no images to calibrate on: set config.data.calibration_split to a split that is neither trained "
            "on nor reported, or train with config.data.hold_out = 0.1, which keeps a tenth of the training images"
        )
    for field in ("train_split", "eval_split"):
        if set(split.split("+")) & set(config[field].split("+")):
            raise ValueError(
                f"config.data.calibration_split = {split!r} has images of config.data.{field} = {config[field]!r}; "
                "calibrate on images that are neither trained on nor reported"
            )
    return build_source(config, split)


def build_preprocessing(config: Any) -> Preprocessing:
    """Returns the preprocessing that `config` (a `config.data`) describes; raises ValueError."""
    return Preprocessing(
        short_side=config.short_side,
        long_side=config.long_side,
        canvases=config.canvases,
        max_gt=config.max_gt,
        flip=config.flip,
        scale_jitter=config.scale_jitter,
        mask_size=config.get("mask_size", 0),
        on_bad_record=config.get("on_bad_record", "stop"),
    )
