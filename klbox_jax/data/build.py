"""Construction of data sets and their preprocessing from `config.data`.

A data set of your own needs no change here: write a function that takes `config.data` and a split and returns a
`Source`, and pass `SOURCES | {"my_set": make_my_set}` as `sources`; `config.data.name = "my_set"` selects it.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from absl import logging

from klbox_jax.data.coco import CocoFiles, CocoSource
from klbox_jax.data.hold_out import split_held_out
from klbox_jax.data.image_files import ImageRules
from klbox_jax.data.layout import find_coco_splits, find_layout, resolve_split
from klbox_jax.data.scenes import ScenesSource
from klbox_jax.data.source import DataError, FaultHandler, SkipFaulty, Source, raise_fault, shown
from klbox_jax.data.statistics import check_learnable, compute_statistics, find_problems, summary_line
from klbox_jax.data.tfds_source import TfdsSource
from klbox_jax.data.transforms import Preprocessing
from klbox_jax.data.voc import VOC_CLASSES, VocSource
from klbox_jax.data.voc_annotations import collect_class_names
from klbox_jax.data.voc_files import annotation_dirs, split_pairs
from klbox_jax.data.yolo import YoloSource
from klbox_jax.files import cache_folder

# Makes a split of a data set from `config.data` and the name of the split.
SourceMaker = Callable[[Any, str], Source]


def read_scenes(config: Any, split: str, on_fault: FaultHandler) -> Source:
    """Returns a split of the embedded scenes: train, validation, calibration or test; they have no faults."""
    del on_fault
    return ScenesSource(
        config.root or cache_folder() / "scenes",
        split,
        boxes="noisy" if split == "train" else "exact",
        masks=config.get("mask_size", 0) > 0,
        noise_scale=config.noise_scale,
        **config.num_images,
    )


def read_coco(config: Any, split: str, on_fault: FaultHandler) -> Source:
    """Returns a split of a folder in COCO's or Roboflow's layout, or with paths of its own.

    `config.annotation_file` and `config.image_dir` are paths, absolute or relative to the root; `{split}` in them is
    replaced by the split.
    """
    fields = {key: config.get(key, "") for key in ("annotation_file", "image_dir")}
    fields = {key: path.replace("{split}", split) for key, path in fields.items()}
    found = find_coco_splits(config.root)
    known = found.get(split, CocoFiles())
    if not found and not fields["annotation_file"]:
        _check_layout(config.root, "coco")
    return CocoSource(
        config.root,
        split,
        masks=config.get("mask_size", 0) > 0,
        skip_empty_boxes=config.get("skip_empty_boxes", False),
        files=CocoFiles(
            annotation_file=fields["annotation_file"] or known.annotation_file,
            image_dir=fields["image_dir"] or known.image_dir,
            images=_image_rules(config),
        ),
        on_fault=on_fault,
    )


def read_voc(config: Any, split: str, on_fault: FaultHandler) -> Source:
    """Returns a split of a folder in VOC's layout, e.g. `2007_test`, or `2007_trainval+2012_trainval` for several."""
    return _read_voc(config, split, on_fault, tuple(config.get("class_names", ())) or VOC_CLASSES)


def _read_voc(config: Any, split: str, on_fault: FaultHandler, class_names: tuple[str, ...]) -> Source:
    return VocSource(
        config.root,
        split_pairs(config.root, split),
        class_names=class_names,
        first_pixel=config.get("voc_first_pixel", 1),
        images=_image_rules(config),
        on_fault=on_fault,
    )


def read_yolo(config: Any, split: str, on_fault: FaultHandler) -> Source:
    """Returns a split of a folder with YOLO's `data.yaml`: train, val or test."""
    return YoloSource(
        config.root,
        split,
        masks=config.get("mask_size", 0) > 0,
        skip_empty_boxes=config.get("skip_empty_boxes", False),
        images=_image_rules(config),
        on_fault=on_fault,
    )


def read_tfds(config: Any, split: str, on_fault: FaultHandler) -> Source:
    """Returns a split of the set `config.tfds_name` (e.g. `voc/2007`) that tensorflow-datasets prepared in the root."""
    if not config.get("tfds_name", ""):
        raise ValueError(
            "config.data.tfds_name is empty; set it to the name of a prepared set, e.g. voc/2007"
        )
    return TfdsSource(config.tfds_name, split, data_dir=config.root, on_fault=on_fault)


def read_any(config: Any, split: str, on_fault: FaultHandler) -> Source:
    """Returns a split of a folder in COCO's, Roboflow's, VOC's or YOLO's layout, which is detected and logged.

    The split is found by its kind if there is none of its name. VOC's classes are collected from the XML files if
    `config.class_names` is empty.
    """
    if config.get("annotation_file", ""):
        return read_coco(config, split, on_fault)
    layout = find_layout(config.root)
    found = resolve_split(split, list(layout.splits), root=config.root)
    logging.info("%s has the layout %s; split %s for %s", config.root, layout.description, found, split)
    if layout.name == "voc" and not config.get("class_names", ()):
        names = collect_class_names(annotation_dirs(config.root))
        logging.info("%s has the classes %s", config.root, ", ".join(map(shown, names)))
        return _read_voc(config, found, on_fault, names)
    return READERS[layout.name](config, found, on_fault)


# The reader of each value of `config.data.name`.
READERS: Mapping[str, Callable[[Any, str, FaultHandler], Source]] = MappingProxyType(
    {
        "auto": read_any,
        "coco": read_coco,
        "scenes": read_scenes,
        "tfds": read_tfds,
        "voc": read_voc,
        "yolo": read_yolo,
    }
)


def _make(config: Any, split: str) -> Source:
    """Returns a split of a built-in data set; `config.on_bad_record` decides what happens to faults."""
    if config.name != "scenes" and not config.root:
        raise ValueError(f"config.data.root is empty; set it to the folder of the {config.name} data set")
    if config.get("on_bad_record", "stop") != "skip":
        return READERS[config.name](config, split, raise_fault)
    skip = SkipFaulty()
    source = READERS[config.name](config, split, skip)
    if skip.count:
        logging.warning(
            "%s: images were left out for %d faults; %d remain", source.name, skip.count, len(source.records)
        )
    return source


# The data sets by their `config.data.name`. Extend it with `SOURCES | {"my_set": make_my_set}`.
SOURCES: Mapping[str, SourceMaker] = dict.fromkeys(READERS, _make)


def build_source(config: Any, split: str, sources: Mapping[str, SourceMaker] = SOURCES) -> Source:
    """Returns a split of the data set that `config` names, and logs its counts and what is suspicious.

    The built-in names are auto, coco, scenes, tfds, voc and yolo; see `READERS`. Images that have a fault, or an
    object with a fault, are refused, or with `on_bad_record = "skip"` left out with a warning each.

    Args:
        config: a `config.data`.
        split: a split of the data set.
        sources: the known data sets: a function from `config` and split to a `Source`, by `config.name`.

    Raises:
        DataError: the data set is unusable.
        ValueError: its name, its root or a split is missing or unknown.
    """
    if config.name not in sources:
        raise ValueError(
            f"config.data.name = {config.name!r} is unknown; choose one of {', '.join(sorted(sources))}"
        )
    source = sources[config.name](config, split)
    if source.records:
        statistics = compute_statistics(source)
        logging.info("%s", summary_line(statistics))
        for problem in find_problems(statistics):
            logging.warning("%s", problem)
    return source


def build_train_source(config: Any, sources: Mapping[str, SourceMaker] = SOURCES) -> Source:
    """Returns the training split, without the images that `config.hold_out`, a share of them, holds out.

    Raises:
        DataError: see `build_source`; or there is no object to learn.
        ValueError: see `build_source`; or `hold_out` is not a share, or leaves nothing.
    """
    source = build_source(config, config.train_split, sources)
    share = config.get("hold_out", 0.0)
    kept = split_held_out(source, share)[0] if share else source
    if kept.records and all(record.is_crowd.all() for record in kept.records):
        check_learnable(compute_statistics(kept))
    return kept


def build_calibration_source(config: Any, sources: Mapping[str, SourceMaker] = SOURCES) -> Source:
    """Returns the images for the calibration of the stds: those of `hold_out`, or else the `calibration_split`.

    Raises:
        DataError: the data set is unusable.
        ValueError: neither is set, the split shares parts with the training or evaluation split, or see
            `build_source`.
    """
    share = config.get("hold_out", 0.0)
    if share:
        return split_held_out(build_source(config, config.train_split, sources), share)[1]
    split = config.get("calibration_split", "")
    if not split:
        raise ValueError(
            "there are no images to calibrate on: set config.data.calibration_split to a split that is neither trained "
            "on nor reported, or train with config.data.hold_out = 0.1, which holds out a tenth of the training images"
        )
    for field in ("train_split", "eval_split"):
        if set(split.split("+")) & set(config[field].split("+")):
            raise ValueError(
                f"config.data.calibration_split = {split!r} has images of config.data.{field} = {config[field]!r}; "
                "calibrate on images that are neither trained on nor reported"
            )
    return build_source(config, split, sources)


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


def _image_rules(config: Any) -> ImageRules:
    return ImageRules(allow_links=config.get("allow_links", False))


def _check_layout(root: str, name: str) -> None:
    """Raises DataError if a folder has another layout than the config says."""
    try:
        layout = find_layout(root)
    except DataError:
        return  # The reader names the file that it does not find.
    if layout.name != name:
        raise DataError(
            f"{root} is not in COCO's layout but in that of {layout.description}; set config.data.name to "
            f"'{layout.name}', or to 'auto'."
        )
