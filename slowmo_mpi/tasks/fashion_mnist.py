"""Fashion-MNIST (Xiao et al. 2017, arXiv 1708.07747): 70,000 grey images, 28x28, in ten classes."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from slowmo_mpi.errors import SlowmoError, UsageError
from slowmo_mpi.tasks import Context, idx
from slowmo_mpi.tasks.classification import Classification, Images

DEBIAN_FOLDER = "/usr/share/datasets/fashion-mnist"
"""Where Debian's and Ubuntu's package `dataset-fashion-mnist` puts the four files."""

CLASSES = 10
MEAN, STD = 72.94, 90.02  # of the training images' bytes


def fashion_mnist(context: Context, *, width: int = 16, label_smoothing: float = 0.0) -> Classification:
    """A small convolutional network with batch normalisation, `width` channels in its first layer.

    60,000 images to train and 10,000 to test, from the four IDX files (gzipped or not) in `context.data`.
    Raises UsageError when `width` < 1; reading raises SlowmoError, at the first use of the data.
    """
    if width < 1:
        raise UsageError(f"task.width = {width} is not positive.", "Set task.width to 1 or more.")
    return Classification(network(width), partial(read, context.data or DEBIAN_FOLDER), label_smoothing)


class ChannelsLast(nn.Module):
    """Grey images (b, h, w) -> (b, 1, h, w) whose memory order is channels last: half the time on a CPU.

    With one channel both orders hold the same bytes; the strides alone tell the convolutions which to use.
    """

    def forward(self, images: Tensor) -> Tensor:
        return images.unsqueeze(-1).movedim(-1, 1)


def network(width: int) -> nn.Sequential:
    """(b, 28, 28) -> logits (b, 10)."""

    def layer(inputs: int, outputs: int) -> list[nn.Module]:
        # No bias: the normalisation would take it out again. Pooling first leaves it a quarter of the work.
        convolution = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        return [convolution, nn.MaxPool2d(2), nn.BatchNorm2d(outputs), nn.ReLU()]

    return nn.Sequential(
        ChannelsLast(),
        *layer(1, width),  # 14 x 14
        *layer(width, 2 * width),  # 7 x 7
        *layer(2 * width, 4 * width),  # 3 x 3
        nn.Flatten(),
        nn.Linear(9 * 4 * width, CLASSES),
    )


def read(folder: str) -> tuple[Images, Images]:
    """The (train, test) images in `folder`.

    Raises SlowmoError when a file is missing or damaged, when there are not as many images as labels, or
    when a label is not 0..9.
    """
    return _read_split(Path(folder).expanduser(), "train"), _read_split(Path(folder).expanduser(), "t10k")


def _read_split(folder: Path, split: str) -> Images:
    images, labels = _file(folder, f"{split}-images-idx3-ubyte"), _file(folder, f"{split}-labels-idx1-ubyte")
    pixels, classes = _read_bytes(images, 3), _read_bytes(labels, 1)
    if pixels.shape[1:] != (28, 28):
        size = " x ".join(map(str, pixels.shape[1:]))
        raise SlowmoError(f"{images} holds images of {size}, where 28 x 28 was expected.", _hint(folder))
    if len(pixels) != len(classes):
        raise SlowmoError(
            f"{images} holds {len(pixels)} images and {labels.name} {len(classes)} labels, where as many of "
            "one as of the other were expected.",
            _hint(folder),
        )
    if (largest := int(classes.max())) >= CLASSES:
        raise SlowmoError(f"{labels} holds the label {largest}, where 0 to 9 was expected.", _hint(folder))
    return Images(pixels, classes, MEAN, STD)


def _read_bytes(file: Path, dimensions: int) -> Tensor:
    return torch.from_numpy(idx.read(file, dtype="uint8", dimensions=dimensions, hint=_hint(file.parent)))


def _file(folder: Path, name: str) -> Path:
    if not folder.is_dir():
        raise SlowmoError(f"There is no folder {folder} with the files of Fashion-MNIST.", _hint(folder))
    for file in (folder / name, folder / f"{name}.gz"):
        if file.exists():
            return file
    raise SlowmoError(f"The folder {folder} holds neither {name} nor {name}.gz.", _hint(folder))


def _hint(folder: Path) -> str:
    if str(folder) == DEBIAN_FOLDER:
        return (
            "Type: apt-get install --reinstall dataset-fashion-mnist, or set task.data to a folder with the four files."
        )
    return (
        "Put the four files of Fashion-MNIST there, or leave task.data empty and type: "
        "apt-get install dataset-fashion-mnist"
    )
