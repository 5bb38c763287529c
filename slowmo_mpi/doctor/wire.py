"""MPI messages of bytes, with an end to every wait; and who meets whom, that all pairs meet in few rounds."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

SPIN_S, SLEEP_S = 0.5, 1e-3  # a message that is measured is polled for; one that is late does not cost a core


def poll(done: Callable[[], bool], seconds: float) -> bool:
    """Whether it came true within so many seconds."""
    started = time.monotonic()
    while not done():
        waited = time.monotonic() - started
        if waited > seconds:
            return False
        if waited < SPIN_S:
            os.sched_yield()  # ranks may outnumber cores
        else:
            time.sleep(SLEEP_S)
    return True


def send(mpi: Any, payload: Any, to: int, tag: int) -> Any:
    """The request. The payload must stay as it is until that is complete."""
    return mpi.Isend([payload, byte()], to, tag)


def receive(mpi: Any, room: bytearray, source: int, tag: int) -> Any:
    """The request."""
    return mpi.Irecv([room, byte()], source, tag)


def byte() -> Any:
    from mpi4py import MPI

    return MPI.BYTE


def partner(me: int, turn: int, players: int) -> int | None:
    """Whom `me` meets in this turn of a round-robin tournament; None: nobody.

    In `turns(players)` turns everybody meets everybody once.
    """
    even = players + players % 2
    if me == even - 1:
        other = turn * (even // 2) % (even - 1)  # the one who would meet himself: twice his number is the turn
    else:
        other = (turn - me) % (even - 1)
        other = even - 1 if other == me else other
    return other if other < players else None


def turns(players: int) -> int:
    """How many turns such a tournament has."""
    return 0 if players < 2 else players - 1 + players % 2
