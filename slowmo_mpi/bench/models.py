"""Models to measure with: ResNets for small images (He et al., CVPR 2016, with a 3x3 stem) and an MLP."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

CLASSES = 10
MODELS = ("resnet18", "resnet50", "mlp")


def build(name: str, image: int, parameters: int) -> nn.Module:
    """The model for (b, 3, image, image), the same on every rank; `parameters`: about so many, of the mlp."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if name == "mlp":
            return mlp(3 * image * image, parameters)
        return ResNet([2, 2, 2, 2], 1) if name == "resnet18" else ResNet([3, 4, 6, 3], 4)


def mlp(inputs: int, parameters: int) -> nn.Module:
    """Two hidden layers, as wide as makes h^2 + (inputs + 12) h + 10 = parameters."""
    half = (inputs + CLASSES + 2) / 2
    h = max(1, round(math.sqrt(half * half + max(0, parameters - CLASSES)) - half))
    return nn.Sequential(
        nn.Flatten(), nn.Linear(inputs, h), nn.ReLU(), nn.Linear(h, h), nn.ReLU(), nn.Linear(h, CLASSES)
    )


class Block(nn.Module):
    """A residual block: two 3x3 convolutions, or with `expansion` 4 a bottleneck of 1x1, 3x3 and 1x1."""

    def __init__(self, inputs: int, width: int, stride: int, expansion: int):
        super().__init__()
        outputs = width * expansion
        if expansion == 1:
            shapes = [(inputs, width, 3, stride), (width, outputs, 3, 1)]
        else:
            shapes = [(inputs, width, 1, 1), (width, width, 3, stride), (width, outputs, 1, 1)]
        layers: list[nn.Module] = []
        for shape in shapes:
            layers += [*_convolution(*shape), nn.ReLU(inplace=True)]
        self.body = nn.Sequential(*layers[:-1])
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else nn.Sequential(*_convolution(inputs, outputs, 1, stride))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


class ResNet(nn.Module):
    """Four stages of so many blocks: [2, 2, 2, 2] with expansion 1 is ResNet-18, [3, 4, 6, 3] with 4 ResNet-50."""

    def __init__(self, blocks: list[int], expansion: int):
        super().__init__()
        layers: list[nn.Module] = [*_convolution(3, 64, 3, 1), nn.ReLU(inplace=True)]
        channels = 64
        for stage, count in enumerate(blocks):
            width = 64 << stage
            for i in range(count):
                layers.append(Block(channels, width, 2 if stage and i == 0 else 1, expansion))
                channels = width * expansion
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def _convolution(inputs: int, outputs: int, size: int, stride: int) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False), nn.BatchNorm2d(outputs)]
