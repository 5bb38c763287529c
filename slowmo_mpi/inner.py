"""One inner step of the loop: the gradient of its micro-batches, in the configured precision, and the worker's step.

float16 (loss scaling): a rank whose gradients overflow leaves out its optimizer's step, and nothing else: the exchange,
tau, the round's gamma and the schedule count the step like any other, on every rank. To its neighbours it is a worker
that went a way of length 0. Where gradients are averaged (AllReduce, inside a worker of several ranks) an inf on one
rank is in everybody's average, so all leave out the same steps and keep the same scale.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from . import batched
from .comm import Endpoint
from .comm.simulated import SimulatedCommunicator
from .config import Compute
from .errors import SlowmoError, UsageError
from .tasks import Task
from .worker import SlowMo

LEAST_SCALE = 2.0**-14  # after 30 overflows in a row: no scale helps a gradient that is inf or nan by itself


def prepare(model: nn.Module, compute: Compute, device: torch.device) -> nn.Module:
    """The model on its device and in its memory order, for the worker."""
    model = model.to(device)
    return model.to(memory_format=torch.channels_last) if compute.channels_last else model  # type: ignore[call-overload]


def progress(way: str, compute: Compute, comm: Endpoint) -> str:
    """Who polls: "auto" is a thread for a compiled model, one program that leaves nothing between its layers."""
    return "thread" if way == "auto" and compute.compile and comm.allows_threads else way


class InnerStep:
    """Takes inner steps of `task` with `worker`.

    model: the worker's, compiled where that is asked for; what it computes with, also to be evaluated.
    taken: whether the optimizer's step was taken last time (float16 leaves out those whose gradients overflow).
    input_s: seconds it waited for its micro-batches.
    """

    def __init__(self, task: Task, worker: SlowMo, compute: Compute, clip_norm: float):
        self.task, self.worker, self._compute, self._clip_norm = task, worker, compute, clip_norm
        _check_vmap(compute, worker.comm)
        self._device = worker.comm.device
        self.model: Any = torch.compile(worker.model) if compute.compile else worker.model
        self._scaler = torch.amp.GradScaler(self._device.type) if compute.precision == "float16" else None
        self.taken, self.input_s = True, 0.0

    def autocast(self) -> torch.autocast:
        """What forward passes are computed in."""
        dtype = {"float16": torch.float16}.get(self._compute.precision, torch.bfloat16)
        return torch.autocast(self._device.type, dtype=dtype, enabled=self._compute.precision != "float32")

    def to_device(self, batch: Any) -> Any:
        """A batch, on the worker's device and in the model's memory order."""
        return to_device(batch, self._device, self._compute.channels_last)

    def take(self, feed: Iterator[Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """One step on the next micro-batches of `feed`: mean loss and metrics, `grad_norm` where it is clipped."""
        worker, comm = self.worker, self.worker.comm
        losses: list[Tensor] = []
        shown: list[dict[str, Tensor]] = []
        self.input_s = 0.0
        worker.optimizer.zero_grad(set_to_none=False)  # gradients that are averaged stay where they are sent from
        for left in reversed(range(self._compute.accumulate)):
            started = time.perf_counter()
            with comm.span("input and output", "batch"):
                batch = self.to_device(next(feed))
            self.input_s += time.perf_counter() - started
            waiting: AbstractContextManager[None] = worker.accumulating() if left else nullcontext()
            loss, metrics = self._together(batch) if self._compute.vmap else self._alone(batch, waiting)
            losses.append(loss)
            shown.append(metrics)
        means = {k: torch.stack([m[k].detach().double() for m in shown]).mean() for k in shown[0]}
        if self._scaler is not None:
            self._scaler.unscale_(worker.optimizer)
        if self._clip_norm:
            worker.average_gradients()  # those of compute.vmap, which no `backward()` has averaged
            means["grad_norm"] = nn.utils.clip_grad_norm_(worker.model.parameters(), self._clip_norm)
        worker.step(self._scaler)
        if self._scaler is not None:
            before = self.scale
            self._scaler.update()
            self.taken = self.scale >= before
        return torch.stack(losses).mean(), means

    def _alone(self, batch: Any, waiting: AbstractContextManager[None]) -> tuple[Tensor, dict[str, Tensor]]:
        """Add a micro-batch's part to the gradients; loss and metrics."""
        comm = self.worker.comm
        with comm.span("computation", "forward"), self.autocast():
            loss, metrics = self.task.loss(self.model, batch)
        part = loss / self._compute.accumulate
        with comm.span("computation", "backward"), waiting:
            (part if self._scaler is None else self._scaler.scale(part)).backward()
        return loss.detach(), metrics

    def _together(self, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """The same, of all simulated ranks at once."""
        comm = self.worker.comm
        assert isinstance(comm, SimulatedCommunicator)
        with comm.span("computation", "forward and backward"):
            return batched.gradients(comm, self.task, self.model, batch, self._compute.accumulate)

    @property
    def scale(self) -> float:
        """What the loss is multiplied by before it is differentiated."""
        return 1.0 if self._scaler is None else self._scaler.get_scale()

    def check_scale(self) -> None:
        """On all ranks together. Raises: SlowmoError on every rank where one's gradients overflow at any scale."""
        if self._scaler is None:
            return
        scales = self.worker.comm.gather(self.scale)
        if min(scales) < LEAST_SCALE:
            raise SlowmoError(
                f"On rank {scales.index(min(scales))} the gradient is inf or nan however the loss is scaled "
                f"(scale {min(scales):g}).",
                "Type --set optimizer.lr=... with a lower rate, or --set compute.precision=bfloat16.",
            )

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint: the loss scale, this rank's own."""
        return {} if self._scaler is None else self._scaler.state_dict()

    def load_state_dict(self, state: dict[str, Any], ranks: int) -> None:
        """Go on from what `state_dict` gave on each of `ranks` ranks; on another number of them with the least scale.

        (Ranks whose gradients are averaged must have one scale, and others than before may be together now.)
        """
        if self._scaler is None:
            return
        if ranks != self.worker.comm.size:
            scales = [s["scale"] for s in self.worker.comm.gather(state) if s]
            state = {**state, "scale": min(scales), "_growth_tracker": 0} if scales else {}
        if state:  # none where the run was of another precision before
            self._scaler.load_state_dict(state)


def _check_vmap(compute: Compute, comm: Endpoint) -> None:
    if compute.vmap and not isinstance(comm, SimulatedCommunicator):
        raise UsageError(
            "compute.vmap is for ranks that are simulated in one process, and these are real.",
            "Type --simulate N in place of -n N, or --set compute.vmap=false.",
        )
    if compute.vmap and (compute.precision != "float32" or compute.compile):
        raise UsageError(
            "compute.vmap computes in float32 and compiles nothing.",
            "Type --set compute.precision=float32 --set compute.compile=false, or --set compute.vmap=false.",
        )


def to_device(batch: Any, device: torch.device, channels_last: bool = False) -> Any:
    """A tensor, or a tuple, list or dict of them, on `device`; images (b, c, h, w) with their channels last."""
    if isinstance(batch, Tensor):
        order = torch.channels_last if channels_last and batch.ndim == 4 else torch.preserve_format
        return batch.to(device, non_blocking=True, memory_format=order)
    if isinstance(batch, dict):
        return {k: to_device(v, device, channels_last) for k, v in batch.items()}
    if isinstance(batch, tuple | list):
        return type(batch)(to_device(v, device, channels_last) for v in batch)
    return batch
