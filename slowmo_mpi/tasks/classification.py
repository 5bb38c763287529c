"""What the tasks that name the class of an image have in common."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from slowmo_mpi.data import NOT_COUNTED
from slowmo_mpi.errors import UsageError
from slowmo_mpi.tasks import Samples, means


class Images:
    """Labelled images, kept as bytes.

    A batch is ((pixels - mean) / std, labels): float32 (b, ...) and int64 (b,).
    `pixels` is uint8, (n, ...), `labels` uint8, (n,); `mean` and `std` are in units of a pixel's byte.
    """

    def __init__(self, pixels: Tensor, labels: Tensor, mean: float, std: float):
        self.pixels, self.labels, self.mean, self.std = pixels, labels, mean, std

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        pixels = self.pixels[indices].float().sub_(self.mean).div_(self.std)
        return pixels, self.labels[indices].long()


class Classification:
    """The task of a classifier whose (train, test) images `read` loads at their first use.

    label_smoothing: of the loss to train on, in [0, 1); top5: whether to measure that too. Raises UsageError.
    """

    def __init__(
        self,
        model: nn.Module,
        read: Callable[[], tuple[Samples, Samples]],
        label_smoothing: float = 0.0,
        top5: bool = False,
    ):
        if not 0 <= label_smoothing < 1:
            raise UsageError(
                f"task.label_smoothing = {label_smoothing:g} is not in [0, 1).", "Type --set task.label_smoothing=0.1."
            )
        self.model, self.label_smoothing, self.top5, self._read = model, label_smoothing, top5, read

    @cached_property
    def _images(self) -> tuple[Samples, Samples]:
        return self._read()

    @property
    def train(self) -> Samples:
        return self._images[0]

    @property
    def test(self) -> Samples:
        return self._images[1]

    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean cross-entropy in nats, smoothed, and `accuracy`, the fraction of labels that are the largest logit."""
        images, labels = batch
        logits = model(images)
        accuracy = (logits.detach().argmax(dim=1) == labels).to(torch.float32).mean()
        return functional.cross_entropy(logits, labels, label_smoothing=self.label_smoothing), {"accuracy": accuracy}

    def evaluate(self, model: nn.Module, batch: Any) -> dict[str, Tensor]:
        """Sums of the negative log-likelihood in nats, without smoothing, and of labels among the largest logits.

        Images whose label is NOT_COUNTED are not.
        """
        images, labels = batch
        logits = model(images).float()
        sums = {
            "samples": (labels != NOT_COUNTED).sum(),
            "loss": functional.cross_entropy(logits, labels, ignore_index=NOT_COUNTED, reduction="sum").double(),
            "accuracy": (logits.argmax(dim=1) == labels).sum(),
        }
        if self.top5:
            sums["top5"] = (logits.topk(5).indices == labels[:, None]).sum()
        return sums

    def score(self, sums: dict[str, Tensor]) -> dict[str, float]:
        """Means over all test samples."""
        return means(sums)
