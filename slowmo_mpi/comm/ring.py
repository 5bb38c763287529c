"""Pipelined ring collectives (Patarasu & Yuan 2009): 2 (m-1)/m of the vector travels per rank, the least possible.

The vector is cut into m shards, each shard into chunks. In step s of m-1 a rank receives a chunk from its left,
adds its own, and passes it on to its right while the next chunk is on the wire. Each shard is summed along the ring,
starting after its owner, so the order of addition is fixed and the result has the same bits every time. In an
all-reduce a chunk that is summed sets off on its second way round at once.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .core import pieces

if TYPE_CHECKING:
    from .core import Endpoint, Program

AHEAD = 8  # receives posted before their chunks are due
CHUNKS_PER_SHARD = 8
SMALLEST_CHUNK_BYTES, LARGEST_CHUNK_BYTES = 1 << 16, 1 << 20


@dataclass
class _Arrival:
    """A chunk of the vector that the left rank sends: to be added, or to be taken as it is; then perhaps passed on."""

    chunk: Tensor
    added: bool
    last: bool  # of its way: nothing is passed on, or the summing is over


def reduce_scatter(comm: Endpoint, x: Tensor, tag: int, divisor: float) -> Program[Tensor]:
    """x[own shard] = the sum over ranks, divided. See Endpoint.reduce_scatter_."""
    if x.dtype in (torch.float16, torch.bfloat16) and comm.size > 1:
        wide = x.float()
        mine = yield from reduce_scatter(comm, wide, tag, divisor)
        x[comm.shard(x.numel())] = mine.to(x.dtype)
    elif comm.size > 1:
        yield from _around(comm, x, tag, divisor, _sums(comm, x), gathers=False)
    elif divisor != 1.0:
        x.div_(divisor)
    return x[comm.shard(x.numel())]


def all_gather(comm: Endpoint, x: Tensor, tag: int, arrived: Callable[[int], None] | None = None) -> Program[Tensor]:
    """Everybody's shard into everybody's x, the lower shards first. See Endpoint.all_gather_.

    In slot k of m-1 every link carries shard k, so that all ranks have it soon after; but one link has no need of it:
    that to its owner. There the last shard travels, one link further in each slot, and so there is no slot m-1.
    arrived: called with a shard's number once it is here.
    """
    m, r = comm.size, comm.rank
    told = arrived or (lambda _: None)
    told(r)
    if m == 1:
        return x
    left, right = (r - 1) % m, (r + 1) % m
    order = [k if k != r else m - 1 for k in range(m - 1)]
    own_slot = r if r < m - 1 else 0
    due = (chunk for k in order for chunk in _chunks(comm, x, k))
    waiting = [(c, comm._irecv(c, left, tag)) for c in itertools.islice(due, AHEAD)]
    sends = [comm._send(c, right, tag) for c in _chunks(comm, x, r)] if own_slot == 0 else []
    for slot, shard in enumerate(order):
        if slot == own_slot > 0:
            sends += [comm._send(c, right, tag) for c in _chunks(comm, x, r)]
        for _ in _chunks(comm, x, shard):
            chunk, request = waiting.pop(0)
            yield [request], (left,)
            if shard != right:
                sends.append(comm._send(chunk, right, tag))
            waiting += [(c, comm._irecv(c, left, tag)) for c in itertools.islice(due, 1)]
        told(shard)
    yield sends, (right,)
    return x


def all_reduce(comm: Endpoint, x: Tensor, tag: int, divisor: float) -> Program[Tensor]:
    """x = the sum over ranks, divided: both of the above in one stream of chunks. Not for halves."""

    def both() -> Iterator[_Arrival]:
        yield from _sums(comm, x)
        yield from _copies(comm, x)

    if comm.size > 1:
        yield from _around(comm, x, tag, divisor, both(), gathers=True)
    elif divisor != 1.0:
        x.div_(divisor)
    return x


def _chunks(comm: Endpoint, x: Tensor, owner: int) -> list[Tensor]:
    """The chunks of a shard."""
    shard_bytes = -(-x.numel() // comm.size) * x.element_size()
    chosen = min(max(shard_bytes // CHUNKS_PER_SHARD, SMALLEST_CHUNK_BYTES), LARGEST_CHUNK_BYTES)
    return pieces(x[comm.shard(x.numel(), owner % comm.size)], comm.chunk_bytes or chosen)


def _sums(comm: Endpoint, x: Tensor) -> Iterator[_Arrival]:
    """What comes in while the shards are summed; step m-2 brings this rank's own."""
    for s in range(comm.size - 1):
        for chunk in _chunks(comm, x, comm.rank - 2 - s):
            yield _Arrival(chunk, added=True, last=s == comm.size - 2)


def _copies(comm: Endpoint, x: Tensor) -> Iterator[_Arrival]:
    """What comes in while the finished shards go round."""
    for s in range(comm.size - 1):
        for chunk in _chunks(comm, x, comm.rank - 1 - s):
            yield _Arrival(chunk, added=False, last=s == comm.size - 2)


def _around(
    comm: Endpoint, x: Tensor, tag: int, divisor: float, arrivals: Iterator[_Arrival], gathers: bool
) -> Program[None]:
    """Send the left rank's shard, then handle what arrives, in order, with a few receives posted ahead."""
    left, right = (comm.rank - 1) % comm.size, (comm.rank + 1) % comm.size
    longest = _chunks(comm, x, 0)[0].numel()
    scratch = comm._borrow(x, AHEAD * longest)
    slots = list(scratch[: AHEAD * longest].split(longest)) if longest else [x] * AHEAD
    waiting: list[tuple[_Arrival, Tensor, Any]] = []

    def post() -> None:
        arrival = next(arrivals, None)
        if arrival is not None:
            # A slot is free again once what came into it was added: slots and their chunks come round in order.
            into = slots[0][: arrival.chunk.numel()] if arrival.added else arrival.chunk
            if arrival.added:
                slots.append(slots.pop(0))
            waiting.append((arrival, into, comm._irecv(into, left, tag)))

    for _ in range(AHEAD):
        post()
    sends = [comm._send(chunk, right, tag) for chunk in _chunks(comm, x, left)]
    while waiting:
        arrival, into, request = waiting.pop(0)
        yield [request], (left,)
        if arrival.added:
            arrival.chunk.add_(into)
            if arrival.last and divisor != 1.0:
                arrival.chunk.div_(divisor)
        if not arrival.last or (arrival.added and gathers):
            sends.append(comm._send(arrival.chunk, right, tag))
        post()
    yield sends, (right,)
    comm._give_back(scratch)
