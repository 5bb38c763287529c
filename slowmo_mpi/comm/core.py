"""What a rank can do with the others, built on five primitives that MPI and the simulated twin provide.

Every rank starts the same operations in the same order. Each takes the next number, and that number is the tag of
its messages, so that a fast neighbour's next message is never taken for this one. An operation is a program: it
posts messages, says which of them it needs next, and is resumed once they are there. Whoever polls moves all
programs on: a hook in the model, the progress thread, or a rank that waits. So any number may be under way.
"""

from __future__ import annotations

import pickle
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch import Tensor

from ..errors import SlowmoError

if TYPE_CHECKING:
    from ..trace import Trace

T = TypeVar("T")
Program = Generator[tuple[list[Any], Sequence[int]], None, T]
"""Yields the requests (or operations) it needs next and the ranks they depend on; returns its result."""

TAGS = 16_384  # operations before tags repeat; MPI promises tags up to 32,767
MESSAGE_LIMIT_BYTES = 1 << 30  # a longer payload travels in pieces: MPI's counts are 32-bit before MPI 4
ALGORITHMS = ("auto", "doubling", "halving", "ring", "two-level", "mpi")


class Operation(Generic[T]):
    """Messages on their way: `test` moves them on and never blocks, `wait` returns what came of them."""

    def __init__(self, comm: Endpoint, name: str, program: Program[T]):
        self.comm, self.name = comm, name
        self.peers: Sequence[int] = ()
        self._program = program
        self._requests: list[Any] = []
        self._result: T | None = None
        self._error: BaseException | None = None
        self._finished = False
        self._started_s = time.perf_counter()

    def test(self) -> bool:
        """True once all is done. Moves this operation on; never blocks."""
        if not self._finished:
            with self.comm.lock:
                self._advance()
        return self._finished

    def wait(self) -> T:
        """Block, bounded by the communicator's timeout, until done; the result.

        Raises: SlowmoError where it takes too long, or where MPI fails.
        """
        if not self.test():
            self.comm._wait(self)
        if self.comm.stream is not None:
            torch.cuda.current_stream(self.comm.device).wait_stream(self.comm.stream)
        if self._error is not None:
            raise self._error
        return self._result  # type: ignore[return-value]

    def _advance(self) -> None:
        """Resume the program as often as what it needs is there. With the communicator's lock held."""
        if self.comm.stream is None:  # else: torch.cuda.stream(None) costs more than a poll
            self._resume()
        else:
            with torch.cuda.stream(self.comm.stream):
                self._resume()

    def _resume(self) -> None:
        try:
            while not self._finished and self._is_ready():
                self._requests, self.peers = next(self._program)
        except StopIteration as end:
            self._end(end.value)
        except BaseException as error:  # may be the progress thread; told where it is waited for
            self._error = error
            self._end(None)

    def _is_ready(self) -> bool:
        if self._requests and isinstance(self._requests[0], Operation):  # this one stands on others
            return all(operation._finished for operation in self._requests)
        return self.comm._done(self._requests)

    def _end(self, result: T | None) -> None:
        self._result, self._finished = result, True
        self.comm._under_way.remove(self)
        if self.comm._whole.trace is not None:
            self.comm._whole.trace.add("messages", self.name, self._started_s, time.perf_counter())


@dataclass
class Gathering:
    """An all-gather of equally long byte strings on its way; `wait` returns them by rank."""

    comm: Endpoint
    requests: list[Any]
    collect: Callable[[], list[bytes]]

    def wait(self) -> list[bytes]:
        """Block, bounded by the communicator's timeout, until everybody's is here."""

        def program() -> Program[None]:
            yield self.requests, ()

        self.comm.start("agreement", program()).wait()
        return self.collect()


class Endpoint(ABC):
    """One rank's end of the job.

    rank, size: as in MPI; local_rank, local_size: among the ranks of this host; device: the tensors' home.
    step: the training step, told in error messages. timeout: seconds any wait may take.
    allreduce: how all-reduces are done where the call does not say, one of ALGORITHMS.
    sent_bytes: payload sent so far; waited_s: seconds spent waiting; trace: where spans go, if anywhere.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    host: str
    device: torch.device
    transport: str  # of this device's tensors: "direct" or "staged" through host memory
    transport_reason: str
    warnings: list[str]  # about where the ranks are, on rank 0

    def __init__(self, timeout: float):
        self.timeout = timeout
        self.step = 0
        self.sent_bytes = 0
        self.waited_s = 0.0
        self.allreduce = "auto"
        self.chunk_bytes = 0  # of the pipelines; 0: chosen by size
        self.trace: Trace | None = None
        self.lock = threading.RLock()  # whoever moves operations on holds it: the trainer, or the progress thread
        self._under_way: list[Operation[Any]] = []
        self.stream: torch.cuda.Stream | None = None  # of the additions, so that they pass the model's kernels
        self._operations = 0
        self._scratch: list[Tensor] = []
        self._whole = self  # the communicator that this is a group of: its counts, trace, step and choices are meant
        self.levels: tuple[Endpoint, Endpoint] | None = None  # see find_levels

    # ---- the primitives ----
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

    @property
    def allows_threads(self) -> bool:
        """Whether several threads may communicate at a time."""
        return False

    def split(self, color: int) -> Endpoint:
        """The ranks that give the same color, in the order of their ranks, as a communicator; collective."""
        raise NotImplementedError

    def _all_reduce_by_mpi(self, x: Tensor) -> list[Any] | None:
        """Post MPI's own sum of x, in place; None where there is none for this type."""
        return None

    def duplicate(self, timeout: float) -> Endpoint:
        """The same ranks with a communication of their own, for a thread; collective."""
        return self

    def group(self, color: int) -> Endpoint:
        """`split`, for a group whose bytes, waits and spans count as this communicator's."""
        part = self.split(color)
        part._whole = self._whole
        return part

    def find_levels(self) -> None:
        """Make `levels`: the ranks of this host, and those with this place on every host. Collective.

        None where there is one host, one rank per host, or not equally many ranks on all of them.
        """
        hosts = self.gather(self.host)
        ranks = {host: [r for r, h in enumerate(hosts) if h == host] for host in hosts}
        per_host = {len(members) for members in ranks.values()}
        if self.levels is None and len(ranks) > 1 and per_host == {len(hosts) // len(ranks)} != {1}:
            inside = self.group(list(ranks).index(self.host))
            self.levels = inside, self.group(inside.rank)

    # ---- operations ----
    def start(self, name: str, program: Program[T]) -> Operation[T]:
        """Begin an operation. On every rank in the same order."""
        operation = Operation(self, name, program)
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with self.lock:
            self._under_way.append(operation)
            operation._advance()
        return operation

    @property
    def busy(self) -> bool:
        """Whether anything is under way."""
        return bool(self._under_way)

    def poll(self) -> None:
        """Move on all that is under way: a large message travels only while somebody asks for it. Never blocks."""
        if self._under_way and self.lock.acquire(blocking=False):
            try:
                for operation in tuple(self._under_way):
                    operation._advance()
            finally:
                self.lock.release()

    def exchange(
        self,
        payload: Tensor,
        to: Sequence[int],
        sources: Sequence[int],
        received: list[Tensor] | None = None,
        operation: str = "gossip exchange",
    ) -> Operation[list[Tensor]]:
        """Send `payload` to each of `to`, receive an equally long one from each of `sources`; returns at once.

        payload: contiguous, unchanged until the exchange is done. received: memory for what comes in, one
        tensor like the payload per source. The result is `received`, in the order of the sources.
        """
        into = received if received is not None else [torch.empty_like(payload) for _ in sources]
        return self.start(operation, self._exchange(payload, to, sources, into, self._next_tag()))

    def _exchange(
        self, payload: Tensor, to: Sequence[int], sources: Sequence[int], received: list[Tensor], tag: int
    ) -> Program[list[Tensor]]:
        requests: list[Any] = []
        for source, target in zip(sources, received, strict=True):  # first, so that no order of sending can deadlock
            requests += [self._irecv(piece, source, tag) for piece in pieces(target, MESSAGE_LIMIT_BYTES)]
        for peer in to:
            requests += [self._send(piece, peer, tag) for piece in pieces(payload, MESSAGE_LIMIT_BYTES)]
        yield requests, sorted({*to, *sources})
        return received

    # ---- collectives on tensors: in place, the same bits on every rank, the same order of addition every time ----
    def all_reduce_(
        self, x: Tensor, operation: str = "all-reduce", divisor: float = 1.0, algorithm: str = ""
    ) -> Tensor:
        """x = 1/divisor * sum over ranks of x. x: contiguous vector (d,), of the same length on every rank."""
        return self.start_all_reduce(x, operation, divisor, algorithm).wait()

    def start_all_reduce(
        self, x: Tensor, operation: str = "all-reduce", divisor: float = 1.0, algorithm: str = ""
    ) -> Operation[Tensor]:
        """The same, begun: x must be left alone until it is done.

        algorithm: one of ALGORITHMS, "" for `self.allreduce`. Halves are summed and divided in float32, and rounded
        once. All but "mpi" add in a fixed order.
        """
        from .collectives import all_reduce

        return self.start(operation, all_reduce(self, x, divisor, algorithm or self._whole.allreduce))

    def reduce_scatter_(self, x: Tensor, operation: str = "reduce-scatter", divisor: float = 1.0) -> Tensor:
        """x[shard] = 1/divisor * sum over ranks of x[shard] on the rank that owns it; the rest is left undefined.

        Returns this rank's x[shard] (a view). Halves are summed and divided in float32, and rounded once.
        """
        from .ring import reduce_scatter

        return self.start(operation, reduce_scatter(self, x, self._next_tag(), divisor)).wait()

    def all_gather_(self, x: Tensor, operation: str = "all-gather") -> Tensor:
        """Fill x, of which every rank has only its own x[shard], with everybody's."""
        return self.start_all_gather(x, operation).wait()

    def start_all_gather(
        self, x: Tensor, operation: str = "all-gather", arrived: Callable[[int], None] | None = None
    ) -> Operation[Tensor]:
        """The same, begun: x must be left alone until it is done.

        arrived: called with a rank's number once its shard is here; lower ranks' come first.
        """
        from .ring import all_gather

        return self.start(operation, all_gather(self, x, self._next_tag(), arrived))

    def shard(self, length: int, rank: int | None = None) -> slice:
        """The part of a vector that `rank` (default: this one) owns: ceil(length / size) long, the last shorter."""
        each = -(-length // self.size)
        r = self.rank if rank is None else rank
        return slice(min(r * each, length), min((r + 1) * each, length))

    def broadcast_(self, x: Tensor, operation: str = "broadcast") -> Tensor:
        """x = rank 0's x, along a binomial tree. x: any dense tensor."""
        flat = x.detach().reshape(-1).contiguous()
        self.start(operation, self._broadcast(flat, self._next_tag())).wait()
        if flat.data_ptr() != x.data_ptr() and self.rank > 0:
            x.detach().copy_(flat.view(x.shape))
        return x

    def _broadcast(self, flat: Tensor, tag: int) -> Program[None]:
        span = 1
        while span < self.size:  # ranks below span have it already
            to = [self.rank + span] if self.rank < span and self.rank + span < self.size else []
            source = [self.rank - span] if span <= self.rank < 2 * span else []
            requests = [self._irecv(p, s, tag) for s in source for p in pieces(flat, MESSAGE_LIMIT_BYTES)]
            requests += [self._send(p, s, tag) for s in to for p in pieces(flat, MESSAGE_LIMIT_BYTES)]
            yield requests, to + source
            span *= 2

    # ---- small values ----
    def gather(self, value: T) -> list[T]:
        """Everybody's `value` (any small picklable thing), by rank, on every rank."""
        data = pickle.dumps(value)
        lengths = [int.from_bytes(size, "little") for size in self.gather_later(len(data).to_bytes(8, "little")).wait()]
        padded = self.gather_later(data.ljust(max(lengths), b"\0")).wait()
        return [pickle.loads(b[:n]) for b, n in zip(padded, lengths, strict=True)]

    def barrier(self) -> None:
        """Return once every rank has called it."""
        self.gather(None)

    # ---- for the programs ----
    def _next_tag(self) -> int:
        self._operations += 1
        return self._operations % TAGS

    def _send(self, payload: Tensor, peer: int, tag: int) -> Any:
        self._whole.sent_bytes += payload.numel() * payload.element_size()
        return self._isend(payload, peer, tag)

    def _borrow(self, like: Tensor, length: int) -> Tensor:
        """At least so much scratch memory, used before where there is some: fresh pages cost a fault per 4 KiB."""
        for i, kept in enumerate(self._scratch):
            if kept.dtype == like.dtype and kept.device == like.device and length <= kept.numel() <= 4 * length + 4096:
                return self._scratch.pop(i)
        with torch.inference_mode(False):  # it outlives an evaluation that runs in that mode
            return torch.empty(length, dtype=like.dtype, device=like.device)

    def _give_back(self, scratch: Tensor) -> None:
        self._scratch = [scratch, *self._scratch[:15]]

    # ---- waiting ----
    def span(self, lane: str, name: str) -> AbstractContextManager[None]:
        """What is done inside the block is a span of the trace, where there is one."""
        trace = self._whole.trace
        return trace.span(lane, name) if trace is not None else nullcontext()

    def _wait(self, operation: Operation[Any]) -> None:
        """Until it is done: bounded, and told in full where it takes too long."""
        self.wait_until(lambda: operation._finished, operation)

    def wait_until(self, here: Callable[[], bool], operation: Operation[Any]) -> None:
        """Until that part of the operation is done which `here` tells of. All others move on meanwhile."""
        start = time.perf_counter()
        while not here():
            self.poll()
            waiting = time.perf_counter() - start
            if operation._error is not None:
                raise operation._error
            if not here() and (not self._pause(waiting) or waiting > self.timeout):
                raise self._timed_out(waiting, operation.peers, operation.name)
        end = time.perf_counter()
        self._whole.waited_s += end - start
        if self._whole.trace is not None:
            self._whole.trace.add("waiting", operation.name, start, end)

    def _timed_out(self, waited_s: float, peers: Sequence[int], operation: str) -> SlowmoError:
        whom = f"rank{'s' if len(peers) > 1 else ''} {', '.join(map(str, peers))}" if peers else "the others"
        return SlowmoError(
            f"Rank {self.rank} on {self.host} waited {waited_s:.1f} s for {whom} "
            f"at step {self._whole.step}: {operation}.",
            "A rank is stuck, dead, or out of step; if it is only slow, raise comm.timeout.",
        )


def pieces(x: Tensor, limit_bytes: int) -> list[Tensor]:
    """x as consecutive views of at most `limit_bytes`; at least one, also when x is empty."""
    return list(x.split(max(1, limit_bytes // x.element_size()))) if x.numel() else [x]
