"""The tasks of studies.py: a small ResNet on Fashion-MNIST, and the quadratic with what the theorem speaks of."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from slowmo_mpi.tasks import Context
from slowmo_mpi.tasks.classification import Classification, Images
from slowmo_mpi.tasks.fashion_mnist import CLASSES, DEBIAN_FOLDER, read
from slowmo_mpi.tasks.quadratic import Quadratic, quadratic


class Block(nn.Module):
    """x + f(x), rectified; f is two 3x3 convolutions, and the last scale starts at 0."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        nn.init.zeros_(self.bn2.weight)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x)))))
        return functional.relu(y + self.shortcut(x))


class SmallResNet(nn.Module):
    """(b, 28, 28) -> logits (b, 10) in 8 layers: 19,714 parameters with 8 channels in the first."""

    def __init__(self, width: int = 8):
        super().__init__()
        self.stem = nn.Conv2d(1, width, 5, 4, 2, bias=False)  # 7 x 7: the studies need hundreds of runs
        self.bn = nn.BatchNorm2d(width)
        self.blocks = nn.Sequential(Block(width, width, 1), Block(width, 2 * width, 2), Block(2 * width, 4 * width, 2))
        self.linear = nn.Linear(4 * width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.bn(self.stem(x[:, None])))
        return self.linear(self.blocks(x).mean((2, 3)))


def fashion(context: Context, *, dirichlet: float = 0.0) -> Classification:
    """Fashion-MNIST. dirichlet: 0, or the concentration of a split into shares that differ by rank in their classes."""

    def images() -> tuple[Images, Images]:
        train, test = _read(context.data or DEBIAN_FOLDER)
        return (Skewed(train, dirichlet, context) if dirichlet else train), test

    return Classification(SmallResNet(), images)


_read = cache(read)  # once for all simulated ranks


class Skewed(Images):
    """Every rank draws from a share of its own, whose classes have proportions from a Dirichlet distribution.

    As in Hsu et al. 2019 (arXiv 1909.06335), with shares of one size: N / m samples, some of them in several shares.
    """

    def __init__(self, images: Images, concentration: float, context: Context):
        super().__init__(images.pixels, images.labels, images.mean, images.std)
        random = np.random.Generator(np.random.PCG64(np.random.SeedSequence([context.seed, context.rank, 1909])))
        labels = images.labels.numpy()
        proportions = random.dirichlet(np.full(CLASSES, concentration))
        counts = random.multinomial(len(labels) // context.ranks, proportions)
        members = [np.flatnonzero(labels == c) for c in range(CLASSES)]
        chosen = [random.choice(members[c], n, replace=n > len(members[c])) for c, n in enumerate(counts)]
        self.share = torch.from_numpy(random.permutation(np.concatenate(chosen)))

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        return super().batch(self.share[indices % len(self.share)])


def theory(context: Context, **options: Any) -> Quadratic:
    """The quadratic; shown is also `gradient`, |grad f|^2 of the mean f at the worker's own point."""
    task = quadratic(context, **options)
    loss, scale, optimum = task.loss, task.eigenvalues.float(), task.optimum.float()

    def with_gradient(model: nn.Module, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        value, shown = loss(model, batch)
        return value, {**shown, "gradient": (scale * (model().detach() - optimum)).square().sum()}

    task.loss = with_gradient  # type: ignore[method-assign]
    return task
