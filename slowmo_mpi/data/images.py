"""Where images lie: a folder of JPEGs, or the one file that `slowmo data pack` made of it.

    FOLDER/train/<class>/*.JPEG, FOLDER/val/<class>/*.JPEG       as of ImageNet, a class being a WordNet id

    FILE, HDF5, for each split (train, val)
        /train/bytes      uint8 (all,)      the images' files, one behind the other, as they were
        /train/offset     uint64 (n,)       where in `bytes` each begins
        /train/size       uint64 (n,)       its length
        /train/checksum   uint64 (n,)       xxh3_64 of it; 0: this one was broken, and is not there
        /train/label      int32 (n,)        number of its class
        /train/name       text (n,)         of its file, below FOLDER/train
        /classes          text (classes,)   names, by number
        attrs             format, version
`bytes` lies in one piece, so an image is one read at a place that is known.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..errors import SlowmoError
from .decode import Task

SPLITS = ("train", "val")
SUFFIXES = (".jpeg", ".jpg")
FORMAT, VERSION = "slowmo-mpi images", 1
PART = ".part"  # behind the name of a file that is being packed


class Source(Protocol):
    """Numbered images of a split."""

    @property
    def classes(self) -> list[str]:
        """Names, by number."""

    @property
    def labels(self) -> np.ndarray:
        """int64, (n,)."""

    def task(self, slot: int, epoch: int, sample: int) -> Task:
        """What to tell a decoder."""

    def name(self, sample: int) -> str:
        """The image's, for messages."""


@dataclass(frozen=True)
class Folder:
    """A split of a folder of JPEGs. names: bytes (n,), each CLASS/FILE below `folder`, in order."""

    folder: Path
    classes: list[str]
    names: np.ndarray
    labels: np.ndarray

    def task(self, slot: int, epoch: int, sample: int) -> Task:
        return Task(slot, epoch, sample, 0, 0, 0, os.path.join(os.fsencode(self.folder), self.names[sample]))

    def name(self, sample: int) -> str:
        return str(self.folder / os.fsdecode(self.names[sample]))


@dataclass(frozen=True)
class Packed:
    """A split of a packed file. rows: of the sound images in the file's tables; offset: in the file; all (n,)."""

    file: Path
    split: str
    classes: list[str]
    labels: np.ndarray
    rows: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    checksum: np.ndarray

    def task(self, slot: int, epoch: int, sample: int) -> Task:
        where = int(self.offset[sample]), int(self.size[sample]), int(self.checksum[sample])
        return Task(slot, epoch, sample, *where, os.fsencode(self.file))

    def name(self, sample: int) -> str:
        with opened(self.file) as file:
            return f"{self.split}/{os.fsdecode(file[self.split]['name'][self.rows[sample]])} in {self.file}"


def source(place: Path, split: str) -> Source:
    """The images of a split, in a folder or in a packed file.

    Raises: SlowmoError where there are none, or not in these formats.
    """
    if place.is_dir():
        return folder(place, split)
    if place.is_file():
        return packed(place, split)
    if Path(f"{place}{PART}").exists():
        raise SlowmoError(f"{place} is not packed to its end.", f"Type `slowmo data pack FOLDER {place}` again.")
    raise SlowmoError(
        f"There is no {place}.",
        "Set task.data to a folder with train/ and val/, or to the file that `slowmo data pack` made of it.",
    )


# A folder


def folder(place: Path, split: str) -> Folder:
    """Classes are the folders in FOLDER/SPLIT, numbered in the order of their names; images are in that order too."""
    classes = class_names(place, split)
    found = [images_of(place / split / name) for name in classes]
    names = [os.fsencode(f"{name}/{image}") for name, images in zip(classes, found, strict=True) for image in images]
    if not names:
        raise SlowmoError(
            f"{place / split} holds class folders and no images.", f"Images end in {' or '.join(SUFFIXES)}."
        )
    labels = np.repeat(np.arange(len(classes)), [len(images) for images in found])
    return Folder(place / split, classes, np.array(names), labels)


def class_names(place: Path, split: str) -> list[str]:
    """The folders in FOLDER/SPLIT, sorted. Raises: SlowmoError where there are none, with what to do about it."""
    try:
        with os.scandir(place / split) as entries:
            all_names = [(entry.name, entry.is_dir()) for entry in entries]
    except FileNotFoundError:
        raise SlowmoError(
            f"{place} has no folder {split}.", f"Give the folder that holds {' and '.join(f'{s}/' for s in SPLITS)}."
        ) from None
    except OSError as error:
        raise SlowmoError(f"{place / split} cannot be read: {error.strerror or error}.", "Mend that first.") from None
    classes = sorted(name for name, is_folder in all_names if is_folder and not name.startswith("."))
    if not classes:
        loose = any(name.lower().endswith(SUFFIXES) for name, _ in all_names)
        what = "images, but not in folders of their classes" if loose else "no folders of classes"
        raise SlowmoError(
            f"{place / split} holds {what}.", f"Put each class into a folder of its own: {split}/n01440764/*.JPEG."
        )
    return classes


def images_of(place: Path) -> list[str]:
    """The names of the images in a class's folder, sorted."""
    try:
        with os.scandir(place) as entries:
            names = [entry.name for entry in entries if not entry.name.startswith(".")]  # a Mac's ._a.JPEG is none
            return sorted(name for name in names if name.lower().endswith(SUFFIXES))
    except OSError as error:
        raise SlowmoError(f"{place} cannot be read: {error.strerror or error}.", "Mend that first.") from None


# A packed file


def packed(place: Path, split: str) -> Packed:
    """Read the tables of a packed file. Raises: SlowmoError where it is none, is cut short, or lacks the split."""
    with opened(place) as file:
        if split not in file:
            raise SlowmoError(f"{place} holds no images for {split}.", "Pack a folder that has them.")
        tables = file[split]
        size, checksum = tables["size"][:], tables["checksum"][:]
        first, end = tables["bytes"].id.get_offset(), tables["bytes"].id.get_offset() + tables["bytes"].shape[0]
        if place.stat().st_size < end:
            raise SlowmoError(
                f"{place} is cut short: {place.stat().st_size} bytes, where {end} were expected.",
                "Copy it again, or pack it again.",
            )
        rows = np.flatnonzero(checksum)
        return Packed(
            place, split, [os.fsdecode(name) for name in file["classes"][:]], tables["label"][:][rows].astype(np.int64),
            rows, first + tables["offset"][:][rows], size[rows], checksum[rows],
        )  # fmt: skip


def opened(place: Path) -> Any:
    """A packed file, opened by h5py for reading. Raises: SlowmoError where it is none."""
    from ..checkpoint import hdf5

    hint = "Set task.data to a folder with train/ and val/, or to the file that `slowmo data pack` made of it."
    try:
        file = hdf5.load().File(place, "r")
    except OSError as error:
        raise SlowmoError(f"{place} cannot be read as HDF5: {' '.join(str(error).split())}.", hint) from None
    found = file.attrs.get("format"), int(file.attrs.get("version", 0))
    if found != (FORMAT, VERSION):
        file.close()
        raise SlowmoError(f"{place} is no file of images: its format is {found}, not {(FORMAT, VERSION)}.", hint)
    return file


def check_same(train: Sequence[str], val: Sequence[str], place: Path) -> None:
    """Raises: SlowmoError where training and validation have other classes."""
    if list(train) != list(val):
        odd = sorted(set(train) ^ set(val))
        raise SlowmoError(
            f"The classes of {place} differ: {', '.join(odd[:3])}{', ...' if len(odd) > 3 else ''} "
            f"{'is' if len(odd) == 1 else 'are'} in train or in val alone.",
            "Both must have the same folders of classes.",
        )


def broken_limit(images: int) -> int:
    """How many of so many images may be broken: one, and one in a hundred, but not all."""
    return min(1 + images // 100, images - 1)
