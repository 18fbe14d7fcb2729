"""From `config.data` to a data set and its preprocessing."""

import os
import pathlib
from typing import Any

from klbox_jax.data.coco import CocoSource
from klbox_jax.data.scenes import ScenesSource
from klbox_jax.data.source import Source
from klbox_jax.data.transforms import Preprocessing


def cache_folder() -> pathlib.Path:
    """Where this user's prepared data sets and compiled programs are kept."""
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "klbox_jax"


def build_source(config: Any, split: str) -> Source:
    """Returns a split of the data set that `config` (a `config.data`) names.

    Raises:
        DataError: the data set is unusable.
        ValueError: its name, or the split of the scenes, is unknown.
    """
    if config.name == "scenes":
        boxes = "noisy" if split == "train" else "exact"
        root = config.root or cache_folder() / "scenes"
        return ScenesSource(root, split, boxes=boxes, noise_scale=config.noise_scale, **config.num_images)
    if config.name == "coco":
        if not config.root:
            raise ValueError("config.data.root is empty; set it to a folder in COCO's layout")
        return CocoSource(config.root, split)
    raise ValueError(f"config.data.name = {config.name!r} is unknown; choose scenes or coco")


def build_preprocessing(config: Any) -> Preprocessing:
    """Returns the preprocessing that `config` (a `config.data`) describes; raises ValueError."""
    return Preprocessing(
        short_side=config.short_side,
        long_side=config.long_side,
        canvases=config.canvases,
        max_gt=config.max_gt,
        flip=config.flip,
        scale_jitter=config.scale_jitter,
    )
