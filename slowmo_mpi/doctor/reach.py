"""Does every pair of hosts reach each other? With plain messages: a collective would hang where one pair does not."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..comm.placement import count, fold
from . import wire
from .checks import FAULT, OK, Finding

NAME_BYTES = 128
MESSAGE_BYTES = 1024
PACE_S = 0.02  # a turn of the tournament, so that not everybody connects to everybody at once
PATIENCE_S = 10.0
NAMES, TABLE, PAIRS, REPORTS, VERDICT = range(5)


@dataclass
class _Star:
    """Rank 0 and everybody else, by messages between these two only."""

    mpi: Any
    rank: int
    size: int

    def collect(self, mine: bytes, tag: int, patience_s: float) -> list[bytes | None]:
        """On rank 0 everybody's bytes (equally many), None where nothing came; elsewhere nothing."""
        if self.rank > 0:
            request = wire.send(self.mpi, mine, 0, tag)
            wire.poll(request.Test, patience_s)
            return []
        rooms = [bytearray(len(mine)) for _ in range(self.size)]
        requests = [None, *(wire.receive(self.mpi, rooms[r], r, tag) for r in range(1, self.size))]
        here = [True, *(False for _ in range(1, self.size))]

        def all_here() -> bool:
            for r in range(1, self.size):
                here[r] = here[r] or requests[r].Test()
            return all(here)

        wire.poll(all_here, patience_s)
        rooms[0][:] = mine
        return [bytes(room) if arrived else None for room, arrived in zip(rooms, here, strict=True)]

    def spread(self, payload: bytes, tag: int, patience_s: float) -> bytes | None:
        """Rank 0's bytes (everybody knows how many); None where they did not come."""
        if self.rank == 0:
            requests = [wire.send(self.mpi, payload, r, tag) for r in range(1, self.size)]
            wire.poll(lambda: all(request.Test() for request in requests), patience_s)
            return payload
        room = bytearray(len(payload))
        return bytes(room) if wire.poll(wire.receive(self.mpi, room, 0, tag).Test, patience_s) else None


def reach(world: Any, host: str, waits_for: Callable[[list[str]], None]) -> Finding | None:
    """What was found, the same on every rank; None on a rank that rank 0 does not reach, which has said so.

    host: this rank's. waits_for: told the hosts whose message is still missing; MPI may end a rank that cannot
    connect. Bounded; with a fault no collective may be tried afterwards.
    """
    rank, size = world.Get_rank(), world.Get_size()
    if size == 1:
        return Finding(OK, "one rank: nobody to reach")
    star = _Star(world, rank, size)
    names = star.collect(host.encode()[:NAME_BYTES].ljust(NAME_BYTES, b"\0"), NAMES, PATIENCE_S)
    silent = [r for r, name in enumerate(names) if name is None]
    table = star.spread(b"".join(name or bytes(NAME_BYTES) for name in names) or bytes(NAME_BYTES * size), TABLE,
                        2 * PATIENCE_S)  # fmt: skip
    if table is None:
        print(f"slowmo: Rank {rank} on {host} gets nothing from rank 0.", file=sys.stderr, flush=True)
        return None
    if silent:
        whom = f"rank{'s' if len(silent) > 1 else ''} {', '.join(map(str, silent[:8]))}"
        return Finding(FAULT, f"rank 0 on {host} gets nothing from {whom}")
    hosts = [table[i : i + NAME_BYTES].rstrip(b"\0").decode() for i in range(0, len(table), NAME_BYTES)]
    leaders = [hosts.index(name) for name in dict.fromkeys(hosts)]
    names_of = [hosts[leader] for leader in leaders]
    missed = bytes(len(leaders))
    if rank in leaders:
        me = leaders.index(rank)
        missed = _meet(world, leaders, me, lambda missing: waits_for([names_of[p] for p in missing]))
    return _judge(star, names_of, leaders, missed)


def _meet(world: Any, leaders: list[int], me: int, waits_for: Callable[[list[int]], None]) -> bytes:
    """Exchange a message with every other host's first rank; 1 for every host from which none came."""
    players = len(leaders)
    rooms = [bytearray(MESSAGE_BYTES) for _ in leaders]
    waiting = {p: wire.receive(world, rooms[p], leaders[p], PAIRS) for p in range(players) if p != me}
    payload = bytes(MESSAGE_BYTES)
    sent: list[Any] = []

    def poll_all() -> bool:
        arrived = [p for p, request in waiting.items() if request.Test()]
        for p in arrived:
            del waiting[p]
        if arrived:
            waits_for(list(waiting))
        return not waiting and all(request.Test() for request in sent)

    waits_for(list(waiting))
    for turn in range(wire.turns(players)):
        other = wire.partner(me, turn, players)
        if other is not None:
            sent.append(wire.send(world, payload, leaders[other], PAIRS))
            wire.poll(lambda other=other: poll_all() or other not in waiting, PACE_S)  # type: ignore[misc]
    before, deadline = -1, time.monotonic() + 6 * PATIENCE_S
    while len(waiting) != before and time.monotonic() < deadline:  # as long as some still come
        before = len(waiting)
        if wire.poll(poll_all, PATIENCE_S):
            break
    return bytes(p in waiting for p in range(players))


def _judge(star: _Star, hosts: list[str], leaders: list[int], missed: bytes) -> Finding | None:
    """Everybody's misses to rank 0, and its verdict to all."""
    reports = star.collect(missed, REPORTS, 8 * PATIENCE_S)
    pairs = sorted({
        tuple(sorted((here, there)))
        for here, leader in enumerate(leaders) if star.rank == 0 and (report := reports[leader]) is not None
        for there in range(len(hosts)) if report[there]
    })  # fmt: skip
    verdict = star.spread(len(pairs).to_bytes(8, "little"), VERDICT, 10 * PATIENCE_S)
    number = int.from_bytes(verdict or b"\xff", "little")
    tried = len(hosts) * (len(hosts) - 1) // 2
    if number:
        shown = "; ".join(f"{hosts[a]} and {hosts[b]}" for a, b in pairs[:8])
        data = [[hosts[a], hosts[b]] for a, b in pairs]
        found = f"{count(number, 'pair')} of hosts cannot exchange a message: {shown}"
        return Finding(FAULT, found + ("; ..." if len(pairs) > 8 else ""), (), data)
    if len(hosts) == 1:
        return Finding(OK, f"one host, {hosts[0]}: all {star.size} ranks answer rank 0")
    return Finding(OK, f"{len(hosts)} hosts, {fold(hosts)}: all {count(tried, 'pair')} exchanged a message", (), [])
