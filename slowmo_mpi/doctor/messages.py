"""Sums of every type on the ranks' own device, and how CUDA tensors travel."""

from __future__ import annotations

import torch

from ..comm import Communicator
from ..comm.mpi import says_cuda
from .checks import OK, Finding, conclude

LENGTH = 1000


def sums(comm: Communicator) -> Finding:
    """All-reduce of every type against what it must give."""
    wanted = comm.size + comm.size // 2
    faults = []
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        x = torch.full((LENGTH,), float(comm.rank % 2 + 1), dtype=dtype, device=comm.device)
        comm.all_reduce_(x)
        wrong = not torch.allclose(x.float().cpu(), torch.full((LENGTH,), float(wanted)), rtol=1e-2)
        ranks = [r for r, fault in enumerate(comm.gather(wrong)) if fault]
        if ranks:
            faults.append(f"an all-reduce of {dtype} is wrong on rank {ranks[0]} (of {len(ranks)}): not {wanted}")
    return conclude(f"{comm.size} ranks summed float32, float64, bfloat16 and float16 right", faults)


def cuda_aware(comm: Communicator) -> Finding:
    """What MPI says of itself, and what an exchange at the start has proved."""
    says = {True: "yes", False: "no", None: "nothing"}[says_cuda()]
    data = {"mpi_says": says, "transport": comm.transport, "reason": comm.transport_reason}
    if comm.device.type != "cuda":
        return Finding(OK, f"no GPU in use; asked whether it takes CUDA memory, MPI says {says}", (), data)
    return Finding(OK, f"MPI says {says}; {comm.transport}: {comm.transport_reason}", (), data)
