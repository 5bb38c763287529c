"""Averages in a narrow type: half the bytes of full precision, and what rounding takes is not lost.

The sum is made at once, not along a ring, so that no partial sum is rounded: every rank sends its own values, rounded,
to the owners of the shards; an owner adds them in the order of ranks, in full precision; the mean is rounded once more
and sent to everybody. What either rounding took is remembered where it happened and added to what is averaged next
(error feedback: Seide et al., Interspeech 2014; in both directions: Tang et al., ICML 2019).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..flat import round_into, travels_as
from .core import MESSAGE_LIMIT_BYTES, pieces

if TYPE_CHECKING:
    from .core import Endpoint, Operation, Program


@dataclass(frozen=True)
class ErrorFeedback:
    """Means of vectors that travel rounded, and `error` (d,), at least float32: what rounding took so far.

    With x_i what rank i gave and e_i its error, before and after, each time
        m * mean + sum_i e_i (after) = sum_i x_i + sum_i e_i (before)
    so the means add up to those of full precision, but for what is left in the errors.
    """

    error: Tensor
    wire: torch.dtype

    @classmethod
    def start(cls, like: Tensor, wire: torch.dtype) -> ErrorFeedback:
        """No error yet."""
        return cls(torch.zeros_like(like, dtype=torch.promote_types(like.dtype, torch.float32)), wire)

    def all_reduce(self, comm: Endpoint, x: Tensor, operation: str) -> Callable[[], Tensor]:
        """Begin the mean over ranks of x (d,), which is free at once; returns what waits for it, to be called once.

        The mean is in the type it travelled in, and has the same bits on every rank.
        Raises: SlowmoError where x is beyond float16's range.
        """
        kind = travels_as(self.error.dtype, self.wire) if comm.size > 1 else self.error.dtype
        mine = torch.empty_like(self.error, dtype=kind)
        self.error.add_(x)
        round_into(mine, self.error)
        self.error.sub_(mine)
        return partial(self._take, comm, comm.start(operation, mean(comm, mine, self.error.dtype)))

    def _take(self, comm: Endpoint, operation: Operation[tuple[Tensor, Tensor]]) -> Tensor:
        found, rest = operation.wait()
        self.error[comm.shard(found.numel())].add_(rest)
        return found


def mean(comm: Endpoint, x: Tensor, exact: torch.dtype) -> Program[tuple[Tensor, Tensor]]:
    """The mean over ranks of x (d,), added in the type `exact` and rounded once to x's; takes its tags at once.

    x must be left alone until it is done. Also returns m times what that rounding took from this rank's shard.
    """
    return _mean(comm, x, exact, comm._next_tag(), comm._next_tag())


def _mean(comm: Endpoint, x: Tensor, exact: torch.dtype, there: int, back: int) -> Program[tuple[Tensor, Tensor]]:
    m, me = comm.size, comm.rank
    shards = [comm.shard(x.numel(), r) for r in range(m)]
    own, result = shards[me], torch.empty_like(x)
    length = own.stop - own.start
    scratch = comm._borrow(x, (m - 1) * length)
    arrived = {r: scratch[k * length : (k + 1) * length] for k, r in enumerate(_others(m, me, -1))}
    # All receives first. Everybody sends to the nearest on the right first, so that not all send to one at once.
    coming = {r: [comm._irecv(p, r, there) for p in pieces(t, MESSAGE_LIMIT_BYTES)] for r, t in arrived.items()}
    results = [comm._irecv(p, r, back) for r in arrived for p in pieces(result[shards[r]], MESSAGE_LIMIT_BYTES)]
    sends: list[Any] = []
    for r in _others(m, me, 1):
        sends += [comm._send(p, r, there) for p in pieces(x[shards[r]], MESSAGE_LIMIT_BYTES)]

    total = torch.zeros(length, dtype=exact, device=x.device)
    for r in range(m):
        if r != me:
            yield coming[r], (r,)
        total.add_(x[own] if r == me else arrived[r])
    total.div_(m)
    result[own] = total.to(x.dtype)
    for r in _others(m, me, 1):
        sends += [comm._send(p, r, back) for p in pieces(result[own], MESSAGE_LIMIT_BYTES)]
    yield results + sends, _others(m, me, -1)
    comm._give_back(scratch)
    return result, total.sub_(result[own]).mul_(m)


def _others(ranks: int, me: int, direction: int) -> list[int]:
    """All ranks but this one, the nearest to the right (1) or to the left (-1) first."""
    return [(me + direction * s) % ranks for s in range(1, ranks)]


def bytes_sent(elements: float, ranks: int, wire: torch.dtype) -> float:
    """What a rank sends for the mean of so many elements."""
    return 2 * (ranks - 1) / ranks * elements * wire.itemsize
