"""From `config.data` to a data set and its preprocessing."""

import os
import pathlib
from typing import Any

from klbox_jax.data.coco import CocoSource
from klbox_jax.data.scenes import ScenesSource
from klbox_jax.data.source import Source
from klbox_jax.data.tfds_source import TfdsSource
from klbox_jax.data.transforms import Preprocessing
from klbox_jax.data.voc import VOC_CLASSES, VocSource, parse_voc_split


def cache_folder() -> pathlib.Path:
    """Where this user's prepared data sets and compiled programs are kept."""
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "klbox_jax"


def build_source(config: Any, split: str) -> Source:
    """Returns a split of the data set that `config` (a `config.data`) names.

    What the names of sets and splits mean:

        scenes  the embedded scenes; `root` is where they are kept once made; train, validation, calibration, test
        coco    a folder in COCO's layout, `root`; the splits are those of the folder
        voc     the folder that holds VOC2007 and others, `root`; a split is `2007_test`, or several in one:
                `2007_trainval+2012_trainval`; other classes than VOC's are named in `class_names`
        tfds    the set `tfds_name` (e.g. `voc/2007`) of tensorflow-datasets, prepared in `root`; TFDS' splits

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
    if config.name == "coco":
        return CocoSource(
            config.root,
            split,
            masks=config.get("mask_size", 0) > 0,
            skip_empty_boxes=config.get("skip_empty_boxes", False),
        )
    if config.name == "voc":
        return VocSource(
            config.root, parse_voc_split(split), class_names=config.get("class_names", ()) or VOC_CLASSES
        )
    if not config.get("tfds_name", ""):
        raise ValueError(
            "config.data.tfds_name is empty; set it to the name of a prepared set, e.g. voc/2007"
        )
    return TfdsSource(config.tfds_name, split, data_dir=config.root)


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
    )
