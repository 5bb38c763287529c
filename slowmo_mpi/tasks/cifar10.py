"""CIFAR-10 (Krizhevsky 2009): 60,000 colour images, 32x32, in ten classes; the binary version.

data_batch_1.bin ... data_batch_5.bin, test_batch.bin      records of 3,073 bytes: the label, then the red, the
                                                           green and the blue pixels, row by row
batches.meta.txt                                           the names of the classes, a line each
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from slowmo_mpi.errors import SlowmoError, UsageError
from slowmo_mpi.models.resnet import resnet18
from slowmo_mpi.tasks import Context
from slowmo_mpi.tasks.colour import ColourImages

CLASSES, SIDE, PADDING = 10, 32, 4
RECORD_BYTES = 1 + 3 * SIDE * SIDE
TRAIN, TEST, NAMES = [f"data_batch_{i}.bin" for i in range(1, 6)], "test_batch.bin", "batches.meta.txt"
ARCHIVE = "cifar-10-batches-bin"  # the folder that the archive unpacks to
MEAN, STD = (125.3, 123.0, 113.9), (63.0, 62.1, 66.7)  # of the training images' bytes: red, green, blue


def cifar10(context: Context, *, width: int = 64, label_smoothing: float = 0.0) -> ColourImages:
    """ResNet-18 for small images, with `width` channels in its first stage: 11,173,962 parameters with 64.

    The images are read from the binary version in `context.data`, which is needed. In training each is padded by 4
    black pixels, cropped to 32x32 at random, and half of the time mirrored, anew in every epoch.
    Raises UsageError when `width` < 1; reading raises SlowmoError, at the first use of the data.
    """
    if width < 1:
        raise UsageError(f"task.width = {width} is not positive.", "Set task.width to 1 or more.")
    read_here = partial(read, context.data, context.seed)
    return ColourImages(resnet18(CLASSES, width), read_here, MEAN, STD, label_smoothing)


class Cifar:
    """Images in memory: pixels uint8 (n, 3, 32, 32), labels uint8 (n,). augment: as in training."""

    def __init__(self, pixels: np.ndarray, labels: np.ndarray, seed: int, augment: bool):
        self.pixels, self.labels, self.seed, self.augment = pixels, labels, seed, augment
        self._epoch = -1
        self._moves = np.zeros((0, 3), np.uint8)  # of each image in that epoch: down, right, mirrored

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """The images as they are: uint8 (b, 3, 32, 32), and labels, int64 (b,)."""
        chosen = indices.numpy()
        return torch.from_numpy(self.pixels[chosen]), torch.from_numpy(self.labels[chosen].astype(np.int64))

    def batches(self, order: Iterable[tuple[int, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
        """A batch for each (epoch, indices): augmented, which depends on seed, epoch and image alone, or as it is."""
        for epoch, indices in order:
            pixels, labels = self.batch(indices)
            yield (self._moved(pixels.numpy(), epoch, indices.numpy()) if self.augment else pixels), labels

    def _moved(self, pixels: np.ndarray, epoch: int, indices: np.ndarray) -> Tensor:
        if epoch != self._epoch:  # the third number makes it another stream than that of the order of samples
            chance = np.random.Generator(np.random.PCG64(np.random.SeedSequence([self.seed, epoch, 1])))
            self._moves = chance.integers(0, [2 * PADDING + 1, 2 * PADDING + 1, 2], (len(self), 3), np.uint8)
            self._epoch = epoch
        down, right, mirrored = self._moves[indices].T
        wide = np.pad(pixels, ((0, 0), (0, 0), (PADDING, PADDING), (PADDING, PADDING)))
        windows = np.lib.stride_tricks.sliding_window_view(wide, (SIDE, SIDE), axis=(2, 3))  # (b, 3, 9, 9, 32, 32)
        moved = windows[np.arange(len(wide)), :, down, right]
        moved[mirrored == 1] = moved[mirrored == 1][..., ::-1]
        return torch.from_numpy(moved)


def read(place: str, seed: int) -> tuple[Cifar, Cifar]:
    """The (train, test) images in the folder `place`, or in the folder of the archive's name in it.

    Raises: SlowmoError where a file is missing, cut short, or not CIFAR-10's.
    """
    folder = _folder(place)
    _check_names(folder)
    *batches, test = (_read(folder / name) for name in (*TRAIN, TEST))
    for name, (labels, _) in zip((*TRAIN, TEST), [*batches, test], strict=True):
        if len(labels) != len(batches[0][0]):
            raise SlowmoError(
                f"{folder / name} holds {len(labels)} images, and {TRAIN[0]} {len(batches[0][0])}: one is cut short.",
                _hint(folder),
            )
    labels, pixels = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    test_labels, test_pixels = test
    return Cifar(pixels, labels, seed, augment=True), Cifar(test_pixels, test_labels, seed, augment=False)


def _folder(place: str) -> Path:
    folder = Path(place).expanduser()
    if not place or not folder.is_dir():
        what = f"There is no folder {folder}" if place else "task.data is not set; it is the folder"
        raise SlowmoError(f"{what} with CIFAR-10.", _hint(folder if place else Path("data")))
    return folder / ARCHIVE if (folder / ARCHIVE).is_dir() else folder


def _check_names(folder: Path) -> None:
    """The classes' names are not used, but tell CIFAR-10 from its kin."""
    try:
        names = (folder / NAMES).read_text(encoding="ascii", errors="replace").split()
    except FileNotFoundError:
        if (folder / TRAIN[0].removesuffix(".bin")).exists():
            raise SlowmoError(f"{folder} holds the Python version of CIFAR-10.", _hint(folder)) from None
        raise SlowmoError(f"{folder} has no {NAMES}, so it is not CIFAR-10's folder.", _hint(folder)) from None
    except OSError as error:
        raise SlowmoError(f"{folder / NAMES} cannot be read: {error.strerror or error}.", _hint(folder)) from None
    if len(names) != CLASSES:
        raise SlowmoError(f"{folder / NAMES} names {len(names)} classes, and CIFAR-10 has {CLASSES}.", _hint(folder))


def _read(file: Path) -> tuple[np.ndarray, np.ndarray]:
    """Labels uint8 (n,) and pixels uint8 (n, 3, 32, 32)."""
    try:
        data = np.fromfile(file, np.uint8)
    except FileNotFoundError:
        raise SlowmoError(f"There is no file {file}.", _hint(file.parent)) from None
    except OSError as error:
        raise SlowmoError(f"{file} cannot be read: {error.strerror or error}.", _hint(file.parent)) from None
    if not len(data) or len(data) % RECORD_BYTES:
        raise SlowmoError(
            f"{file} is cut short: {len(data)} bytes are not a number of records of {RECORD_BYTES}.",
            _hint(file.parent),
        )
    records = data.reshape(-1, RECORD_BYTES)
    if (largest := int(records[:, 0].max())) >= CLASSES:
        raise SlowmoError(f"{file} has the label {largest}, and those of CIFAR-10 are 0 to 9.", _hint(file.parent))
    return records[:, 0], records[:, 1:].reshape(-1, 3, SIDE, SIDE)


def _hint(folder: Path) -> str:
    return f"Unpack the binary version of CIFAR-10 (cifar-10-binary.tar.gz), and type --set task.data={folder}."
