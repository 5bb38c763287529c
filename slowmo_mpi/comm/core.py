"""What a rank can do with the others, built on five primitives that MPI and the simulated twin provide.

Every rank calls the same operations in the same order. Each operation takes the next number, and that number is
the tag of its messages, so that a fast neighbour's next message is never taken for this one.
"""

from __future__ import annotations

import pickle
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..errors import SlowmoError

T = TypeVar("T")
TAGS = 16_384  # operations before tags repeat; MPI promises tags up to 32,767
MESSAGE_LIMIT_BYTES = 1 << 30  # a longer payload travels in pieces: MPI's counts are 32-bit before MPI 4


@dataclass
class Exchange:
    """Messages on their way: posted at once, `test` moves them, `wait` returns what came in.

    peers: the ranks waited for; received[j]: the payload from the j-th source, valid once done.
    """

    comm: Endpoint
    requests: list[Any]
    peers: list[int]
    received: list[Tensor]
    operation: str

    def test(self) -> bool:
        """True once everything was sent and received. Moves messages on; never blocks."""
        return self.comm._done(self.requests)

    def wait(self) -> list[Tensor]:
        """Block, bounded by the communicator's timeout, until done; the payloads in the order of the sources."""
        self.comm._wait(self.requests, self.peers, self.operation)
        return self.received


@dataclass
class Gathering:
    """An all-gather of equally long byte strings on its way; `wait` returns them by rank."""

    comm: Endpoint
    requests: list[Any]
    collect: Callable[[], list[bytes]]

    def wait(self) -> list[bytes]:
        """Block, bounded by the communicator's timeout, until everybody's is here."""
        self.comm._wait(self.requests, [], "agreement")
        return self.collect()


class Endpoint(ABC):
    """One rank's end of the job.

    rank, size: as in MPI; local_rank, local_size: among the ranks of this host; device: the tensors' home.
    step: the training step, told in error messages. timeout: seconds any wait may take.
    sent_bytes: payload sent so far; waited_s: seconds spent inside blocking operations.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    host: str
    device: torch.device

    def __init__(self, timeout: float):
        self.timeout = timeout
        self.step = 0
        self.sent_bytes = 0
        self.waited_s = 0.0
        self.chunk_bytes = 1 << 20  # of the ring's pipeline
        self._operations = 0
        self._scratch: dict[torch.dtype, Tensor] = {}

    # ---- the five primitives ----
    @abstractmethod
    def _isend(self, payload: Tensor, peer: int, tag: int) -> Any:
        """Post a send of a contiguous tensor, which must stay unchanged until done."""

    @abstractmethod
    def _irecv(self, payload: Tensor, peer: int, tag: int) -> Any:
        """Post a receive into a contiguous tensor."""

    @abstractmethod
    def _done(self, requests: list[Any]) -> bool:
        """Whether all requests are complete; makes progress, never blocks."""

    @abstractmethod
    def _pause(self, waiting_s: float) -> bool:
        """Let others run. False where it is certain that waiting longer cannot help."""

    @abstractmethod
    def gather_later(self, mine: bytes) -> Gathering:
        """Post an all-gather of byte strings that are equally long on every rank."""

    @abstractmethod
    def abort(self, code: int) -> None:
        """End the whole job at once."""

    def duplicate(self, timeout: float) -> Endpoint:
        """The same ranks with a communication of their own, for a thread; collective."""
        return self

    # ---- point to point ----
    def exchange(
        self,
        payload: Tensor,
        to: Sequence[int],
        sources: Sequence[int],
        received: list[Tensor] | None = None,
        operation: str = "gossip exchange",
    ) -> Exchange:
        """Send `payload` to each of `to`, receive an equally long one from each of `sources`; returns at once.

        payload: contiguous, unchanged until the exchange is done. received: memory for what comes in, one
        tensor like the payload per source. Receives are posted first, so no order of sending can deadlock.
        """
        tag = self._next_tag()
        if received is None:
            received = [torch.empty_like(payload) for _ in sources]
        requests: list[Any] = []
        for source, target in zip(sources, received, strict=True):
            requests += [self._irecv(piece, source, tag) for piece in pieces(target, MESSAGE_LIMIT_BYTES)]
        for peer in to:
            requests += [self._isend(piece, peer, tag) for piece in pieces(payload, MESSAGE_LIMIT_BYTES)]
            self.sent_bytes += payload.numel() * payload.element_size()
        return Exchange(self, requests, sorted({*to, *sources}), received, operation)

    # ---- collectives on tensors: in place, the same bits on every rank, the same order of addition every time ----
    def all_reduce_(self, x: Tensor, operation: str = "all-reduce", divisor: float = 1.0) -> Tensor:
        """x = 1/divisor * sum over ranks of x. x: contiguous vector (d,), of the same length on every rank."""
        self.reduce_scatter_(x, operation, divisor)
        return self.all_gather_(x, operation)

    def reduce_scatter_(self, x: Tensor, operation: str = "reduce-scatter", divisor: float = 1.0) -> Tensor:
        """x[shard] = 1/divisor * sum over ranks of x[shard] on the rank that owns it; the rest is left undefined.

        Returns this rank's x[shard] (a view). Halves are summed and divided in float32, and rounded once.
        """
        from .ring import reduce_scatter

        return self._timed(lambda: reduce_scatter(self, x, self._next_tag(), operation, divisor))

    def all_gather_(self, x: Tensor, operation: str = "all-gather") -> Tensor:
        """Fill x, of which every rank has only its own x[shard], with everybody's."""
        from .ring import all_gather

        return self._timed(lambda: all_gather(self, x, self._next_tag(), operation))

    def shard(self, length: int, rank: int | None = None) -> slice:
        """The part of a vector that `rank` (default: this one) owns: ceil(length / size) long, the last shorter."""
        each = -(-length // self.size)
        r = self.rank if rank is None else rank
        return slice(min(r * each, length), min((r + 1) * each, length))

    def broadcast_(self, x: Tensor, operation: str = "broadcast") -> Tensor:
        """x = rank 0's x, along a binomial tree. x: any dense tensor."""
        tag = self._next_tag()
        flat = x.detach().reshape(-1).contiguous()
        span = 1
        while span < self.size:  # ranks below span have it already
            peers = [self.rank + span] if self.rank < span and self.rank + span < self.size else []
            source = [self.rank - span] if span <= self.rank < 2 * span else []
            requests = [self._irecv(p, s, tag) for s in source for p in pieces(flat, MESSAGE_LIMIT_BYTES)]
            requests += [self._isend(p, s, tag) for s in peers for p in pieces(flat, MESSAGE_LIMIT_BYTES)]
            self._wait(requests, peers + source, operation)
            self.sent_bytes += len(peers) * flat.numel() * flat.element_size()
            span *= 2
        if flat.data_ptr() != x.data_ptr() and self.rank > 0:
            x.detach().copy_(flat.view(x.shape))
        return x

    # ---- small values ----
    def gather(self, value: T) -> list[T]:
        """Everybody's `value` (any small picklable thing), by rank, on every rank."""
        data = pickle.dumps(value)
        sizes = self._timed(lambda: self.gather_later(len(data).to_bytes(8, "little")).wait())
        lengths = [int.from_bytes(size, "little") for size in sizes]
        padded = self._timed(lambda: self.gather_later(data.ljust(max(lengths), b"\0")).wait())
        return [pickle.loads(b[:n]) for b, n in zip(padded, lengths, strict=True)]

    def barrier(self) -> None:
        """Return once every rank has called it."""
        self.gather(None)

    # ---- waiting ----
    def _next_tag(self) -> int:
        self._operations += 1
        return self._operations % TAGS

    def _timed(self, operation: Callable[[], T]) -> T:
        start, inner = time.perf_counter(), self.waited_s
        result = operation()
        self.waited_s = inner + time.perf_counter() - start
        return result

    def _wait(self, requests: list[Any], peers: Sequence[int], operation: str) -> None:
        """Until all requests are done: bounded, and told in full where it takes too long."""
        if self._done(requests):
            return
        start = time.perf_counter()
        waiting = 0.0
        while not self._done(requests):
            waiting = time.perf_counter() - start
            if not self._pause(waiting) or waiting > self.timeout:
                raise self._timed_out(waiting, peers, operation)
        self.waited_s += time.perf_counter() - start

    def _timed_out(self, waited_s: float, peers: Sequence[int], operation: str) -> SlowmoError:
        whom = f"rank{'s' if len(peers) > 1 else ''} {', '.join(map(str, peers))}" if peers else "the others"
        return SlowmoError(
            f"Rank {self.rank} on {self.host} waited {waited_s:.1f} s for {whom} at step {self.step}: {operation}.",
            "A rank is stuck, dead, or out of step; if it is only slow, raise comm.timeout.",
        )


def pieces(x: Tensor, limit_bytes: int) -> list[Tensor]:
    """x as consecutive views of at most `limit_bytes`; at least one, also when x is empty."""
    return list(x.split(max(1, limit_bytes // x.element_size()))) if x.numel() else [x]
