"""What the launcher told this process in its environment, before (and as a check on) what MPI says."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

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
