"""Scratch space of every host, the folder that all should share, and parallel HDF5 by a collective write."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..comm import Communicator
from ..comm.placement import fold
from .checks import FAULT, WARNING, Finding, attempt, conclude
from .hosts import by_host

PROBE_BYTES = 32 << 20
LEAST_FREE_BYTES = 1e9
LEAST_INODES = 10_000
NETWORK = ("nfs", "lustre", "gpfs", "beegfs", "ceph", "panfs", "pvfs", "orangefs", "glusterfs", "cifs", "smb", "9p",
           "afs", "wekafs", "daos")  # fmt: skip
SEEN_S = 5.0  # for a new file to be seen by another host


@dataclass(frozen=True)
class Space:
    """A folder's file system. inodes: free ones, -1: no limit. byte_s: written and synced, 0: not tried."""

    folder: str
    kind: str
    free_bytes: int
    inodes: int
    byte_s: float


def scratch(comm: Communicator) -> Finding:
    """The temporary folder of every host, written to where it is the host's own."""
    space, error = attempt(lambda: _space(Path(tempfile.gettempdir()), rank=comm.rank)) if _leads(comm) else (None, "")
    every: dict[str, tuple[Space | None, str]] = by_host(comm, (space, error))
    faults = [f"{host}: {error}" for host, (_, error) in every.items() if error]
    good = {host: found for host, (found, _) in every.items() if found is not None}
    warnings = _scarce(good)
    more = []
    if rates := sorted((s.byte_s, host) for host, s in good.items() if s.byte_s):
        slowest = f"; slowest {rates[0][1]}: {rates[0][0] / 1e6:,.0f}" if len(rates) > 1 else ""
        more = [f"{PROBE_BYTES >> 20} MiB written and synced at {rates[len(rates) // 2][0] / 1e6:,.0f} MB/s{slowest}"]
    first = next(iter(good.values()), None)
    found = f"{first.folder} ({first.kind}): at least {_least(good)} GB free" if first else "no temporary folder"
    return conclude(found, faults, warnings, more, {host: asdict(s) for host, s in good.items()})


def folder(comm: Communicator) -> Finding:
    """This folder, where runs are kept: rank 0 writes, and every host must see it."""
    written, fault = _together(comm, lambda: _probe_file())
    if fault:
        return Finding(FAULT, f"this folder cannot be written: {fault}")
    space, error = attempt(lambda: _space(Path.cwd(), rank=comm.rank if comm.rank == 0 else -1))
    sees = _leads(comm) and _appears(Path(written))
    every = by_host(comm, (sees, space, error))
    comm.barrier()
    if comm.rank == 0:
        Path(written).unlink(missing_ok=True)
    faults = [f"{host}: {error}" for host, (_, _, error) in every.items() if error]
    good = {host: found for host, (_, found, _) in every.items() if found is not None}
    blind = [host for host, (sees, _, _) in every.items() if not sees]
    warnings = [f"{fold(blind)} do not see what rank 0 writes here: a run's folder must be shared"] if blind else []
    first = next(iter(good.values()))
    where = f"{first.folder} ({first.kind}): {first.free_bytes / 1e9:,.0f} GB free"
    many = f", seen by all {len(every)} hosts" if len(every) > 1 and not blind else ""
    more = [f"{PROBE_BYTES >> 20} MiB written and synced at {first.byte_s / 1e6:,.0f} MB/s by rank 0"]
    return conclude(where + many, faults, warnings + _scarce(good), more, {h: asdict(s) for h, s in good.items()})


def hdf5(comm: Communicator) -> Finding:
    """A collective write by all ranks, read back. Ranks decide together, so that none is left in a collective."""
    mine, error = attempt(_h5py)
    everybody = comm.gather((mine, error))
    for rank, (_, error) in enumerate(everybody):
        if error:
            return Finding(FAULT, f"h5py cannot be loaded on rank {rank}: {error}")
    assert mine is not None
    version, hdf5_version, _ = mine
    if not all(found and found[2] for found, _ in everybody):
        said = f"h5py {version} is serial: checkpoints are a file per rank, and one that shows them as one"
        return Finding(WARNING, said)
    place, fault = _together(comm, lambda: tempfile.mkdtemp(prefix="slowmo-doctor-", dir="."))
    if fault:
        return Finding(FAULT, f"this folder cannot be written: {fault}")
    try:
        written, error = attempt(lambda: _write_together(comm, str(Path(place) / "probe.h5")))
        faults = [f"rank {r} on {comm.places[r].host}: {e}" for r, e in enumerate(comm.gather(error)) if e]
    finally:
        if comm.rank == 0:
            shutil.rmtree(place, ignore_errors=True)
    if not faults and not all(comm.gather(written == [float(r) for r in range(comm.size)])):
        faults = [f"a collective write came back as {written}"]
    return conclude(f"h5py {version}, HDF5 {hdf5_version}: {comm.size} ranks wrote one file together", faults)


def _h5py() -> tuple[str, str, bool]:
    import h5py

    return h5py.__version__, h5py.version.hdf5_version, bool(h5py.get_config().mpi)


def _write_together(comm: Communicator, path: str) -> list[float]:
    import h5py

    with h5py.File(path, "w", driver="mpio", comm=comm.mpi) as file:
        data = file.create_dataset("x", (comm.size, 1000), dtype="f4")
        with data.collective:
            data[comm.rank] = comm.rank
    comm.barrier()
    with h5py.File(path, "r") as file:
        written = [float(value) for value in file["x"][:, 999]]
    comm.barrier()
    return written


def _together(comm: Communicator, work: Any) -> tuple[Any, str]:
    """What rank 0's work gave, or what went wrong there, on every rank."""
    return comm.gather(attempt(work) if comm.rank == 0 else (None, ""))[0]


def _leads(comm: Communicator) -> bool:
    return comm.local_rank == 0


def _space(place: Path, rank: int) -> Space:
    """rank: who measures the speed; -1: nobody. On a network's file system rank 0 does, for all."""
    kind, about = _kind(place), os.statvfs(place)
    tries = rank == 0 or (rank > 0 and not kind.startswith(NETWORK))
    return Space(
        str(place), kind, about.f_bavail * about.f_frsize, about.f_favail if about.f_files else -1,
        _write_byte_s(place) if tries else 0.0,
    )  # fmt: skip


def _kind(place: Path) -> str:
    """The type of its file system, as the kernel calls it."""
    found = ("/", "unknown")
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, point, kind, *_ = line.split()
        point = point.replace("\\040", " ")
        if place.resolve().is_relative_to(point) and len(point) >= len(found[0]):
            found = (point, kind)
    return found[1]


def _write_byte_s(place: Path) -> float:
    block = os.urandom(1 << 20)  # some file systems compress
    with tempfile.NamedTemporaryFile(dir=place, prefix="slowmo-doctor-") as file:
        start = time.perf_counter()
        for _ in range(PROBE_BYTES >> 20):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        return PROBE_BYTES / (time.perf_counter() - start)


def _probe_file() -> str:
    number, path = tempfile.mkstemp(prefix="slowmo-doctor-", dir=".")
    os.close(number)
    return path


def _appears(path: Path) -> bool:
    deadline = time.monotonic() + SEEN_S
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


def _scarce(spaces: dict[str, Space]) -> list[str]:
    full = [h for h, s in spaces.items() if s.free_bytes < LEAST_FREE_BYTES]
    crowded = [h for h, s in spaces.items() if 0 <= s.inodes < LEAST_INODES]
    return [
        *([f"less than {LEAST_FREE_BYTES / 1e9:.0f} GB free on {fold(full)}"] if full else []),
        *([f"less than {LEAST_INODES:,} inodes free on {fold(crowded)}"] if crowded else []),
    ]


def _least(spaces: dict[str, Space]) -> str:
    return f"{min(s.free_bytes for s in spaces.values()) / 1e9:,.0f}"
