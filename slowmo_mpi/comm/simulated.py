"""The simulated twin: N ranks in one process, the same interface, the same bits.

Each rank is a thread, but only one runs at a time: the baton goes round when a rank has to wait. So a run is
deterministic, every rank has its own torch random stream, a debugger works, and a deadlock is not waited for but
known: when the baton has gone round and nothing moved, nothing ever will.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable
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
    source: int
    target: int
    tag: int
    delivered: bool = False


class _Gathering(Gathering):
    """Which ranks have not come is known here, and told."""

    def __init__(self, comm: SimulatedCommunicator, values: list[bytes | None]):
        self._simulated, self._values = comm, values

    def wait(self) -> list[bytes]:
        while None in self._values:
            if not self._simulated._pause(0.0):
                missing = [i for i, v in enumerate(self._values) if v is None]
                raise self._simulated._timed_out(0.0, missing, "agreement")
        return [v for v in self._values if v is not None]


class _Aborted(BaseException):
    """Raised in the other ranks' threads once one has failed."""


@dataclass
class _World:
    size: int
    mail: dict[tuple[int, int, int], deque[_Message]] = field(default_factory=dict)
    gathered: dict[int, list[bytes | None]] = field(default_factory=dict)
    activity: int = 0  # counts everything that can end somebody's wait
    failure: BaseException | None = None
    turns: list[threading.Semaphore] = field(init=False)
    random: list[Tensor] = field(init=False)
    alive: list[bool] = field(init=False)

    def __post_init__(self) -> None:
        self.turns = [threading.Semaphore(0) for _ in range(self.size)]
        self.random = [torch.get_rng_state() for _ in range(self.size)]
        self.alive = [True] * self.size

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

    def __init__(self, world: _World, rank: int, device: torch.device):
        super().__init__(timeout=math.inf)  # a wait that would never end is known at once
        self._world = world
        self.rank, self.size = rank, world.size
        self.local_rank, self.local_size = rank, world.size
        self.host = "this process"
        self.device = device
        self._gathers = 0

    def _isend(self, payload: Tensor, peer: int, tag: int) -> _Message:
        # Not copied here: like MPI, a payload changed while in flight arrives changed, and the tests see it.
        message = _Message(payload.detach())
        self._world.mail.setdefault((self.rank, peer, tag), deque()).append(message)
        self._world.activity += 1
        return message

    def _irecv(self, payload: Tensor, peer: int, tag: int) -> _Receive:
        return _Receive(payload.detach(), peer, self.rank, tag)

    def _done(self, requests: list[Any]) -> bool:
        for r in requests:
            if isinstance(r, _Receive) and not r.delivered:
                waiting = self._world.mail.get((r.source, r.target, r.tag))
                if not waiting:
                    return False
                message = waiting.popleft()
                if not waiting:
                    del self._world.mail[r.source, r.target, r.tag]
                r.payload.copy_(message.payload)
                r.delivered = message.delivered = True
                self._world.activity += 1
        return all(r.delivered for r in requests)

    def _pause(self, waiting_s: float) -> bool:
        before = self._world.activity
        self._world.pass_on(self.rank)
        self._world.take(self.rank)
        return self._world.activity != before

    def gather_later(self, mine: bytes) -> Gathering:
        number, self._gathers = self._gathers, self._gathers + 1
        values = self._world.gathered.setdefault(number, [None] * self.size)
        values[self.rank] = mine
        self._world.activity += 1
        if None not in values:
            del self._world.gathered[number]  # everybody holds it
        return _Gathering(self, values)

    def abort(self, code: int) -> None:
        raise _Aborted


def simulate(
    ranks: int,
    program: Callable[..., Any],
    *args: Any,
    device: torch.device | str = "cpu",
) -> list[Any]:
    """Run `program(comm, *args)` on N simulated ranks; what each returned, by rank.

    Raises: the first failing rank's exception.
    """
    world = _World(ranks)
    results: list[Any] = [None] * ranks
    threads_per_rank = torch.get_num_threads()
    ended = threading.Semaphore(0)

    def run(rank: int) -> None:
        try:
            world.take(rank)
            torch.set_num_threads(threads_per_rank)
            comm = SimulatedCommunicator(world, rank, torch.device(device))
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
