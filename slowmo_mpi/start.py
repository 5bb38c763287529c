"""Where the time of a start goes, from mpirun to the end of the first step."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

LAUNCHED = "SLOWMO_LAUNCHED"  # the variable with the wall-clock time at which `slowmo train -n` ran mpirun
NOTED_S = 0.05  # a phase that takes less than this everywhere is not worth a word

Range = tuple[float, float]


class Start:
    """The phases of one rank's start, in seconds; what came before the first mark began with the process."""

    def __init__(self) -> None:
        age_s = _age_s()
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter() - age_s
        if launched := os.environ.get(LAUNCHED):
            self.seconds["launcher"] = max(0.0, time.time() - age_s - float(launched))

    def mark(self, phase: str) -> None:
        """The time since the last mark was spent on this."""
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._last
        self._last = now


def ranges(everybody: Iterable[Mapping[str, float]]) -> dict[str, Range]:
    """phase -> the fastest and the slowest rank's seconds; "all": their sums."""
    ranks = [{**seconds, "all": sum(seconds.values())} for seconds in everybody]
    return {phase: (min(r[phase] for r in ranks), max(r[phase] for r in ranks)) for phase in ranks[0]}


def line(phases: Mapping[str, Range]) -> str:
    """ "first step done after 4.1 s: launcher 0.1, imports 2.0 to 2.4, MPI 0.9, ..." """
    parts = [f"{name} {_words(*span)}" for name, span in phases.items() if name != "all" and span[1] >= NOTED_S]
    return f"first step done after {phases['all'][1]:.1f} s: {', '.join(parts)}"


def _words(least: float, most: float) -> str:
    return f"{most:.1f}" if f"{least:.1f}" == f"{most:.1f}" else f"{least:.1f} to {most:.1f}"


def _age_s() -> float:
    """Seconds since this process was started."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return 0.0
    return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))
