"""The simulated twin: N ranks in one process, the same interface, the same bits.

Each rank is a thread, but only one runs at a time: the baton goes round when a rank has to wait. So a run is
deterministic, every rank has its own torch random stream, a debugger works, and a deadlock is not waited for but
known: when the baton has gone round and nothing moved, nothing ever will.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .core import Endpoint, Gathering


@dataclass
class _Message:
    payload: Tensor
    delivered: bool = False


@dataclass
class _Receive:
    payload: Tensor
    box: Hashable  # of the mail
    delivered: bool = False


class _Gathering(Gathering):
    """Which ranks have not come is known here, and told."""

    def __init__(self, comm: SimulatedCommunicator, values: list[bytes | None]):
        self._simulated, self._values = comm, values

    def wait(self) -> list[bytes]:
        while None in self._values:
            self._simulated.poll()  # somebody may wait for this rank in another operation
            if None in self._values and not self._simulated._pause(0.0):
                missing = [i for i, v in enumerate(self._values) if v is None]
                raise self._simulated._timed_out(0.0, missing, "agreement")
        return [v for v in self._values if v is not None]


class _Aborted(BaseException):
    """Raised in the other ranks' threads once one has failed."""


@dataclass
class _World:
    size: int
    ranks_per_host: int
    mail: dict[Hashable, deque[_Message]] = field(default_factory=dict)
    gathered: dict[Hashable, list[bytes | None]] = field(default_factory=dict)
    desk: list[Any] = field(default_factory=list)
    activity: int = 0  # counts everything that can end somebody's wait
    failure: BaseException | None = None
    turns: list[threading.Semaphore] = field(init=False)
    random: list[Tensor] = field(init=False)
    alive: list[bool] = field(init=False)

    def __post_init__(self) -> None:
        self.turns = [threading.Semaphore(0) for _ in range(self.size)]
        self.random = [torch.get_rng_state() for _ in range(self.size)]
        self.alive = [True] * self.size

    def host(self, rank: int) -> str:
        """The host that this rank is said to be on."""
        return f"host{rank // self.ranks_per_host}" if self.ranks_per_host else "this process"

    def pass_on(self, rank: int) -> None:
        """Give the baton to the next living rank."""
        self.random[rank] = torch.get_rng_state()
        for i in range(1, self.size + 1):
            nxt = (rank + i) % self.size
            if self.alive[nxt]:
                self.turns[nxt].release()
                return

    def take(self, rank: int) -> None:
        """Wait for the baton."""
        self.turns[rank].acquire()
        torch.set_rng_state(self.random[rank])
        if self.failure is not None:
            raise _Aborted


class SimulatedCommunicator(Endpoint):
    """One of N ranks in this process; made by `simulate`."""

    def __init__(self, world: _World, members: Sequence[int], me: int, device: torch.device, group: Hashable = ()):
        super().__init__(timeout=math.inf)  # a wait that would never end is known at once
        self._world, self._members, self._me = world, members, me
        self._group = group  # a part of all keys, so that no group takes another's messages
        self.rank, self.size = members.index(me), len(members)
        neighbours = [r for r in members if world.host(r) == world.host(me)]
        self.local_rank, self.local_size = neighbours.index(me), len(neighbours)
        self.host = world.host(me)
        self.device = device
        self.transport, self.transport_reason = "direct", "the ranks are threads"
        self.warnings: list[str] = []
        self._gathers = 0
        self._splits = 0

    @property
    def desk(self) -> list[Any]:
        """A list that all ranks see, for what they do together outside of the algorithms."""
        return self._world.desk

    def _isend(self, payload: Tensor, peer: int, tag: int) -> _Message:
        # Not copied here: like MPI, a payload changed while in flight arrives changed, and the tests see it.
        message = _Message(payload.detach())
        self._world.mail.setdefault((self._group, self.rank, peer, tag), deque()).append(message)
        self._world.activity += 1
        return message

    def _irecv(self, payload: Tensor, peer: int, tag: int) -> _Receive:
        return _Receive(payload.detach(), (self._group, peer, self.rank, tag))

    def _done(self, requests: Sequence[Any]) -> bool:
        for r in requests:
            if isinstance(r, _Receive) and not r.delivered:
                waiting = self._world.mail.get(r.box)
                if not waiting:
                    return False
                message = waiting.popleft()
                if not waiting:
                    del self._world.mail[r.box]
                r.payload.copy_(message.payload)
                r.delivered = message.delivered = True
                self._world.activity += 1
        return all(r.delivered for r in requests)

    def _pause(self, waiting_s: float) -> bool:
        before = self._world.activity
        self._world.pass_on(self._me)
        self._world.take(self._me)
        return self._world.activity != before

    def gather_later(self, mine: bytes) -> Gathering:
        key, self._gathers = (self._group, self._gathers), self._gathers + 1
        values = self._world.gathered.setdefault(key, [None] * self.size)
        values[self.rank] = mine
        self._world.activity += 1
        if None not in values:
            del self._world.gathered[key]  # everybody holds it
        return _Gathering(self, values)

    def split(self, color: int) -> SimulatedCommunicator:
        colors, self._splits = self.gather(color), self._splits + 1
        members = [self._members[r] for r, c in enumerate(colors) if c == color]
        group = SimulatedCommunicator(self._world, members, self._me, self.device, (self._group, self._splits, color))
        # An operation of this communicator may stand on messages of its parts: they are moved on together.
        group.lock, group._under_way = self.lock, self._under_way
        return group

    def abort(self, code: int) -> None:
        raise _Aborted


def simulate(
    ranks: int,
    program: Callable[..., Any],
    *args: Any,
    device: torch.device | str = "cpu",
    ranks_per_host: int = 0,
) -> list[Any]:
    """Run `program(comm, *args)` on N simulated ranks; what each returned, by rank.

    ranks_per_host: as if on hosts "host0", "host1", ... with so many ranks each; 0: all on this one.
    Raises: the first failing rank's exception.
    """
    world = _World(ranks, ranks_per_host)
    results: list[Any] = [None] * ranks
    threads_per_rank = torch.get_num_threads()
    ended = threading.Semaphore(0)

    def run(rank: int) -> None:
        try:
            world.take(rank)
            torch.set_num_threads(threads_per_rank)
            comm = SimulatedCommunicator(world, range(ranks), rank, torch.device(device))
            results[rank] = program(comm, *args)
        except _Aborted:
            pass
        except BaseException as error:
            error.rank = rank  # type: ignore[attr-defined]
            world.failure = world.failure or error
        finally:
            world.alive[rank] = False
            world.activity += 1
            world.pass_on(rank)
            ended.release()

    caller = torch.get_rng_state()
    threads = [threading.Thread(target=run, args=(r,), name=f"rank {r}", daemon=True) for r in range(ranks)]
    for thread in threads:
        thread.start()
    world.turns[0].release()
    running = ranks
    try:
        while running:
            ended.acquire()  # not Thread.join: interrupted, it takes a running thread for a stopped one (Python 3.11)
            running -= 1
    except KeyboardInterrupt as interrupt:
        world.failure = interrupt
        while running and ended.acquire(timeout=5.0):
            running -= 1
    finally:
        for thread in threads if not running else ():
            thread.join()  # its last tensors are freed only now
        torch.set_rng_state(caller)
    if world.failure is not None:
        raise world.failure
    return results
