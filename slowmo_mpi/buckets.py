"""The average of the gradients, begun while the backward pass still computes (as in Li et al., VLDB 2020).

The parameters are cut into buckets, the model's last ones first, since backward comes to those first. A bucket whose
gradients are all there sets off; buckets set off in the same order on every rank. When `backward()` returns, every
`p.grad` is the average: gradients may be clipped, or gathered over several backward passes, of which only the last
need communicate.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from .comm import Endpoint
from .comm.compressed import ErrorFeedback
from .errors import SlowmoError
from .flat import ALIGN_BYTES, FlatParameters, like_parameter

FIRST_BUCKET_BYTES = 1 << 20  # small, so that the wire has something to do soon
BUCKET_BYTES = 8 << 20


@dataclass
class _Bucket:
    """Parameters whose gradients travel together: one run of memory, ahead of the gradients a flag for each: used?"""

    members: list[int]
    memory: Tensor
    views: list[Tensor] = field(default_factory=list)
    missing: int = 0  # gradients that are not there yet
    feedback: ErrorFeedback | None = None  # where it travels in a narrower type
    take: Callable[[], Tensor] | None = None  # waits for the average on its way


class GradientAverage:
    """Averages the gradients of `flat` over the ranks of `comm`; from hooks, until it is closed."""

    def __init__(self, flat: FlatParameters, comm: Endpoint, wire: torch.dtype | None = None):
        self._flat, self._comm = flat, comm
        self._buckets = _cut(flat)
        if wire is not None:
            for bucket in self._buckets:
                bucket.feedback = ErrorFeedback.start(bucket.memory, wire)
        self.errors = [b.feedback.error for b in self._buckets if b.feedback is not None]
        self._home = {i: (b, k) for b in self._buckets for k, i in enumerate(b.members)}
        self._fresh = [False] * len(flat.parameters)  # whose gradient is there, in this backward
        self._under_way = self._finished = False
        self._next = 0
        self.waits = False  # for another backward pass, whose gradients will be added
        self._hooks = [
            p.register_post_accumulate_grad_hook(partial(self._arrived, i)) for i, p in enumerate(flat.parameters)
        ]

    def close(self) -> None:
        """Leave the gradients alone."""
        for hook in self._hooks:
            hook.remove()

    def complete(self) -> None:
        """Average whatever was not averaged when `backward()` ended, as where gradients were set by hand.

        Afterwards a parameter that no rank used has no gradient, as torch has it: else momentum and weight decay
        would go on moving it.
        """
        if not self._finished:
            if not self._under_way:
                self._begin()
            self._end_of_backward()

    def finish(self) -> None:
        """The same, and the gradients that come next are others."""
        self.complete()
        self._finished = False

    def _begin(self) -> None:
        self._under_way, self._finished, self._next = True, False, 0
        self._fresh = [False] * len(self._fresh)
        for bucket in self._buckets:
            bucket.missing, bucket.take = len(bucket.members), None

    @torch.no_grad()
    def _arrived(self, i: int, p: nn.Parameter) -> None:
        """Autograd's hook: the gradient of parameter i is complete."""
        if self.waits or not self._flat.holds(i):  # another SlowMo was made of this model
            return
        if not self._under_way:
            self._begin()
            torch.autograd.Variable._execution_engine.queue_callback(self._end_of_backward)
        bucket, _ = self._home[i]
        bucket.missing -= not self._fresh[i]
        self._fresh[i] = True
        self._adopt(i)
        while self._next < len(self._buckets) and not self._buckets[self._next].missing:
            self._set_off()

    def _adopt(self, i: int) -> None:
        """Put the gradient where it is sent from, and leave p.grad as a view of that."""
        p, (bucket, k) = self._flat.parameters[i], self._home[i]
        view = bucket.views[k]
        if p.grad is None:  # counts as zero: the vectors are equally long on every rank
            view.zero_()
        elif p.grad.layout != torch.strided:
            raise SlowmoError(
                f"The gradient of {self._flat.entries[i].name} is sparse; gradients are averaged as one dense vector.",
                "Make the layer with sparse=False.",
            )
        elif p.grad.data_ptr() != view.data_ptr():
            view.copy_(p.grad)
        p.grad = view if p.requires_grad else None

    def _set_off(self) -> None:
        bucket = self._buckets[self._next]
        self._next += 1
        bucket.memory[: len(bucket.members)] = 1
        for k, i in enumerate(bucket.members):
            if not self._fresh[i]:
                bucket.memory[k] = self._flat.parameters[i].grad is not None
                self._adopt(i)
        if bucket.feedback is not None:
            bucket.take = bucket.feedback.all_reduce(self._comm, bucket.memory, "gradient average")
        else:
            operation = self._comm.start_all_reduce(bucket.memory, "gradient average", divisor=self._comm.size)
            bucket.take = operation.wait

    @torch.no_grad()
    def _end_of_backward(self) -> None:
        """Autograd's callback, before `backward()` returns: send the rest, and wait for all."""
        while self._next < len(self._buckets):
            self._set_off()
        for bucket in self._buckets:
            assert bucket.take is not None
            mean = bucket.take()
            if bucket.feedback is not None:
                bucket.memory.copy_(mean)
                bucket.feedback.error[: len(bucket.members)] = 0  # the flags
            for k, i in enumerate(bucket.members):
                if not self._fresh[i] and not float(bucket.memory[k]):
                    self._flat.parameters[i].grad = None
        self._under_way, self._finished = False, True


def _cut(flat: FlatParameters) -> list[_Bucket]:
    """The buckets in the order in which they set off: that in which backward is likely to complete them."""
    buckets: list[_Bucket] = []
    for number, vector in enumerate(flat.buffers):
        members: list[int] = []
        room = FIRST_BUCKET_BYTES if not buckets else BUCKET_BYTES
        by_place = sorted((flat.place[i], i) for i, e in enumerate(flat.entries) if e.buffer == number)
        for _, i in reversed(by_place):
            members.append(i)
            room -= flat.entries[i].numel * vector.element_size()
            if room <= 0:
                buckets.append(_bucket(flat, members, vector))
                members, room = [], BUCKET_BYTES
        if members:
            buckets.append(_bucket(flat, members, vector))
    return sorted(buckets, key=lambda b: -min(flat.place[i] for i in b.members))


def _bucket(flat: FlatParameters, members: list[int], vector: Tensor) -> _Bucket:
    align = ALIGN_BYTES // vector.element_size()

    def padded(n: int) -> int:
        return -(-n // align) * align

    starts = [padded(len(members))]
    for i in members:
        starts.append(starts[-1] + padded(flat.entries[i].numel))
    memory = torch.zeros(starts[-1], dtype=vector.dtype, device=vector.device)
    views = [like_parameter(flat.parameters[i], memory, s) for i, s in zip(members, starts, strict=False)]
    return _Bucket(members, memory, views)
