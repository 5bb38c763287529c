"""The all-reduces, and which of them `auto` takes.

    doubling    log2 m steps of the whole vector: few bytes
    halving     recursive halving, then doubling (Rabenseifner 2004): 2 log2 m steps, 2 (m-1)/m of the vector
    ring        2 (m-1) steps, 2 (m-1)/m of the vector, pipelined: many bytes (ring.py)
    two-level   halves of the ring inside each host, an all-reduce of 1/L between hosts: several ranks per host
    mpi         MPI's own, whatever it does: no promise on the order of addition

All but the last are deterministic, and give every rank the same bits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import UsageError
from . import ring
from .core import ALGORITHMS

if TYPE_CHECKING:
    from .core import Endpoint, Operation, Program

# Measured: benchmarks/, `slowmo bench allreduce`.
DOUBLING_BYTES = 65_536  # up to this, by recursive doubling
HALVING_BYTES_PER_RANK = 262_144  # up to this much per rank, by halving and doubling where m is a power of two
SEGMENT_BYTES = 16 << 20  # of the two-level algorithm: one is inside the host while another is between hosts


def all_reduce(comm: Endpoint, x: Tensor, divisor: float, algorithm: str) -> Program[Tensor]:
    """x = 1/divisor * sum over ranks of x, by the algorithm of that name. Takes its tags at once."""
    if algorithm not in ALGORITHMS:
        raise UsageError(f"There is no all-reduce {algorithm!r}.", f"It is one of: {', '.join(ALGORITHMS)}.")
    if comm.size > 1 and x.dtype in (torch.float16, torch.bfloat16):
        return _widened(x, all_reduce(comm, wide := x.float(), divisor, algorithm), wide)
    if algorithm == "auto":
        algorithm = choose(x.numel() * x.element_size(), comm.size, comm.levels is not None)
    if algorithm == "two-level" and comm.levels is not None:
        return _two_level(comm, x, divisor)
    if algorithm == "mpi" and comm.size > 1:
        requests = comm._all_reduce_by_mpi(x)
        if requests is not None:
            return _by_mpi(comm, x, divisor, requests)
    if algorithm == "doubling" and comm.size > 1:
        return _doubling(comm, x, comm._next_tag(), divisor)
    if algorithm == "halving" and comm.size > 1 and comm.size & (comm.size - 1) == 0:
        return _halving(comm, x, comm._next_tag(), divisor)
    return ring.all_reduce(comm, x, comm._next_tag(), divisor)


def choose(size_bytes: int, ranks: int, several_per_host: bool = False) -> str:
    """What `auto` takes for so many bytes: a function of nothing else, so that all ranks agree."""
    if size_bytes <= DOUBLING_BYTES:
        return "doubling"
    if size_bytes <= HALVING_BYTES_PER_RANK * ranks and ranks & (ranks - 1) == 0:
        return "halving"
    return "two-level" if several_per_host else "ring"


def bytes_sent(size_bytes: float, ranks: int) -> float:
    """What rank 0 sends in an all-reduce of so many bytes, where each host has one rank."""
    power = 1 << (ranks.bit_length() - 1)
    if choose(int(size_bytes), ranks) == "doubling":
        return size_bytes * (power.bit_length() - 1 + (power < ranks))
    return 2 * (ranks - 1) / ranks * size_bytes


def _widened(x: Tensor, program: Program[Tensor], wide: Tensor) -> Program[Tensor]:
    yield from program
    return x.copy_(wide)


def _by_mpi(comm: Endpoint, x: Tensor, divisor: float, requests: list[object]) -> Program[Tensor]:
    comm._whole.sent_bytes += 2 * (comm.size - 1) * x.numel() * x.element_size() // comm.size  # the least there can be
    yield requests, ()
    return x.div_(divisor) if divisor != 1.0 else x


def _doubling(comm: Endpoint, x: Tensor, tag: int, divisor: float) -> Program[Tensor]:
    """In step k the pairs whose ranks differ in bit k exchange their sums.

    Ranks beyond the largest power of two hand their vector to a partner first, and get the result at the end.
    """
    m, r = comm.size, comm.rank
    power = 1 << (m.bit_length() - 1)
    theirs = comm._borrow(x, x.numel())
    into = theirs[: x.numel()]
    if r >= power:
        yield [comm._send(x, r - power, tag)], (r - power,)
    else:
        if r + power < m:
            yield [comm._irecv(into, r + power, tag)], (r + power,)
            x.add_(into)
        span = 1
        while span < power:
            peer = r ^ span
            yield [comm._irecv(into, peer, tag), comm._send(x, peer, tag)], (peer,)
            x.add_(into)
            span *= 2
        if divisor != 1.0:
            x.div_(divisor)
        if r + power < m:
            yield [comm._send(x, r + power, tag)], (r + power,)
    if r >= power:
        yield [comm._irecv(x, r - power, tag)], (r - power,)
    comm._give_back(theirs)
    return x


def _halving(comm: Endpoint, x: Tensor, tag: int, divisor: float) -> Program[Tensor]:
    """Each step halves the part that a rank sums, until it is 1/m; then the parts are put together again."""
    theirs = comm._borrow(x, -(-x.numel() // 2))
    parts: list[tuple[int, slice, slice]] = []  # peer, what this rank keeps, what the peer keeps
    here, span = slice(0, x.numel()), comm.size // 2
    while span:
        middle = here.start + (here.stop - here.start + 1) // 2
        low, high = slice(here.start, middle), slice(middle, here.stop)
        keep, give = (high, low) if comm.rank & span else (low, high)
        peer = comm.rank ^ span
        into = theirs[: keep.stop - keep.start]
        yield [comm._irecv(into, peer, tag), comm._send(x[give], peer, tag)], (peer,)
        x[keep].add_(into)
        parts.append((peer, keep, give))
        here, span = keep, span // 2
    if divisor != 1.0:
        x[here].div_(divisor)
    for peer, keep, give in reversed(parts):
        yield [comm._irecv(x[give], peer, tag), comm._send(x[keep], peer, tag)], (peer,)
    comm._give_back(theirs)
    return x


def _two_level(comm: Endpoint, x: Tensor, divisor: float) -> Program[Tensor]:
    """Reduce-scatter inside the host, all-reduce of each slice between hosts, all-gather inside.

    In segments, which are operations of their own, so that one is inside the host while another is on the wire.
    """
    assert comm.levels is not None
    inside, across = comm.levels
    segments = x.split(max(1, SEGMENT_BYTES // x.element_size())) if x.numel() else (x,)
    operations = [comm.start("segment", _segment(inside, across, part, divisor)) for part in segments]
    return _after(operations, x)


def _segment(inside: Endpoint, across: Endpoint, x: Tensor, divisor: float) -> Program[Tensor]:
    tags = inside._next_tag(), across._next_tag(), inside._next_tag()  # now: segments overtake each other

    def program() -> Program[Tensor]:
        mine = yield from ring.reduce_scatter(inside, x, tags[0], 1.0)
        yield from ring.all_reduce(across, mine, tags[1], divisor)
        return (yield from ring.all_gather(inside, x, tags[2]))

    return program()


def _after(operations: list[Operation[Tensor]], x: Tensor) -> Program[Tensor]:
    yield operations, ()
    for operation in operations:
        operation.wait()  # raises where it failed
    return x
