"""Messages between rank 0 and rank 1: latency and bandwidth, one way and both ways."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..errors import UsageError
from .common import Bench
from .report import OK, OVER_WIRE, Column, Report, report, spread

RAW_TAG = 32_000  # beyond those of operations
ABOUT = (
    "one way: half a round trip; both ways: rank 0 and rank 1 send to each other at once",
    "slowmo: comm.exchange; mpi: MPI_Send, MPI_Recv and MPI_Sendrecv through mpi4py, in host memory",
    "MB/s (1e6 bytes) in each direction",
)


class _Pair:
    """One message from each of the two ranks to the other; further ranks take part in nothing."""

    def __init__(self, bench: Bench, size_bytes: int):
        self._comm, self._rank = bench.comm, bench.comm.rank
        self._mine = _pattern(self._rank, size_bytes).to(bench.comm.device)
        self._theirs = torch.zeros_like(self._mine)
        self._expected = _pattern(1 - self._rank, size_bytes)
        self._raw_mine, self._raw_theirs = self._mine.cpu().numpy(), torch.zeros(size_bytes // 4).numpy()

    def exchange(self, *senders: int) -> None:
        to = [1 - self._rank] if self._rank in senders else []
        sources = [1 - self._rank] if 1 - self._rank in senders else []
        self._comm.exchange(self._mine, to, sources, [self._theirs] * len(sources), "bench").wait()

    def one_way(self) -> None:
        self.exchange(0)
        self.exchange(1)

    def both_ways(self) -> None:
        self.exchange(0, 1)

    def raw_one_way(self) -> None:
        for sender in (0, 1):
            if self._rank == sender:
                self._comm.mpi.Send(self._raw_mine, 1 - sender, RAW_TAG)
            elif self._rank == 1 - sender:
                self._comm.mpi.Recv(self._raw_theirs, sender, RAW_TAG)

    def raw_both_ways(self) -> None:
        if self._rank < 2:
            peer = 1 - self._rank
            self._comm.mpi.Sendrecv(self._raw_mine, peer, RAW_TAG, self._raw_theirs, peer, RAW_TAG)

    def works(self, call: Callable[[], None]) -> bool:
        """Whether the call brings what the other rank sent."""
        self._theirs.zero_()
        self._raw_theirs[:] = 0
        call()
        got = torch.from_numpy(self._raw_theirs) if call.__name__.startswith("raw") else self._theirs.cpu()
        return self._rank > 1 or torch.equal(got, self._expected)


def _pattern(rank: int, size_bytes: int) -> Tensor:
    return torch.arange(size_bytes // 4, dtype=torch.float32).remainder_(251).add_(rank + 1)


def measure(bench: Bench, sizes: Sequence[int]) -> Report:
    """A row per size, direction and way. Raises: UsageError on one rank."""
    if bench.comm.size < 2:
        raise UsageError("Messages need 2 ranks, and there is 1.", "Type `slowmo bench p2p -n 2`.")
    rows = []
    for size in sizes:
        bench.tell(f"p2p, {size} bytes")
        pair = _Pair(bench, size)
        calls = {
            ("one way", "slowmo"): pair.one_way,
            ("one way", "mpi"): pair.raw_one_way,
            ("both ways", "slowmo"): pair.both_ways,
            ("both ways", "mpi"): pair.raw_both_ways,
        }
        ok = {key: bench.all(pair.works(call)) for key, call in calls.items()}
        timed = {" ".join(key): bench.repeatedly(call, 2 if key[0] == "one way" else 1) for key, call in calls.items()}
        taken = bench.alternate(timed)
        apart = bench.host_of[0] != bench.host_of[1]
        for key in calls:
            t = taken[" ".join(key)]
            rows.append({
                "bytes": size, "direction": key[0], "way": key[1], **t.spread(),
                "bandwidth_byte_s": size / t.median(),
                "over_wire": bench.over_wire(t.median(), size if apart else 0), "ok": ok[key],
            })  # fmt: skip
    columns = [
        Column("bytes", "bytes", "d"), Column("direction", "direction"), Column("way", "way"), *spread("us", 1e6),
        Column("bandwidth_byte_s", "MB/s", ".2f", 1e-6), OVER_WIRE, OK,
    ]  # fmt: skip
    return report(bench, "p2p", ABOUT, columns, rows)
