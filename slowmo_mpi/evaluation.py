"""How good the model is: that of the averaged workers, and each worker's own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager

import torch
from torch import Tensor, nn

from .comm import Endpoint
from .inner import InnerStep
from .tasks import batches, means
from .tasks.sampler import share

BATCH = 256  # test samples read at once, unless the task says otherwise


@torch.no_grad()
def evaluate(inner: InnerStep, workers: bool = False) -> dict[str, float]:
    """Metrics of the averaged model on the test samples, each rank its share, and the consensus distance.

    workers: also of each worker's own model on all test samples, told as NAME_min, NAME_mean and NAME_max over workers.
    Changes nothing of the training's course. Without test samples only the consensus distance.
    """
    worker = inner.worker
    spread: dict[str, float] = {}
    result = {"consensus": worker.consensus_distance()}
    if inner.task.test is None:
        return result
    if workers:
        worker.settle()
        with _evaluating(worker.model):
            own = _measure(inner, worker.team.inside)  # the ranks of one worker have the same parameters
        everybody = worker.team.across.gather(own)
        for name in own:
            values = [metrics[name] for metrics in everybody]
            spread |= {f"{name}_min": min(values), f"{name}_mean": sum(values) / len(values)}
            spread |= {f"{name}_max": max(values)}
    with worker.averaged() as model, _evaluating(model):
        return _measure(inner, worker.comm) | spread | result


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode; afterwards each module in the mode it was in (some may be in eval mode on purpose)."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _measure(inner: InnerStep, comm: Endpoint | None) -> dict[str, float]:
    """The metrics of the model as it is, on the test samples, which the ranks of `comm` share (None: all are ours)."""
    task, model = inner.task, inner.model
    assert task.test is not None
    mine = share(len(task.test), comm.size, comm.rank) if comm else range(len(task.test))
    size = getattr(task, "evaluation_batch", BATCH)
    parts = [torch.arange(start, min(start + size, mine.stop)) for start in range(mine.start, mine.stop, size)]
    sums: dict[str, Tensor] = {}
    with closing(batches(task.test, ((0, indices) for indices in parts))) as feed:
        for indices, batch in zip(parts, feed, strict=True):
            batch = inner.to_device(batch)
            with inner.autocast():
                if hasattr(task, "evaluate"):
                    found = task.evaluate(model, batch)
                else:
                    loss, metrics = task.loss(model, batch)
                    found = {k: v.double() * len(indices) for k, v in {"loss": loss, **metrics}.items()}
                    found["samples"] = torch.tensor(len(indices))
            _add(sums, found)
    total: dict[str, Tensor] = {}
    for found in comm.gather(sums) if comm else [sums]:
        _add(total, found)
    return task.score(total) if hasattr(task, "score") else means(total)


def _add(total: dict[str, Tensor], sums: dict[str, Tensor]) -> None:
    for name, value in sums.items():
        value = value.detach().cpu()
        total[name] = total[name] + value if name in total else value
