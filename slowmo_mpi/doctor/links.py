"""Latency and bandwidth of each host's link. One slow host among hundreds holds all of them up: it is named.

Hosts meet in pairs, with other partners in every turn of a tournament, all pairs at once; each sends to the other, one
after the other. A host's value is its best over the turns, so that a slow partner does not count against it; sending
and receiving are judged apart.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

from ..comm import Communicator
from . import wire
from .checks import Finding, conclude
from .hosts import first_ranks, host_names

TURNS, REPEATS = 4, 2
TRIAL_BYTES = 1 << 20
LEAST_BYTES, MOST_BYTES = 1 << 20, 64 << 20
TRANSFER_S = 0.03  # aimed at
MOST_S = 1.0  # of a transfer over a slow link
PINGS = 50
SLOW, BROKEN = 0.7, 0.25  # shares of the median: a warning, a fault; others' traffic may halve a good link for a moment
LATE = 5.0  # times the median latency: a warning
PATIENCE_S = 20.0
TAG = 32_000  # beyond those of the communicator's operations

Rates = Mapping[str, Mapping[str, float]]
"""host -> "sends" and "receives" in bytes/s, "latency_s"."""


def links(comm: Communicator) -> Finding:
    """Every host's link against the others'."""
    leaders, names = first_ranks(comm), host_names(comm)
    players = len(leaders)
    if players == 1:
        return conclude("one host: no link between hosts to measure")
    me = leaders.index(comm.rank) if comm.rank in leaders else -1
    best: dict[int, dict[str, float]] = {leader: {} for leader in leaders}
    size = dict.fromkeys(leaders, TRIAL_BYTES)
    room = bytearray(MOST_BYTES) if me >= 0 else bytearray()
    for turn in range(-1, min(TURNS, wire.turns(players))):  # the first is a trial, and opens connections
        other = wire.partner(me, max(turn, 0), players) if me >= 0 else None
        comm.barrier()
        mine: tuple[int, float, float] | None = None
        if other is not None:
            peer = leaders[other]
            link = _Link(comm.mpi, peer, memoryview(room)[: min(size[comm.rank], size[peer])])
            mine = (peer, link.latency_s(me < other), max(link.receives_byte_s(me < other) for _ in range(REPEATS)))
        for rank, found in enumerate(comm.gather(mine)):
            if found is not None:
                source, latency_s, rate = found
                _keep(best[source], "sends", rate, max)
                _keep(best[rank], "receives", rate, max)
                _keep(best[rank], "latency_s", latency_s, min)
        if turn < 0:
            typical = statistics.median(b["receives"] for b in best.values() if b)
            size = {leader: _bytes(typical, b) for leader, b in best.items()}
            best = {leader: {} for leader in leaders}
    return judge({names[leader]: b for leader, b in best.items()})


class _Link:
    """This rank and its partner; `payload` is what is sent, and where is received."""

    def __init__(self, mpi: Any, peer: int, payload: memoryview):
        self.mpi, self.peer, self.payload = mpi, peer, payload

    def latency_s(self, first: bool) -> float:
        """Half the fastest of many round trips."""
        trips, room = [], bytearray(1)
        for _ in range(PINGS):
            start = time.perf_counter()
            if first:
                self._done(wire.send(self.mpi, b"?", self.peer, TAG))
            self._done(wire.receive(self.mpi, room, self.peer, TAG))
            if not first:
                self._done(wire.send(self.mpi, b"!", self.peer, TAG))
            trips.append(time.perf_counter() - start)
        return min(trips) / 2

    def receives_byte_s(self, first: bool) -> float:
        """Bytes per second from the partner to this rank, while nothing goes the other way. Both send in turn."""
        if first:
            self._give()
            return self._take()
        rate = self._take()
        self._give()
        return rate

    def _give(self) -> None:
        self._done(wire.receive(self.mpi, bytearray(1), self.peer, TAG))
        self._done(wire.send(self.mpi, self.payload, self.peer, TAG))

    def _take(self) -> float:
        request = self.mpi.Irecv([self.payload, wire.byte()], self.peer, TAG)
        start = time.perf_counter()
        self._done(wire.send(self.mpi, b"!", self.peer, TAG))
        self._done(request)
        return len(self.payload) / (time.perf_counter() - start)

    def _done(self, request: Any) -> None:
        if not wire.poll(request.Test, PATIENCE_S):
            raise TimeoutError(f"waited {PATIENCE_S:.0f} s for a message from or to rank {self.peer}")


def judge(found: Rates) -> Finding:
    """Which hosts are slow, against the median of all."""
    faults: list[str] = []
    warnings: list[str] = []
    lines: list[str] = []
    number = len(found)
    medians = {}
    for way in ("sends", "receives"):
        rates = {host: b[way] for host, b in found.items()}
        middle = medians[way] = statistics.median(rates.values())
        lines.append(
            f"{way} {middle / 1e6:,.0f} MB/s in the median, {min(rates.values()) / 1e6:,.0f} to "
            f"{max(rates.values()) / 1e6:,.0f}"
        )
    middle_s = statistics.median(b["latency_s"] for b in found.values())
    worst_s = max(b["latency_s"] for b in found.values())
    lines.append(f"latency {middle_s * 1e6:,.0f} us in the median, up to {worst_s * 1e6:,.0f}")
    for host, b in found.items() if number > 2 else ():  # of two nobody can say which is the slow one
        slow = {way: b[way] / medians[way] for way in medians if b[way] < SLOW * medians[way]}
        if slow:
            parts = [f"{way} {b[way] / 1e6:,.0f} MB/s, {share:.2f} of the median" for way, share in slow.items()]
            (faults if min(slow.values()) < BROKEN else warnings).append(f"{host} is slow: {'; '.join(parts)}")
        if b["latency_s"] > LATE * middle_s:
            warnings.append(
                f"{host} is late: {b['latency_s'] * 1e6:,.0f} us, {b['latency_s'] / middle_s:.0f} times the median"
            )
    share = f"{number} hosts send {medians['sends'] / 1e6:,.0f} MB/s, latency {middle_s * 1e6:,.0f} us"
    even = f"{share}; none below {SLOW} of the median" if number > 2 else share
    return conclude(even if not faults + warnings else share, faults, warnings, lines, dict(found))


def _keep(best: dict[str, float], what: str, value: float, better: Callable[[float, float], float]) -> None:
    best[what] = better(best[what], value) if what in best else value


def _bytes(typical: float, trial: Mapping[str, float]) -> int:
    """How much to send to or from a host, that a transfer is neither too short to measure nor takes too long."""
    slowest = min((trial[way] for way in ("sends", "receives") if way in trial), default=typical)
    wanted = min(max(typical * TRANSFER_S, LEAST_BYTES), MOST_BYTES, max(slowest * MOST_S, TRIAL_BYTES // 16))
    page = os.sysconf("SC_PAGE_SIZE")
    return max(page, int(wanted) // page * page)
