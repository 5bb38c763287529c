"""Scikit-learn's handwritten digits: 1,797 images of 8x8, in memory at once, for a run of seconds."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from slowmo_mpi.errors import SlowmoError, UsageError
from slowmo_mpi.tasks import Context
from slowmo_mpi.tasks.classification import Classification, Images

TEST_SAMPLES = 297


def digits(context: Context, *, hidden: int = 64, label_smoothing: float = 0.0) -> Classification:
    """A perceptron with one hidden layer of `hidden` units: 75 `hidden` + 10 parameters.

    1,500 images to train, 297 to test, split once and for all. Raises UsageError when `hidden` < 1.
    """
    if hidden < 1:
        raise UsageError(f"task.hidden = {hidden} is not positive.", "Set task.hidden to 1 or more.")
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, 10))
    return Classification(model, read, label_smoothing)


def read() -> tuple[Images, Images]:
    """The (train, test) images. Raises SlowmoError without scikit-learn, whose package they are part of."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise SlowmoError(
            f"The task 'digits' reads its images from scikit-learn, and Python cannot import it: {error}.",
            "Type: pip install scikit-learn",
        ) from error
    pixels, labels = load_digits(return_X_y=True)  # pixels are whole numbers 0..16
    order = np.random.Generator(np.random.PCG64(0)).permutation(len(labels))  # one split for every seed
    x = torch.from_numpy(pixels[order].astype(np.uint8)).reshape(-1, 8, 8)
    y = torch.from_numpy(labels[order].astype(np.uint8))
    train, test = slice(None, -TEST_SAMPLES), slice(-TEST_SAMPLES, None)
    return Images(x[train], y[train], mean=4.9, std=6.0), Images(x[test], y[test], mean=4.9, std=6.0)
