"""Models to measure with: ResNets for small images and an MLP."""

from __future__ import annotations

import math

import torch
from torch import nn

from ..models.resnet import ResNet

CLASSES = 10
MODELS = ("resnet18", "resnet50", "mlp")


def build(name: str, image: int, parameters: int) -> nn.Module:
    """The model for (b, 3, image, image), the same on every rank; `parameters`: about so many, of the mlp."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if name == "mlp":
            return mlp(3 * image * image, parameters)
        blocks, expansion = ([2, 2, 2, 2], 1) if name == "resnet18" else ([3, 4, 6, 3], 4)
        return ResNet(blocks, expansion, CLASSES, small=True)


def mlp(inputs: int, parameters: int) -> nn.Module:
    """Two hidden layers, as wide as makes h^2 + (inputs + 12) h + 10 = parameters."""
    half = (inputs + CLASSES + 2) / 2
    h = max(1, round(math.sqrt(half * half + max(0, parameters - CLASSES)) - half))
    return nn.Sequential(
        nn.Flatten(), nn.Linear(inputs, h), nn.ReLU(), nn.Linear(h, h), nn.ReLU(), nn.Linear(h, CLASSES)
    )
