"""The gradients of all simulated ranks in one computation: torch.func.vmap over their models, which are alike.

A step of a small model is mostly the cost of calling its operations, and ranks that take turns pay it again and again.
The results are those of ranks on their own to rounding, not to the bit; dropout draws other numbers. The ranks' models
differ in parameters and buffers alone, and the task's loss must be the same function on all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_flatten, tree_map

from .comm.simulated import SimulatedCommunicator
from .errors import UsageError
from .tasks import Task


@dataclass
class Share:
    """What one rank brings, and what it gets."""

    model: nn.Module
    batch: Any
    loss: Tensor = field(init=False)
    metrics: dict[str, Tensor] = field(init=False)


def gradients(
    comm: SimulatedCommunicator, task: Task, model: nn.Module, batch: Any, parts: int = 1
) -> tuple[Tensor, dict[str, Tensor]]:
    """On all ranks together: add the gradients of this rank's loss / `parts` to its parameters; loss and metrics.

    Raises: UsageError where the ranks' batches are not of one shape.
    """
    mine = Share(model, batch)
    comm.desk.append(mine)
    if len(comm.desk) == comm.size:  # the last to come computes for all
        shares = list(comm.desk)
        comm.desk.clear()
        _compute(task, shares, parts)
    comm.barrier()
    return mine.loss, mine.metrics


def _compute(task: Task, shares: list[Share], parts: int) -> None:
    models = [s.model for s in shares]
    parameters = [dict(m.named_parameters()) for m in models]
    buffers = [dict(m.named_buffers()) for m in models]
    free = {k: _stack([p[k] for p in parameters]).requires_grad_() for k, p in parameters[0].items() if p.requires_grad}
    fixed = {k: _stack([p[k] for p in parameters]) for k, p in parameters[0].items() if k not in free}
    state = {k: _stack([b[k] for b in buffers]) for k in buffers[0]}
    batch = _stack_batches([s.batch for s in shares])

    def loss_of(own: Mapping[str, Tensor], own_state: Mapping[str, Tensor], own_batch: Any) -> Any:
        def model(*args: Any, **kwargs: Any) -> Any:
            return functional_call(models[0], {**own, **own_state}, args, kwargs)

        return task.loss(model, own_batch)  # type: ignore[arg-type]

    losses, metrics = torch.vmap(loss_of, randomness="different")({**free, **fixed}, state, batch)
    found = torch.autograd.grad(losses.sum() / parts, list(free.values()), allow_unused=True)
    with torch.no_grad():
        for k, gradient in zip(free, found, strict=True):
            for i, own in enumerate(gradient if gradient is not None else ()):
                p = parameters[i][k]
                p.grad = own.clone() if p.grad is None else p.grad.add_(own)
        for k, value in state.items():
            torch._foreach_copy_([b[k] for b in buffers], list(value))
    for i, share in enumerate(shares):
        share.loss, share.metrics = losses[i].detach(), {k: v[i].detach() for k, v in metrics.items()}


def _stack(tensors: list[Tensor]) -> Tensor:
    return torch.stack([t.detach() for t in tensors])


def _stack_batches(batches: list[Any]) -> Any:
    shapes = {str([getattr(x, "shape", x) for x in tree_flatten(b)[0]]) for b in batches}
    if len(shapes) > 1:
        raise UsageError(
            "compute.vmap needs batches of one shape on all ranks, and these differ.", "Type --set compute.vmap=false."
        )
    return tree_map(lambda *xs: torch.stack(xs) if isinstance(xs[0], Tensor) else xs[0], *batches)
