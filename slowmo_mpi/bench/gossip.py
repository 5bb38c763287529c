"""Gossip exchanges, waited for: what a rank's step costs on each graph where nothing overlaps."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ..errors import UsageError
from ..topology import Topology, load
from .common import Bench
from .report import OK, OVER_WIRE, Column, Report, report, spread

ABOUT = (
    "time per exchange: every rank sends its vector to its peers of the step and waits for theirs; mean over a cycle",
    "wire limit: what the busiest host sends to or receives from other hosts, * 8 / rate",
    "MB/s: 1e6 bytes, what a rank sends",
)


def measure(bench: Bench, sizes: Sequence[int], graphs: Sequence[str]) -> Report:
    """A row per size and graph. Raises: UsageError on one rank, or for a graph that cannot be."""
    comm = bench.comm
    if comm.size < 2:
        raise UsageError("An exchange needs 2 ranks, and there is 1.", "Type `slowmo bench gossip -n 2`.")
    bound = {name: load(name, comm.size) for name in graphs}
    rows = []
    for size in sizes:
        bench.tell(f"gossip, {size} bytes")
        cycles = {name: _cycle(bench, graph, size) for name, graph in bound.items()}
        checks = {name: bench.all(cycle()) for name, cycle in cycles.items()}
        timed = {name: bench.repeatedly(cycle, bound[name].period) for name, cycle in cycles.items()}
        for name, t in bench.alternate(timed).items():
            graph = bound[name]
            peers = sum(len(graph.sends(k, 0)) for k in range(graph.period)) / graph.period
            rows.append({
                "bytes": size, "graph": name, "peers": peers, **t.spread(),
                "bandwidth_byte_s": peers * size / t.median(),
                "over_wire": bench.over_wire(t.median(), _busiest(graph, bench.host_of) * size), "ok": checks[name],
            })  # fmt: skip
    columns = [
        Column("bytes", "bytes", "d"), Column("graph", "graph"), Column("peers", "peers", ".3g"), *spread("us", 1e6),
        Column("bandwidth_byte_s", "MB/s", ".2f", 1e-6), OVER_WIRE, OK,
    ]  # fmt: skip
    return report(bench, "gossip", ABOUT, columns, rows)


def _cycle(bench: Bench, graph: Topology, size_bytes: int) -> Callable[[], bool]:
    """A cycle of exchanges; the first looks at what came in."""
    comm = bench.comm
    steps = [
        ([p for p, _ in graph.sends(k, comm.rank)], [p for p, _ in graph.receives(k, comm.rank)])
        for k in range(graph.period)
    ]
    mine = torch.full((size_bytes // 4,), float(comm.rank), device=comm.device)
    memory = [torch.empty_like(mine) for _ in range(max(len(sources) for _, sources in steps))]
    seen = False

    def call() -> bool:
        nonlocal seen
        right = True
        for to, sources in steps:
            received = comm.exchange(mine, to, sources, memory[: len(sources)], "bench").wait()
            if not seen:
                right &= all(bool((r == s).all()) for r, s in zip(received, sources, strict=True))
        seen = True
        return right

    return call


def _busiest(graph: Topology, host_of: Sequence[str]) -> float:
    """Vectors that the busiest host sends to others or receives from them, per step; mean over a cycle."""
    total = 0
    for edges in graph.steps:
        crossing = [(host_of[s], host_of[t]) for s, t, _ in edges if host_of[s] != host_of[t]]
        total += max((sum(h == edge[way] for edge in crossing) for h in set(host_of) for way in (0, 1)), default=0)
    return total / graph.period
