"""All-reduces: this package's algorithms, MPI's own, and gloo's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from ..comm.collectives import choose
from ..errors import UsageError
from .common import Bench, bits
from .gloo import gloo
from .report import OK, OVER_WIRE, Column, Report, report, spread

ABOUT = (
    "sum of float32 in place; mpi: MPI_Iallreduce; mpi-blocking: MPI_Allreduce to another vector, in host memory",
    "auto took: what auto chooses; algbw: bytes / time; busbw: algbw * 2 (ranks-1)/ranks; MB/s: 1e6 bytes",
    "wire limit: 2 (h-1)/h * bytes * 8 / rate for h hosts, however many ranks share a host",
    "ok: small whole numbers are summed exactly, and on all ranks the bits are the same (of mpi, gloo: not asked)",
)
FOREIGN = ("mpi", "mpi-blocking", "gloo")


def measure(bench: Bench, sizes: Sequence[int], algorithms: Sequence[str], against: str | None) -> Report:
    """A row per size and algorithm. Raises: UsageError on one rank."""
    comm = bench.comm
    if comm.size < 2:
        raise UsageError("An all-reduce needs 2 ranks, and there is 1.", "Type `slowmo bench allreduce -n 2`.")
    comm.find_levels()
    names = [name for name in algorithms if _applies(bench, name)] + ([against] if against else [])
    h, m = bench.hosts, comm.size
    rows = []
    with gloo(comm) if against else nullcontext():
        for size in sizes:
            bench.tell(f"allreduce, {size} bytes")
            x = torch.zeros(size // 4, device=comm.device)
            sums = {name: _sum(bench, name, x) for name in names}
            checks = {name: s.check(bench) for name, s in sums.items()}
            taken = bench.alternate({name: bench.repeatedly(s.call) for name, s in sums.items()})
            for name, t in taken.items():
                exact, same = checks[name]
                rows.append({
                    "bytes": size, "algorithm": name,
                    "took": choose(size, m, comm.levels is not None) if name == "auto" else None, **t.spread(),
                    "algbw_byte_s": size / t.median(), "busbw_byte_s": size / t.median() * 2 * (m - 1) / m,
                    "over_wire": bench.over_wire(t.median(), 2 * (h - 1) / h * size),
                    "same_bits": same, "ok": exact and (same or name in FOREIGN),
                })  # fmt: skip
    columns = [
        Column("bytes", "bytes", "d"), Column("algorithm", "algorithm"), Column("took", "auto took"),
        *spread("us", 1e6), Column("algbw_byte_s", "algbw MB/s", ".2f", 1e-6),
        Column("busbw_byte_s", "busbw MB/s", ".2f", 1e-6), OVER_WIRE, Column("same_bits", "same bits"), OK,
    ]  # fmt: skip
    return report(bench, "allreduce", ABOUT, columns, rows)


def _applies(bench: Bench, name: str) -> bool:
    """Whether the algorithm is what its name says here; otherwise the ring would be measured under its name."""
    comm = bench.comm
    if name == "halving" and comm.size & (comm.size - 1):
        bench.tell("halving needs a power of two of ranks, and is left out")
        return False
    if name == "two-level" and comm.levels is None:
        bench.tell("two-level needs several hosts with equally many ranks, more than one, and is left out")
        return False
    if name == "mpi" and comm.device.type != "cpu":
        bench.tell("mpi sums tensors in host memory only, and is left out")
        return False
    return True


@dataclass(frozen=True)
class _Sum:
    """What sums `source` over the ranks into `result` (which may be the same memory)."""

    source: Tensor
    result: Tensor
    call: Callable[[], object]

    def check(self, bench: Bench) -> tuple[bool, bool]:
        """Whether whole numbers are summed exactly; whether random numbers give the same bits everywhere."""
        m, rank = bench.comm.size, bench.comm.rank
        pattern = torch.arange(self.source.numel(), dtype=torch.float32, device=self.source.device).remainder_(8)
        self.source.copy_(pattern + rank)
        self.call()
        exact = bench.all(torch.equal(self.result, pattern.mul_(m).add_(m * (m - 1) // 2)))
        self.source.copy_(torch.randn(pattern.shape, generator=torch.Generator().manual_seed(rank)))
        self.call()
        same = bench.same(bits([self.result]))
        self.source.zero_()  # sums of zeros stay what they are, however often
        return exact, same


def _sum(bench: Bench, name: str, x: Tensor) -> _Sum:
    comm = bench.comm
    if name == "gloo":
        import torch.distributed as dist

        return _Sum(x, x, lambda: dist.all_reduce(x))
    if name == "mpi-blocking":
        source = x if x.is_cpu else torch.zeros(x.shape)
        result = torch.zeros(x.shape)
        mine, total = source.numpy(), result.numpy()
        return _Sum(source, result, lambda: comm.mpi.Allreduce(mine, total))
    return _Sum(x, x, lambda: comm.all_reduce_(x, "bench", algorithm=name))
