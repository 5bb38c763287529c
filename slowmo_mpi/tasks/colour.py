"""What the tasks on colour images have in common: pixels travel as bytes and are scaled on the model's device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from slowmo_mpi.tasks import Samples
from slowmo_mpi.tasks.classification import Classification


class ColourImages(Classification):
    """Classification of batches (pixels uint8 (b, 3, h, w), labels int64 (b,)).

    mean, std: of red, green, blue, in units of a byte; pixels go to the model as (pixels - mean) / std, float32.
    """

    evaluation_batch = 256

    def __init__(
        self,
        model: nn.Module,
        read: Callable[[], tuple[Samples, Samples]],
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        label_smoothing: float = 0.0,
        top5: bool = True,
    ):
        super().__init__(model, read, label_smoothing, top5)
        self._mean, self._std = torch.tensor(mean).view(3, 1, 1), torch.tensor(std).view(3, 1, 1)

    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        return super().loss(model, self._scaled(batch))

    def evaluate(self, model: nn.Module, batch: Any) -> dict[str, Tensor]:
        return super().evaluate(model, self._scaled(batch))

    def _scaled(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        pixels, labels = batch
        if self._mean.device != pixels.device:
            self._mean, self._std = self._mean.to(pixels.device), self._std.to(pixels.device)
        return pixels.float().sub_(self._mean).div_(self._std), labels
