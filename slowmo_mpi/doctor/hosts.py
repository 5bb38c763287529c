"""Versions, clocks and limits of every host."""

from __future__ import annotations

import importlib
import platform
import resource
import struct
import time
from pathlib import Path
from typing import Any

from .. import __version__
from ..comm import Communicator
from ..comm.mpi import library_version
from ..comm.placement import count, fold
from . import wire
from .checks import Finding, attempt, conclude, differences

MUST_AGREE = ("slowmo-mpi", "MPI", "torch")
CLOCK_S = 1.0  # more than this between two clocks: file times and logs mislead
PINGS = 7
PATIENCE_S = 10.0
SPARE_FILES = 256  # open files that Python, torch and the data need beside one socket per rank
TAG = 32_001  # beyond those of the communicator's operations


def versions(comm: Communicator) -> Finding:
    """Every host's, and where they differ."""
    everybody = by_host(comm, _versions())
    every = {host: dict(found) for host, found in everybody.items()}
    names = list(next(iter(every.values())))
    said = {name: differences(name, {host: found[name] for host, found in every.items()}) for name in names}
    faults = [text for name, text in said.items() if text and name in MUST_AGREE]
    others = [text for name, text in said.items() if text and name not in MUST_AGREE]
    first = next(iter(every.values()))
    same = ", ".join(v if name == "MPI" else f"{name} {v}" for name, v in first.items() if not said[name])
    return conclude(f"{_on(len(every))}: {same}", faults, others, (), every)


def _versions() -> dict[str, str]:
    found = {"slowmo-mpi": __version__, "MPI": library_version(), "Python": platform.python_version()}
    for package in ("torch", "numpy", "mpi4py", "h5py"):
        module, error = attempt(lambda package=package: importlib.import_module(package))  # type: ignore[misc]
        found[package] = getattr(module, "__version__", "?") if module else f"missing ({error})"
    return found | {platform.system(): platform.release()}


def clocks(comm: Communicator) -> Finding:
    """How far every host's clock is from rank 0's: the middle of the fastest of a few round trips."""
    leaders = first_ranks(comm)
    offsets = {}
    for leader in leaders[1:]:
        if comm.rank == 0:
            offsets[comm.places[leader].host] = _offset(comm.mpi, leader)
        elif comm.rank == leader:
            _answer(comm.mpi)
    if len(leaders) == 1:
        return conclude("one host, one clock")
    if comm.rank > 0:
        return conclude("")
    wrong = [h for h, (s, trip_s) in sorted(offsets.items(), key=lambda o: -abs(o[1][0])) if abs(s) > CLOCK_S + trip_s]
    worst = max(abs(s) for s, _ in offsets.values())
    warnings = [f"the clock of {h} is {offsets[h][0]:+.1f} s off that of {comm.places[0].host}" for h in wrong]
    hint = ["times of files and logs mislead; is there an NTP service?"] if wrong else []
    data = {host: {"offset_s": s, "round_trip_s": trip_s} for host, (s, trip_s) in offsets.items()}
    found = f"{len(leaders)} hosts: within {worst * 1e3:.1f} ms of {comm.places[0].host}'s clock"
    return conclude(found, (), warnings, hint, data)


def _offset(mpi: Any, leader: int) -> tuple[float, float]:
    """(offset, round trip) in seconds."""
    found = []
    for _ in range(PINGS):
        room, before, start = bytearray(8), time.time(), time.perf_counter()
        answer = wire.receive(mpi, room, leader, TAG)
        wire.send(mpi, b"?", leader, TAG).Wait()
        if not wire.poll(answer.Test, PATIENCE_S):
            raise TimeoutError(f"rank {leader} did not answer within {PATIENCE_S:.0f} s")
        trip_s = time.perf_counter() - start
        found.append((trip_s, struct.unpack("d", room)[0] - (before + trip_s / 2)))
    trip_s, offset_s = min(found)
    return offset_s, trip_s


def _answer(mpi: Any) -> None:
    for _ in range(PINGS):
        question = wire.receive(mpi, bytearray(1), 0, TAG)
        if not wire.poll(question.Test, 10 * PATIENCE_S):
            raise TimeoutError("rank 0 did not ask for the time")
        wire.send(mpi, struct.pack("d", time.time()), 0, TAG).Wait()


def limits(comm: Communicator) -> Finding:
    """Open files (one socket per rank over TCP) and locked memory (InfiniBand registers its buffers)."""
    files, locked = (resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_NOFILE, resource.RLIMIT_MEMLOCK))
    infiniband = Path("/sys/class/infiniband").is_dir() and any(Path("/sys/class/infiniband").iterdir())
    every = by_host(comm, {"open_files": files, "locked_bytes": locked, "infiniband": infiniband})
    few = [h for h, v in every.items() if 0 <= v["open_files"] < comm.size + SPARE_FILES]
    little = [h for h, v in every.items() if v["infiniband"] and v["locked_bytes"] >= 0]
    warnings = [
        *([f"{fold(few)}: {files} open files are few for {comm.size} ranks; type `ulimit -n 65536`"] if few else []),
        *([f"{fold(little)}: locked memory is limited, and InfiniBand wants `ulimit -l unlimited`"] if little else []),
    ]
    words = "unlimited" if locked < 0 else f"{locked / 2**20:,.0f} MiB"
    return conclude(
        f"open files {files if files >= 0 else 'unlimited'}, locked memory {words}", (), warnings, (), every
    )


def by_host(comm: Communicator, mine: Any) -> dict[str, Any]:
    """Every host's value, told by its first rank."""
    everybody = comm.gather(mine if comm.local_rank == 0 else None)
    leaders, names = first_ranks(comm), host_names(comm)
    return {names[leader]: everybody[leader] for leader in leaders}


def first_ranks(comm: Communicator) -> list[int]:
    """One rank of every host."""
    return sorted({place.leader for place in comm.places})


def host_names(comm: Communicator) -> dict[int, str]:
    """first rank -> a name of its host that no other host has."""
    names: dict[int, str] = {}
    for leader in first_ranks(comm):
        name = comm.places[leader].host
        names[leader] = f"{name} (rank {leader})" if name in names.values() else name
    return names


def _on(hosts: int) -> str:
    return "one host" if hosts == 1 else f"the same on all {count(hosts, 'host')}"
