"""Ending early and together: signals, a limit of wall time, and a vote that makes all ranks stop at the same step."""

from __future__ import annotations

import math
import signal
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # a rank listens for signals before it has imported torch
    from .comm import Endpoint

SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)
REASONS = ("", *(s.name for s in SIGNALS), "run.stop_after")
VOTE_S = 1.0  # between two votes, about
_VOTE = struct.Struct("<Bd")


class Wish:
    """Whether this process wants to stop, and why: a signal came, or its time is up."""

    def __init__(self, after_s: float = math.inf):
        self._signal = ""
        self._end = time.monotonic() + after_s
        self._deaf = False

    @property
    def reason(self) -> str:
        """ "" to go on, else the signal's name or "run.stop_after"."""
        return self._signal or ("run.stop_after" if time.monotonic() >= self._end else "")

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take SIGUSR1, SIGUSR2 and SIGTERM as a wish; for the main thread."""

        def heard(number: int, frame: FrameType | None) -> None:
            self._signal = self._signal or signal.Signals(number).name

        before = {s: signal.signal(s, heard) for s in SIGNALS}
        try:
            yield
        finally:
            for s, handler in before.items():
                signal.signal(s, signal.SIG_IGN if self._deaf else handler)

    def ignore(self) -> None:
        """Once a run is done or stopped: to this process's end no signal counts.

        A warning may come that late, and some launchers (srun --kill-on-bad-exit) end all ranks when the first has left
        with code 75: a rank that is killed on its way out would turn the code into a failure's.
        """
        self._deaf = True


class Vote:
    """All ranks stop at the same step, and none waits for another's answer in the meantime.

    Now and then (by the slowest rank's steps about every second) each posts its wish, and takes in all wishes at the
    next vote. Since votes are cast and taken in at the same steps everywhere, all ranks come to the same result.
    """

    def __init__(self, comm: Endpoint, wish: Wish, step: int):
        self._comm, self._wish = comm, wish
        self._step, self._time = step - 1, -math.inf  # the pace is not known yet: the next vote is after one step
        self._cast(step, 1)

    def _cast(self, step: int, interval: int) -> None:
        now = time.perf_counter()
        took = (now - self._time) / (step - self._step)
        self._step, self._time, self._next = step, now, step + interval
        self._votes = self._comm.gather_later(_VOTE.pack(REASONS.index(self._wish.reason), took))

    def result(self, step: int) -> str:
        """After `step` steps: why to stop here, or "" to go on; the same on every rank."""
        if step < self._next:
            return ""
        votes = [_VOTE.unpack(v) for v in self._votes.wait()]
        reason = REASONS[max(number for number, _ in votes)]
        slowest = max(took for _, took in votes)
        self._cast(step, max(1, min(1000, int(VOTE_S / slowest) if slowest else 1)))
        return reason

    def close(self) -> None:
        """Take in the last votes, so that nothing is left on its way."""
        self._votes.wait()
