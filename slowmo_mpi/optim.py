"""The base optimizer and its learning rate, from the configuration."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from .config import Optimizer
from .errors import UsageError

BUILT_IN = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}


def make(config: Optimizer, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer that `config` describes. Raises: UsageError where it cannot be made."""
    arguments: dict[str, Any] = {"lr": config.lr, **config.options}
    if config.name in BUILT_IN:
        cls: Any = BUILT_IN[config.name]
    else:
        module, _, name = config.name.partition(":")
        try:
            cls = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise UsageError(
                f'optimizer.name = "{config.name}" cannot be imported: {error}.',
                'Write "package.module:Class", such as "torch.optim:RMSprop".',
            ) from None
    betas = None if config.betas is None else tuple(config.betas)
    given = {"momentum": config.momentum, "nesterov": config.nesterov, "betas": betas}
    arguments |= {k: v for k, v in given.items() if v is not None}
    if config.weight_decay or config.name in BUILT_IN:
        arguments["weight_decay"] = config.weight_decay
    try:
        return cls(parameters, **arguments)
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"{config.name} refuses its arguments {arguments}: {error}.", "Mend the [optimizer] section."
        ) from None


def scaled(config: Optimizer, global_batch: int) -> Optimizer:
    """With the linear scaling rule (Goyal et al. 2017): the rate for `reference_batch` as that for `global_batch`."""
    if not config.reference_batch:
        return config
    return replace(config, lr=config.lr * global_batch / config.reference_batch, reference_batch=0)


def learning_rate(config: Optimizer, time: float, end: float) -> float:
    """The rate at `time` of `end`, both in the schedule's unit (`Config.unit`); `lr` being scaled already.

    Linear warm-up from warmup_from (at most lr) to lr over `warmup`, then: constant; step: lr * factor^(milestones
    passed); cosine: lr/2 (1 + cos(pi * (time - warmup)/(end - warmup))); inverse-sqrt: lr * sqrt(warmup / time), with
    1 for a warm-up of 0.
    """
    if time < config.warmup:
        low = min(config.warmup_from, config.lr)
        return low + (config.lr - low) * time / config.warmup
    if config.schedule == "step":
        return config.lr * config.factor ** sum(time >= m for m in config.milestones)
    if config.schedule == "cosine":
        return config.lr / 2 * (1 + math.cos(math.pi * (time - config.warmup) / max(end - config.warmup, 1e-12)))
    if config.schedule == "inverse-sqrt":
        start = config.warmup or 1.0
        return config.lr * math.sqrt(start / max(time, start))
    return config.lr
