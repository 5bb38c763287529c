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


def normalisation(channels: int, by_group: bool) -> nn.Module:
    """Over the batch, or over the groups of each sample's channels."""
    return nn.GroupNorm(2, channels) if by_group else nn.BatchNorm2d(channels)


class Block(nn.Module):
    """x + f(x), rectified; f is two 3x3 convolutions, and the last scale starts at 0."""

    def __init__(self, inputs: int, outputs: int, stride: int, by_group: bool):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = normalisation(outputs, by_group)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = normalisation(outputs, by_group)
        nn.init.zeros_(self.bn2.weight)  # type: ignore[arg-type]
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x)))))
        return functional.relu(y + self.shortcut(x))


class SmallResNet(nn.Module):
    """(b, 28, 28) -> logits (b, 10) in 8 layers: 19,842 parameters with 8 channels in the first."""

    def __init__(self, by_group: bool, width: int = 8):
        super().__init__()
        self.stem = nn.Conv2d(1, width, 5, 4, 2, bias=False)  # 7 x 7: the studies need hundreds of runs
        self.bn = normalisation(width, by_group)
        self.blocks = nn.Sequential(
            Block(width, width, 1, by_group),
            Block(width, 2 * width, 2, by_group),
            Block(2 * width, 4 * width, 2, by_group),
        )
        self.linear = nn.Linear(4 * width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.bn(self.stem(x[:, None])))
        return self.linear(self.blocks(x).mean((2, 3)))


def fashion(context: Context, *, dirichlet: float = 0.0, group_norm: bool = False) -> Classification:
    """Fashion-MNIST. dirichlet: 0, or the concentration of a split into shares that differ by rank in their classes."""

    def images() -> tuple[Images, Images]:
        train, test = _read(context.data or DEBIAN_FOLDER)
        return (Shared(train, context, dirichlet) if dirichlet else train), test

    return Classification(SmallResNet(group_norm), images)


_read = cache(read)  # once for all simulated ranks


class Shared(Images):
    """All images, of which this rank draws from its own share only."""

    def __init__(self, images: Images, context: Context, concentration: float):
        super().__init__(images.pixels, images.labels, images.mean, images.std)
        shares = split(images.labels.numpy().tobytes(), context.ranks, concentration, context.seed)
        self.share = torch.from_numpy(shares[context.rank])

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        return super().batch(self.share[indices % len(self.share)])


@cache
def split(labels: bytes, ranks: int, concentration: float, seed: int) -> list[np.ndarray]:
    """Indices of the samples, for each rank as many, in all every sample once (but for the last few).

    Each rank's classes have proportions from a symmetric Dirichlet distribution, of those classes that still have
    samples (Hsu et al. 2019, arXiv 1909.06335). labels: a byte each.
    """
    random = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, 1909])))
    classes = np.frombuffer(labels, np.uint8)
    left = [list(random.permutation(np.flatnonzero(classes == c))) for c in range(CLASSES)]
    shares = []
    for _ in range(ranks):
        weights, mine = random.dirichlet(np.full(CLASSES, concentration)), []
        while missing := len(classes) // ranks - len(mine):
            rest = weights * [bool(samples) for samples in left]
            rest = rest if rest.sum() > 0 else np.array([float(bool(samples)) for samples in left])
            for samples, n in zip(left, random.multinomial(missing, rest / rest.sum()), strict=True):
                mine += samples[:n]
                del samples[:n]
        shares.append(random.permutation(np.array(mine)))
    return shares


def theory(context: Context, **options: Any) -> Quadratic:
    """The quadratic; shown is also `gradient`, |grad f|^2 of the mean f: evaluated, at the workers' mean."""
    task = quadratic(context, **options)
    loss, scale, optimum = task.loss, task.eigenvalues.float(), task.optimum.float()

    def with_gradient(model: nn.Module, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        value, shown = loss(model, batch)
        return value, {**shown, "gradient": (scale * (model().detach() - optimum)).square().sum()}

    task.loss = with_gradient  # type: ignore[method-assign]
    return task
