"""What the tasks that name the class of an image have in common."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


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
    """The task of a classifier whose (train, test) images `read` loads at their first use."""

    def __init__(self, model: nn.Module, read: Callable[[], tuple[Images, Images]]):
        self.model, self._read = model, read

    @cached_property
    def _images(self) -> tuple[Images, Images]:
        return self._read()

    @property
    def train(self) -> Images:
        return self._images[0]

    @property
    def test(self) -> Images:
        return self._images[1]

    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean cross-entropy in nats, and `accuracy`, the fraction of labels that are the largest logit."""
        pixels, labels = batch
        logits = model(pixels)
        accuracy = (logits.detach().argmax(dim=1) == labels).to(torch.float32).mean()
        return functional.cross_entropy(logits, labels), {"accuracy": accuracy}
