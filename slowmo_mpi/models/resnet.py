"""Residual networks (He et al., CVPR 2016), for small images and for ImageNet.

Names and order of the parameters are torchvision's, so its weights load here, and ours there. A bottleneck has its
stride in the 3x3 convolution ("v1.5"), and the last scale of every block starts at 0, the classifier's weights at
standard deviation 0.01 (Goyal et al. 2017, arXiv 1706.02677): a block is at first the identity.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def resnet18(classes: int = 10, width: int = 64, channels: int = 3) -> ResNet:
    """ResNet-18 for small images (CIFAR: 32x32): 11,173,962 parameters for 10 classes."""
    return ResNet([2, 2, 2, 2], 1, classes, width, channels, small=True)


def resnet50(classes: int = 1000, width: int = 64) -> ResNet:
    """ResNet-50 for ImageNet (224x224): 25,557,032 parameters for 1000 classes."""
    return ResNet([3, 4, 6, 3], 4, classes, width)


class ResNet(nn.Module):
    """(b, channels, h, w) -> logits (b, classes), through a stem and four stages of residual blocks.

    blocks: of each stage; expansion: 1 for blocks of two 3x3 convolutions, 4 for bottlenecks; width: channels of the
    stem and in the first stage, doubled from stage to stage; small: a 3x3 stem for images of some 32x32, in place of
    the 7x7 one with stride 2 and pooling.
    """

    def __init__(
        self, blocks: list[int], expansion: int, classes: int, width: int = 64, channels: int = 3, small: bool = False
    ):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3 if small else 7, 1 if small else 2, 1 if small else 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.Identity() if small else nn.MaxPool2d(3, 2, 1)
        self.layer1 = _stage(width, width, 1, blocks[0], expansion)
        self.layer2 = _stage(width * expansion, 2 * width, 2, blocks[1], expansion)
        self.layer3 = _stage(2 * width * expansion, 4 * width, 2, blocks[2], expansion)
        self.layer4 = _stage(4 * width * expansion, 8 * width, 2, blocks[3], expansion)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(8 * width * expansion, classes)
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, Block):
                nn.init.zeros_(module.last_scale)
        nn.init.normal_(self.fc.weight, std=0.01)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


class Block(nn.Module):
    """x + f(x), rectified; f is two 3x3 convolutions, or with `expansion` 4 one of 1x1, 3x3 (the stride) and 1x1."""

    def __init__(self, inputs: int, width: int, stride: int, expansion: int):
        super().__init__()
        outputs = width * expansion
        if expansion == 1:
            shapes = [(inputs, width, 3, stride), (width, outputs, 3, 1)]
        else:
            shapes = [(inputs, width, 1, 1), (width, width, 3, stride), (width, outputs, 1, 1)]
        self._convolutions = len(shapes)
        for i, (before, after, size, step) in enumerate(shapes, 1):
            self.add_module(f"conv{i}", nn.Conv2d(before, after, size, step, size // 2, bias=False))
            self.add_module(f"bn{i}", nn.BatchNorm2d(after))
        self.relu = nn.ReLU(inplace=True)
        same = stride == 1 and inputs == outputs
        projection = [nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)]
        self.downsample = None if same else nn.Sequential(*projection)

    @property
    def last_scale(self) -> nn.Parameter:
        """Batch normalisation's scale at the end of f."""
        return self.get_submodule(f"bn{self._convolutions}").weight  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        for i in range(1, self._convolutions + 1):
            x = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(x))
            if i < self._convolutions:
                x = self.relu(x)
        return self.relu(x + shortcut)


def _stage(inputs: int, width: int, stride: int, blocks: int, expansion: int) -> nn.Sequential:
    rest = [Block(width * expansion, width, 1, expansion) for _ in range(blocks - 1)]
    return nn.Sequential(Block(inputs, width, stride, expansion), *rest)
