"""ImageNet (Russakovsky et al. 2015), or images laid out like it: a folder of JPEGs, or one packed file.

The formats are in `slowmo_mpi/data/images.py`, the decoding is in `slowmo_mpi/data/loader.py`.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from slowmo_mpi.data import images
from slowmo_mpi.data.loader import Images
from slowmo_mpi.errors import SlowmoError, UsageError
from slowmo_mpi.models.resnet import resnet50
from slowmo_mpi.tasks import Context
from slowmo_mpi.tasks.colour import ColourImages

MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # of ImageNet's bytes: red, green, blue


def imagenet(
    context: Context,
    *,
    classes: int = 1000,
    image: int = 224,
    width: int = 64,
    workers: int = 4,
    label_smoothing: float = 0.0,
) -> ColourImages:
    """ResNet-50 with `width` channels in its first stage: 25,557,032 parameters with 64, for 1000 classes.

    The images are read from `context.data`, which is needed: a folder with train/ and val/, or the file that
    `slowmo data pack` made of it. In training a random part of each, mirrored half of the time, is resized to
    `image` x `image`; in testing the centre is. `workers` processes per rank decode them, ahead of the training; with
    0 the rank does so itself.
    Raises UsageError for numbers without a meaning; reading raises SlowmoError, at the first use of the data.
    """
    for key, value, least in ("classes", classes, 2), ("image", image, 1), ("width", width, 1), ("workers", workers, 0):
        if value < least:
            raise UsageError(f"task.{key} = {value} is less than {least}.", f"Set task.{key} to {least} or more.")
    read_here = partial(read, context.data, classes, image, context.seed, workers)
    task = ColourImages(resnet50(classes, width), read_here, MEAN, STD, label_smoothing, top5=classes >= 5)
    task.evaluation_batch = 64
    return task


def read(data: str, classes: int, side: int, seed: int, workers: int) -> tuple[Images, Images]:
    """The (train, test) images. Raises: SlowmoError where the data are not as expected."""
    if not data:
        raise SlowmoError(
            "task.data is not set; it is the folder with ImageNet's train/ and val/, or a packed file.",
            "Type --set task.data=FOLDER.",
        )
    place = Path(data).expanduser()
    train, val = images.source(place, "train"), images.source(place, "val")
    images.check_same(train.classes, val.classes, place)
    if len(train.classes) != classes:
        raise SlowmoError(
            f"{place} has {len(train.classes)} classes, and the model is made for {classes}.",
            f"Type --set task.classes={len(train.classes)}, or set task.data to the right place.",
        )
    return Images(train, side, seed, True, workers), Images(val, side, seed, False, workers)
