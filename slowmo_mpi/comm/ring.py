"""Pipelined ring collectives (Patarasu & Yuan 2009): 2 (m-1)/m of the vector travels per rank, the least possible.

The vector is cut into m shards, each shard into chunks. In step s of m-1 a rank receives a chunk from its left,
adds its own, and passes it on to its right while the next chunk is on the wire. Each shard is summed along the ring,
starting after its owner, so the order of addition is fixed and the result has the same bits every time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .core import pieces

if TYPE_CHECKING:
    from .core import Endpoint


def reduce_scatter(comm: Endpoint, x: Tensor, tag: int, operation: str, divisor: float) -> Tensor:
    """x[own shard] = the sum over ranks, divided. See Endpoint.reduce_scatter_."""
    m, r = comm.size, comm.rank
    if m == 1:
        return x.div_(divisor)
    if x.dtype in (torch.float16, torch.bfloat16):
        wide = x.float()
        mine = reduce_scatter(comm, wide, tag, operation, divisor)
        x[comm.shard(x.numel())] = mine.to(x.dtype)
        return x[comm.shard(x.numel())]
    left, right = (r - 1) % m, (r + 1) % m
    each = -(-x.numel() // m)
    buffers = _scratch(comm, x, 2 * each).split(each) if each else (x, x)

    def chunks(s: int) -> list[Tensor]:  # what this rank adds to in step s; step m-2 is its own shard
        return pieces(x[comm.shard(x.numel(), (r - 2 - s) % m)], comm.chunk_bytes)

    def receive(s: int) -> list[tuple[Tensor, Any]]:
        targets, used = [], 0
        for c in chunks(s):
            target = buffers[s % 2][used : used + c.numel()]
            targets.append((target, comm._irecv(target, left, tag)))
            used += c.numel()
        return targets

    incoming = receive(0)
    sends = [_send(comm, c, right, tag) for c in pieces(x[comm.shard(x.numel(), left)], comm.chunk_bytes)]
    for s in range(m - 1):
        current, incoming = incoming, receive(s + 1) if s < m - 2 else []
        for chunk, (arrived, request) in zip(chunks(s), current, strict=True):
            comm._wait([request], [left], operation)
            chunk.add_(arrived)
            if s < m - 2:
                sends.append(_send(comm, chunk, right, tag))
    comm._wait(sends, [right], operation)
    mine = x[comm.shard(x.numel())]
    return mine.div_(divisor) if divisor != 1.0 else mine


def all_gather(comm: Endpoint, x: Tensor, tag: int, operation: str) -> Tensor:
    """Everybody's shard into everybody's x. See Endpoint.all_gather_."""
    m, r = comm.size, comm.rank
    if m == 1:
        return x
    left, right = (r - 1) % m, (r + 1) % m

    def shard(owner: int) -> list[Tensor]:
        return pieces(x[comm.shard(x.numel(), owner % m)], comm.chunk_bytes)

    incoming = [[(c, comm._irecv(c, left, tag)) for c in shard(r - 1 - s)] for s in range(m - 1)]
    sends = [_send(comm, c, right, tag) for c in shard(r)]
    for s, arriving in enumerate(incoming):
        for chunk, request in arriving:
            comm._wait([request], [left], operation)
            if s < m - 2:
                sends.append(_send(comm, chunk, right, tag))
    comm._wait(sends, [right], operation)
    return x


def _send(comm: Endpoint, chunk: Tensor, peer: int, tag: int) -> Any:
    comm.sent_bytes += chunk.numel() * chunk.element_size()
    return comm._isend(chunk, peer, tag)


def _scratch(comm: Endpoint, x: Tensor, length: int) -> Tensor:
    """A buffer kept from call to call: fresh memory would cost a page fault per 4 KiB every time."""
    kept = comm._scratch.get(x.dtype)
    if kept is None or kept.numel() < length or kept.device != x.device:
        with torch.inference_mode(False):  # it outlives an evaluation that runs in that mode
            kept = comm._scratch[x.dtype] = torch.empty(length, dtype=x.dtype, device=x.device)
    return kept[:length]
