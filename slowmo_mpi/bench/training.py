"""A model in training on random data, in blocks of steps that say where their time went."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from ..bases import Base
from ..worker import SlowMo
from .common import Bench, Sample, bits
from .models import CLASSES, build

LEARNING_RATE, MOMENTUM = 1e-3, 0.9
PARTS = ("forward_s", "backward_s", "optimizer_s", "outer_s", "wait_s")


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM)


class Training:
    """A fresh model with its optimizer and, where there is a base, its worker. The same data in every step.

    wrap: what to put around the model, such as DistributedDataParallel.
    """

    def __init__(
        self,
        bench: Bench,
        model: tuple[str, int],
        batch: int,
        image: int,
        base: Base | None = None,
        wrap: Callable[[nn.Module], nn.Module] | None = None,
        **settings: Any,
    ):
        comm = bench.comm
        name, parameters = model
        self._bench = bench
        plain = build(name, image, parameters).to(comm.device)
        self.parameters = sum(p.numel() for p in plain.parameters())
        self.model = wrap(plain) if wrap else plain
        self.optimizer = sgd(plain)
        self.worker = SlowMo(plain, self.optimizer, comm, base, **settings) if base else None
        generator = torch.Generator().manual_seed(comm.rank)
        self._images = torch.randn(batch, 3, image, image, generator=generator).to(comm.device)
        self._labels = torch.randint(CLASSES, (batch,), generator=generator).to(comm.device)
        self._loss = torch.zeros(())
        self._clock = _Clock(comm.device)
        self.optimizer.register_step_pre_hook(lambda *_: self._clock.begin("optimizer_s"))
        self.optimizer.register_step_post_hook(lambda *_: self._clock.end("optimizer_s"))
        if self.worker:  # there is no hook around the outer step
            vars(self.worker)["_outer_step"] = self._clock.around("outer_s", self.worker._outer_step)

    def block(
        self, steps: int, computing: Callable[[], AbstractContextManager[object]] = nullcontext
    ) -> Sample:  # fmt: skip
        """Train so many steps: the mean seconds of one, and of its parts.

        computing: what to be in during forward and backward. An exchange that overlaps the first step is posted
        before the clock runs, and one that overlaps what follows the last is taken in after: so that nothing
        travels meanwhile, and every step has its exchange.
        """
        comm, clock, worker = self._bench.comm, self._clock, self.worker
        if worker:
            worker.state.begun = worker.state.step - 1
            worker.post()
        clock.clear()
        waited = comm.waited_s
        start = self._bench.now()
        for _ in range(steps):
            with computing():
                self._gradient()
            worker.step() if worker else self.optimizer.step()
        total = self._bench.now() - start
        waited = comm.waited_s - waited
        if worker:
            worker.drain()
        self.optimizer.zero_grad()  # frees the gradients' memory while others are measured
        parts = {part: clock.seconds(part) / steps for part in PARTS[:-1]}
        return {"s": total / steps, **parts, "wait_s": waited / steps}

    def _gradient(self) -> None:
        self.optimizer.zero_grad()
        self._clock.begin("forward_s")
        self._loss = nn.functional.cross_entropy(self.model(self._images), self._labels)
        self._clock.end("forward_s")
        self._clock.begin("backward_s")
        self._loss.backward()
        self._clock.end("backward_s")

    def fingerprint(self) -> int:
        """The bits of all parameters."""
        return bits(list(self.model.parameters()))

    def is_right(self, same: bool) -> bool:
        """Whether the loss is finite, the push-sum weights sum to the ranks, and the anchors (where they are whole)
        have the same bits on all ranks; with `same`, also the models. Collective."""
        bench, worker = self._bench, self.worker
        right = bench.all(math.isfinite(self._loss.item()))
        if worker:
            right &= abs(math.fsum(bench.comm.gather(worker.state.w)) - bench.comm.size) < 1e-6
            right &= worker.sharded or bench.same(bits([slow.x0 for slow in worker.state.slow]))
        return right and (not same or bench.same(self.fingerprint()))


class _Clock:
    """Seconds between begin and end, summed by name; on a GPU by its own events, which cost no waiting."""

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self._spans: list[tuple[str, Any, Any]] = []
        self._begun: dict[str, Any] = {}

    def _mark(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def clear(self) -> None:
        self._spans.clear()

    def begin(self, name: str) -> None:
        self._begun[name] = self._mark()

    def end(self, name: str) -> None:
        self._spans.append((name, self._begun[name], self._mark()))

    def around(self, name: str, function: Callable[[], None]) -> Callable[[], None]:
        def timed() -> None:
            self.begin(name)
            function()
            self.end(name)

        return timed

    def seconds(self, name: str) -> float:
        spans = [(a, b) for n, a, b in self._spans if n == name]
        return sum(a.elapsed_time(b) / 1e3 for a, b in spans) if self._cuda else sum(b - a for a, b in spans)
