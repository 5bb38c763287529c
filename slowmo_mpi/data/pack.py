"""Packing a folder of JPEGs into one HDF5 file, by all ranks together; the format is in images.py.

    1  the ranks share the folders of classes, list their images, and tell each other
    2  rank 0 makes FILE.part: its tables, checksums 0, and room for all bytes on the disk
    3  every rank copies its share: reads an image, sees that it decodes, writes its bytes, then its checksum
    4  every rank reads back what another one wrote, and compares
    5  rank 0 gives the file its name

Once the tables are there, HDF5 is not needed: where each image goes is known, and ranks write to places of their own,
so any h5py will do. What has a checksum has been copied: killed at any time, the same command goes on.
"""

from __future__ import annotations

import contextlib
import errno
import os
import struct
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from ..checkpoint import hdf5
from ..checkpoint.files import Beginning, sync, write_at
from ..checkpoint.write import together
from ..comm import Endpoint
from ..errors import SlowmoError, UsageError
from ..units import clock, size
from .decode import check, reason
from .images import FORMAT, PART, SPLITS, VERSION, broken_limit, check_same, class_names, images_of, opened

BLOCK = 256  # images between two looks at the clock
THREADS = 4  # of a rank: a parallel file system answers several questions as fast as one
TELL_S = 10.0
_CHECKSUM = struct.Struct("<Q")


@dataclass(frozen=True)
class Packing:
    """What came of it: sound images and their bytes by split, and the number of those that are broken and left out.

    copied_bytes: by all ranks in this call, in copy_s seconds; verify_s: for reading all of it back.
    """

    images: dict[str, int]
    bytes: int
    classes: int
    broken: int
    copied_bytes: int
    copy_s: float
    verify_s: float


@dataclass(frozen=True)
class Listing:
    """The images of a split, in order: CLASS/FILE as bytes, sizes in bytes, numbers of classes; all (n,)."""

    names: np.ndarray
    sizes: np.ndarray
    labels: np.ndarray


def pack(folder: Path, file: Path, comm: Endpoint, tell: Callable[[str], None]) -> Packing:
    """Make `file` of FOLDER/train and FOLDER/val, on all ranks together.

    tell: gets lines for people: the broken images on the rank that meets them, how far it is on rank 0.
    Raises: SlowmoError, on one rank or on all, where something cannot be read or written, where too many images are
    broken, or where other bytes are read back than were written.
    """
    if file.is_dir():
        raise UsageError(f"{file} is a folder.", f"Give the packed file's name: {file / 'images.h5'}")
    if file.exists():
        raise UsageError(f"There is a {file} already.", f"To pack it anew, type: rm {file}")
    part = file.with_name(file.name + PART)
    classes, listings = _list(folder, comm)
    places, resumed = together(comm, lambda: _begin(part, classes, listings), only=0)[0]
    images = sum(len(x.names) for x in listings.values())
    if comm.rank == 0:
        counts = " + ".join(f"{len(x.names):,} {split}" for split, x in listings.items())
        total = size(sum(int(x.sizes.sum()) for x in listings.values()))
        verb = "going on with" if resumed else "packing"
        tell(f"{verb} {counts} images of {len(classes)} classes, {total}, into {part}")

    with _told(part), _Copier(folder, part, listings, places) as copier, ThreadPoolExecutor(THREADS) as threads:
        started = time.monotonic()
        copied, broken = 0, 0
        for block in _blocks(images, comm, comm.rank, "copied", tell):
            for i, (count, fault) in zip(block, threads.map(copier.copy, block), strict=True):
                copied += count
                if fault:
                    broken += 1
                    tell(f"broken, left out: {copier.source(i)} ({fault})")
            _check_broken(broken, images, folder)
        copier.sync()
        everybody = comm.gather((copied, broken))
        copied, broken = (sum(numbers) for numbers in zip(*everybody, strict=True))
        _check_broken(broken, images, folder)
        copy_s, started = time.monotonic() - started, time.monotonic()

        bad = 0  # of another rank's, which may be another host's
        for block in _blocks(images, comm, (comm.rank + 1) % comm.size, "read back", tell):
            bad += sum(not whole for whole in threads.map(copier.is_whole, block))
        copier.sync()
        bad = sum(comm.gather(bad))
        if bad:
            raise SlowmoError(
                f"{bad} images in {part} have other bytes than were written.",
                "Type the same again: they will be copied anew. If that does not help, the disk is faulty.",
            )
        verify_s = time.monotonic() - started
        found = {split: copier.sound(split) for split in listings}
    if comm.rank == 0:
        with _told(file):
            os.replace(part, file)
            sync(file.parent)
    comm.barrier()
    numbers = {split: images for split, (images, _) in found.items()}
    return Packing(numbers, sum(b for _, b in found.values()), len(classes), broken, copied, copy_s, verify_s)


def _list(folder: Path, comm: Endpoint) -> tuple[list[str], dict[str, Listing]]:
    """The classes and the images of each split, listed by all ranks together."""
    classes = together(comm, lambda: {split: class_names(folder, split) for split in SPLITS}, only=0)[0]
    check_same(classes["train"], classes["val"], folder)
    names = classes["train"]
    listings = {}
    for split in SPLITS:
        here = together(comm, partial(_sizes, folder / split, names, range(comm.rank, len(names), comm.size)))
        by_class = {c: found for told in here for c, found in told.items()}
        rows = [(os.fsencode(f"{names[c]}/{n}"), length, c) for c in range(len(names)) for n, length in by_class[c]]
        if not any(length for _, length, _ in rows):
            what = "only empty images" if rows else "no images"
            raise SlowmoError(f"{folder / split} holds class folders and {what}.", "Give the folder of the images.")
        columns = zip(*rows, strict=True)
        listings[split] = Listing(*(np.array(x, t) for x, t in zip(columns, (None, np.uint64, np.int32), strict=True)))
    return names, listings


def _sizes(place: Path, names: list[str], classes: range) -> dict[int, list[tuple[str, int]]]:
    """The images of these classes, and their sizes: 0 where a link leads nowhere, and copying will say so."""

    def size_of(image: Path) -> int:
        try:
            return image.stat().st_size
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ELOOP):
                return 0
            raise

    with _told(place, "read"):
        folders = {c: place / names[c] for c in classes}
        return {c: [(n, size_of(folder / n)) for n in images_of(folder)] for c, folder in folders.items()}


def _begin(part: Path, classes: list[str], listings: dict[str, Listing]) -> tuple[dict[str, tuple[int, int]], bool]:
    """Rank 0: the file's tables, made or found: where in the file each split's bytes and checksums begin."""
    encoded = np.array([os.fsencode(name) for name in classes])
    with contextlib.suppress(SlowmoError, OSError, KeyError):  # none of ours, or killed while it was made
        if part.exists():
            with opened(part) as found:
                if np.array_equal(found["classes"][:], encoded) and all(
                    split in found
                    and np.array_equal(found[split]["name"][:], x.names)
                    and np.array_equal(found[split]["size"][:], x.sizes)
                    for split, x in listings.items()
                ):
                    return _places(found, listings), True
    with _told(part):
        part.parent.mkdir(parents=True, exist_ok=True)
        h5py, beginning = hdf5.load(), Beginning()
        access = h5py.h5p.create(h5py.h5p.FILE_ACCESS)
        access.set_fileobj_driver(h5py.h5fd.fileobj_driver, beginning)
        with h5py.File(h5py.h5f.create(b"beginning", h5py.h5f.ACC_TRUNC, fapl=access)) as made:
            made.attrs["format"], made.attrs["version"] = FORMAT, VERSION
            made["classes"] = encoded
            for split, x in listings.items():
                group = made.create_group(split)
                group["name"], group["size"], group["label"] = x.names, x.sizes, x.labels
                group["offset"] = np.cumsum(x.sizes) - x.sizes
                group["checksum"] = np.zeros(len(x.names), np.uint64)
                creation = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
                creation.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
                creation.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
                space = h5py.h5s.create_simple((int(x.sizes.sum()),))
                h5py.h5d.create(group.id, b"bytes", h5py.h5t.STD_U8LE, space, dcpl=creation)
            places = _places(made, listings)
        beginning.store(part)
    return places, False


def _places(file: Any, listings: dict[str, Listing]) -> dict[str, tuple[int, int]]:
    return {s: (file[s]["bytes"].id.get_offset(), file[s]["checksum"].id.get_offset()) for s in listings}


def _blocks(images: int, comm: Endpoint, rank: int, verb: str, tell: Callable[[str], None]) -> Iterator[range]:
    """The share of `rank`, of the images' numbers, in blocks; on rank 0 a line now and then."""
    share = range(images * rank // comm.size, images * (rank + 1) // comm.size)
    started = told = time.monotonic()
    for first in range(share.start, share.stop, BLOCK):
        yield range(first, min(first + BLOCK, share.stop))
        now, done = time.monotonic(), first + BLOCK - share.start
        if comm.rank == 0 and now - told > TELL_S and done < len(share):
            left = (now - started) / done * (len(share) - done)
            tell(f"{verb} {done / len(share):.0%}, {clock(left)} left")
            told = now


def _check_broken(broken: int, images: int, folder: Path) -> None:
    if broken > broken_limit(images):
        raise SlowmoError(
            f"{broken} of {images} images in {folder} are broken; one in a hundred may be.", "Fetch them again."
        )


class _Copier:
    """Copies images by their numbers, through all splits in turn, and reads them back."""

    def __init__(self, folder: Path, part: Path, listings: dict[str, Listing], places: dict[str, tuple[int, int]]):
        self._folder, self._part = os.fsencode(folder), part
        self._names = np.concatenate([np.char.add(f"{split}/".encode(), x.names) for split, x in listings.items()])
        self._sizes = np.concatenate([x.sizes for x in listings.values()]).astype(np.int64)
        offsets = [np.cumsum(x.sizes) - x.sizes + places[split][0] for split, x in listings.items()]
        self._starts = np.concatenate(offsets).astype(np.int64)
        sums = [8 * np.arange(len(x.sizes)) + places[split][1] for split, x in listings.items()]
        self._sums_at = np.concatenate(sums).astype(np.int64)
        self._tables = {split: (len(x.sizes), places[split][1], x.sizes) for split, x in listings.items()}

    def __enter__(self) -> _Copier:
        self._fd = os.open(self._part, os.O_RDWR | os.O_CLOEXEC)
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def source(self, i: int) -> str:
        return os.fsdecode(os.path.join(self._folder, self._names[i]))

    def copy(self, i: int) -> tuple[int, str]:
        """How many bytes were copied, none where they are there already, and what is wrong with the image, or ""."""
        if self._checksum(i):
            return 0, ""
        try:
            data = Path(self.source(i)).read_bytes()
        except OSError as error:
            return 0, reason(error)
        fault = check(data) if len(data) == self._sizes[i] else "it changes while it is packed"
        if fault:
            return 0, fault
        write_at(self._fd, data, int(self._starts[i]))
        self._set_checksum(i, xxhash.xxh3_64_intdigest(data))
        return len(data), ""

    def is_whole(self, i: int) -> bool:
        """Whether the bytes are those that were copied, or none were; they are forgotten where they are not."""
        wanted = self._checksum(i)
        if not wanted:
            return True
        data = os.pread(self._fd, int(self._sizes[i]), int(self._starts[i]))
        whole = xxhash.xxh3_64_intdigest(data) == wanted
        if not whole:
            self._set_checksum(i, 0)
        return whole

    def sound(self, split: str) -> tuple[int, int]:
        """How many images of a split are there, and their bytes."""
        rows, start, sizes = self._tables[split]
        there = np.frombuffer(os.pread(self._fd, 8 * rows, start), "<u8") > 0
        return int(there.sum()), int(sizes[there].sum())

    def sync(self) -> None:
        """What was written is on the disk, and will be read from there."""
        os.fsync(self._fd)
        os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def _checksum(self, i: int) -> int:
        return _CHECKSUM.unpack(os.pread(self._fd, 8, int(self._sums_at[i])))[0]

    def _set_checksum(self, i: int, value: int) -> None:
        write_at(self._fd, _CHECKSUM.pack(value), int(self._sums_at[i]))


@contextlib.contextmanager
def _told(place: Path, verb: str = "written") -> Iterator[None]:
    """What the system refuses is one plain error."""
    try:
        yield
    except OSError as error:
        where = os.fsdecode(error.filename) if error.filename else place
        raise SlowmoError(
            f"{where} cannot be {verb}: {error.strerror or error}.", "Mend that, and type the same again: it goes on."
        ) from None
