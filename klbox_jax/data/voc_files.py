"""Layouts of VOC folders: the devkit's, one VOC folder alone, and a folder of images and XML files for each split."""

import os
import re
import unicodedata
from collections.abc import Mapping
from typing import NamedTuple

from klbox_jax.data.image_files import SUFFIXES, real_folders
from klbox_jax.data.source import DataError, Fault, shown
from klbox_jax.data.text_files import read_text

# Enough for the names of a million images.
_MAX_LIST_BYTES = 2**24
_KIND = "unreadable annotations"


def parse_voc_split(split: str) -> tuple[tuple[str, str], ...]:
    """Returns the (year, split) pairs of a text such as `2007_trainval+2012_trainval`; raises ValueError."""
    pairs = [part.partition("_") for part in split.split("+")]
    if not all(re.fullmatch(r"\w+", year) and re.fullmatch(r"[\w-]+", name) for year, _, name in pairs):
        raise ValueError(
            f"The split {split!r} is not of the form 2007_trainval or 2007_trainval+2012_trainval."
        )
    return tuple((year, name) for year, _, name in pairs)


class VocFolder(NamedTuple):
    """The files of one split.

    Attributes:
        names: names of the images, without suffix.
        annotation_dir, image_dir: folders of the XML files and the images.
        image_files: file name of each image by its name.
        real_folders: folders that links may lead into.
    """

    names: list[str]
    annotation_dir: str
    image_dir: str
    image_files: Mapping[str, str]
    real_folders: tuple[str, ...]

    def files_of(self, name: str) -> tuple[str, str]:
        """Returns the paths of the annotation and the image; a missing image is named as VOC would name it."""
        image = self.image_files.get(_normal(name), f"{name}.jpg")
        return os.path.join(self.annotation_dir, f"{name}.xml"), os.path.join(self.image_dir, image)


def find_voc_splits(root: str | os.PathLike) -> list[str]:
    """Returns the splits of a folder in one of the layouts, in the form of `VocSource.name`; empty if there is none.

    Lists of one class, such as `dog_train.txt`, are left out, and `train` and `val` where `trainval` holds both.
    """
    found = []
    years = sorted(name for name in _folder_names(root) if re.fullmatch(r"VOC\w+", name))
    for prefix, folder in [(f"{year.removeprefix('VOC')}_", os.path.join(root, year)) for year in years] + [
        ("", root)
    ]:
        lists = os.path.join(folder, "ImageSets", "Main")
        stems = sorted(os.path.splitext(name)[0] for name in _file_names(lists) if name.endswith(".txt"))
        stems = [stem for stem in stems if not re.fullmatch(r".+_(train|val|trainval|test)", stem)]
        parts = {"train", "val"} if "trainval" in stems else set()
        found += [prefix + stem for stem in stems if stem not in parts]
    if not found:
        found = [name for name in _folder_names(root) if _has_images_with_xml(os.path.join(root, name))]
    return found


def annotation_dirs(root: str | os.PathLike) -> list[str]:
    """Returns the folders of XML files of a folder in one of the layouts."""
    root = os.fspath(root)
    names = _folder_names(root)
    folders = [os.path.join(root, name, "Annotations") for name in names if re.fullmatch(r"VOC\w+", name)]
    folders += [os.path.join(root, "Annotations")] + [os.path.join(root, name) for name in names]
    return [folder for folder in folders if _stems(folder, (".xml",))]


def split_pairs(root: str | os.PathLike, split: str) -> tuple[tuple[str, str], ...]:
    """Returns the (year, split) pairs of a split's name in the layout of a folder; raises ValueError."""
    has_years = any(re.fullmatch(r"VOC\w+", name) for name in _folder_names(root))
    if not has_years and (parts := split.split("+")) and all(part in find_voc_splits(root) for part in parts):
        return tuple(("", part) for part in parts)
    is_single = os.path.isdir(os.path.join(root, "ImageSets", "Main")) and not has_years
    if is_single and re.fullmatch(r"[\w-]+(\+[\w-]+)*", split):
        return tuple(("", part) for part in split.split("+"))
    return parse_voc_split(split)


def open_voc_folder(root: str | os.PathLike, year: str, split: str) -> VocFolder:
    """Returns the files of a split; the year "" is the root itself. Raises DataError."""
    folder = os.path.join(root, f"VOC{year}") if year else os.fspath(root)
    if not os.path.isdir(folder):
        raise _error(
            folder, "is not a folder", "Point config.data.root to the folder that holds VOC2007 or VOC2012."
        )
    annotation_dir, image_dir = os.path.join(folder, "Annotations"), os.path.join(folder, "JPEGImages")
    alone = os.path.join(folder, split)
    if not year and not os.path.isdir(os.path.join(folder, "ImageSets")) and _has_images_with_xml(alone):
        annotation_dir = image_dir = alone
        names = sorted(_stems(alone, (".xml",)))
    else:
        names = _read_image_names(os.path.join(folder, "ImageSets", "Main", f"{split}.txt"), annotation_dir)
    image_files: dict[str, str] = {}
    for name in sorted(_file_names(image_dir)):
        stem, suffix = os.path.splitext(name)
        if suffix.lower() in SUFFIXES:
            image_files.setdefault(_normal(stem), name)
    return VocFolder(names, annotation_dir, image_dir, image_files, real_folders(image_dir, os.fspath(root)))


def _file_names(folder: str | os.PathLike) -> list[str]:
    try:
        return [entry.name for entry in os.scandir(folder) if not entry.is_dir()]
    except OSError:
        return []


def _folder_names(folder: str | os.PathLike) -> list[str]:
    try:
        return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    except OSError:
        return []


def _stems(folder: str, suffixes: tuple[str, ...]) -> set[str]:
    parts = (os.path.splitext(name) for name in _file_names(folder))
    return {stem for stem, suffix in parts if suffix.lower() in suffixes}


def _has_images_with_xml(folder: str) -> bool:
    return bool(_stems(folder, (".xml",)) & _stems(folder, SUFFIXES))


def _normal(name: str) -> str:
    # One name may be written with composed or with combining characters, as macOS stores it.
    return unicodedata.normalize("NFC", name)


def _error(path: str, what: str, remedy: str) -> DataError:
    return DataError(Fault(kind=_KIND, file=path, what=what, remedy=remedy, severity="fatal"))


def _read_image_names(path: str, annotation_dir: str) -> list[str]:
    """Returns the names that a list holds; a name may have a suffix, spaces and any signs but those of a path."""
    lines = read_text(path, _MAX_LIST_BYTES, severity="fatal").split("\n")
    lines = [line.strip() for line in lines if line.strip()]
    annotated = {_normal(stem): stem for stem in _stems(annotation_dir, (".xml",))}
    names = []
    for line in lines:
        stem, suffix = os.path.splitext(line)
        has_suffix = suffix.lower() in SUFFIXES and _normal(line) not in annotated
        name = stem if has_suffix else line
        is_name = name not in (".", "..") and not re.search(r"[/\\\0]", name)
        # A name with a space is one if it has an annotation, else a second column, as in the lists of single classes.
        if not is_name or (re.search(r"\s", name) and _normal(name) not in annotated):
            raise _error(
                path,
                f"has the line {shown(line)}, which is not the name of an image",
                "Use a list of names, without folders or a second column.",
            )
        names.append(annotated.get(_normal(name), name))
    if not names:
        raise _error(path, "lists no images", "Restore the file, or choose another split.")
    return names
