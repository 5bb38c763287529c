"""Is this machine ready? Every check is proved by doing it, on the ranks that the launcher really joined."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .errors import SlowmoError

OK, WARNING, FAULT = "ok", "warning", "fault"


@dataclass(frozen=True)
class Check:
    """One line of the report: what was looked at, ok | warning | fault, and what was found."""

    name: str
    result: str
    found: str

    def as_dict(self) -> dict[str, str]:
        return asdict(self)


def examine(comm: Any) -> list[Check]:
    """All checks, on all ranks of `comm`; the same list on every rank."""
    checks: list[Check] = []
    for name, check in (
        ("MPI", _mpi),
        ("ranks", _ranks),
        ("messages", _messages),
        ("GPU", _gpu),
        ("CUDA-aware MPI", _cuda_aware),
        ("parallel HDF5", _hdf5),
        ("disk", _disk),
    ):
        checks.append(_together(comm, name, check))
    return checks


def _together(comm: Any, name: str, check: Callable[[Any], tuple[str, str]]) -> Check:
    """Run a check on every rank; the worst result speaks. A check that raises is a fault."""
    try:
        mine = check(comm)
    except Exception as error:
        mine = (FAULT, f"{type(error).__name__}: {error}")
    everybody = comm.gather(mine)
    order = (FAULT, WARNING, OK)
    worst = min(range(comm.size), key=lambda r: order.index(everybody[r][0]))
    result, found = everybody[worst]
    return Check(name, result, found if result == OK else f"{found} (rank {worst})")


def _mpi(comm: Any) -> tuple[str, str]:
    import mpi4py

    from .comm.mpi import library_version

    return OK, f"{library_version()}, mpi4py {mpi4py.__version__}"


def _ranks(comm: Any) -> tuple[str, str]:
    hosts = comm.gather(comm.host)
    cores = len(os.sched_getaffinity(0))
    names = sorted(set(hosts))
    shown = ", ".join(f"{hosts.count(h)} on {h}" for h in names[:8]) + (" ..." if len(names) > 8 else "")
    found = f"{comm.size} joined: {shown}; each may run on {cores} core{'s' if cores > 1 else ''}"
    if comm.local_size > (os.cpu_count() or 1):
        return WARNING, f"{found}; more ranks than cores, so they take turns"
    return OK, found


def _messages(comm: Any) -> tuple[str, str]:
    """All-reduce of every dtype against what it must give, and the time of a 4 MB exchange along the ring."""
    import torch

    wrong = ""
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        x = comm.all_reduce_(torch.full((1000,), float(comm.rank % 2 + 1), dtype=dtype, device=comm.device))
        wanted = comm.size + comm.size // 2
        if not torch.allclose(x.float().cpu(), torch.full((1000,), float(wanted)), rtol=1e-2):
            wrong = wrong or f"all-reduce of {dtype} gave {float(x[0])}, not {wanted}"
    if comm.size == 1:
        return OK, "one rank: nothing to exchange"
    payload = torch.zeros(1_000_000, device=comm.device)
    times = []
    for _ in range(5):
        comm.barrier()
        start = time.perf_counter()
        comm.exchange(payload, [(comm.rank + 1) % comm.size], [(comm.rank - 1) % comm.size]).wait()
        times.append(time.perf_counter() - start)
    rate = 4e6 / sorted(times)[2] / 1e6
    if wrong:
        return FAULT, wrong
    return OK, f"all dtypes summed right; 4 MB to the next rank at {rate:,.0f} MB/s"


def _gpu(comm: Any) -> tuple[str, str]:
    import torch

    if not torch.cuda.is_available():
        return OK, f"none; the CPU, torch {torch.__version__}"
    count = torch.cuda.device_count()
    found = f"{count} x {torch.cuda.get_device_name(comm.device)}, rank {comm.rank} on {comm.device}"
    return (WARNING, f"{found}; {'; '.join(comm.warnings)}") if comm.warnings else (OK, found)


def _cuda_aware(comm: Any) -> tuple[str, str]:
    """What MPI says of itself, and how tensors of this rank's device travel."""
    from .comm.mpi import says_cuda

    return OK, f"MPI says {'yes' if says_cuda() else 'no'}; {comm.transport}: {comm.transport_reason}"


def _hdf5(comm: Any) -> tuple[str, str]:
    """A collective write by all ranks, read back. Ranks decide together, so that none is left in a collective."""
    try:
        import h5py

        said = h5py.get_config().mpi
        folder = tempfile.mkdtemp(prefix="slowmo-doctor-", dir=".") if comm.rank == 0 else ""
        mine = ("", bool(said), folder)
    except (ImportError, OSError) as error:
        mine = (f"{type(error).__name__}: {error}", False, "")
    everybody = comm.gather(mine)
    folder = everybody[0][2]
    faults = [fault for fault, _, _ in everybody if fault]
    try:
        if faults:
            return FAULT, faults[0]
        if not all(parallel for _, parallel, _ in everybody):
            return WARNING, f"h5py {h5py.__version__} is serial: ranks cannot write one file together"
        path = str(Path(folder) / "probe.h5")
        with h5py.File(path, "w", driver="mpio", comm=comm.mpi) as file:
            data = file.create_dataset("x", (comm.size, 1000), dtype="f4")
            with data.collective:
                data[comm.rank] = comm.rank
        comm.barrier()
        with h5py.File(path, "r") as file:
            written = [float(file["x"][r, 999]) for r in range(comm.size)]
        comm.barrier()
    finally:
        if comm.rank == 0 and folder:
            shutil.rmtree(folder, ignore_errors=True)
    if written != [float(r) for r in range(comm.size)]:
        return FAULT, f"a collective write came back as {written}"
    return OK, f"h5py {h5py.__version__}, HDF5 {h5py.version.hdf5_version}; {comm.size} ranks wrote one file together"


def _disk(comm: Any) -> tuple[str, str]:
    free = shutil.disk_usage(".").free
    if comm.rank == 0:
        try:
            with tempfile.NamedTemporaryFile(dir=".") as file:
                file.write(b"slowmo")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            return FAULT, f"this folder cannot be written: {error.strerror}"
    result = WARNING if free < 1e9 else OK
    return result, f"{free / 1e9:,.0f} GB free here, written and synced"


def without_ranks() -> list[Check]:
    """What can be said without MPI: the launcher. Used before ranks are started."""
    from .launch import find_mpirun, mpirun_version

    try:
        mpirun = find_mpirun()
        return [Check("launcher", OK, f"{mpirun_version(mpirun)} ({mpirun})")]
    except SlowmoError as error:
        return [Check("launcher", FAULT, str(error))]
