"""torch.distributed over gloo, in the same processes as MPI: what to compare with."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from ..comm import Endpoint
from ..errors import UsageError


@contextmanager
def gloo(comm: Endpoint) -> Iterator[None]:
    """torch.distributed's default group, of MPI's ranks. They meet at MASTER_ADDR:MASTER_PORT, else at rank 0."""
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_gloo_available()):
        raise UsageError("This torch has no gloo.", "Leave out --against.")
    alone = len(set(comm.gather(comm.host))) == 1
    address = os.environ.get("MASTER_ADDR") or ("127.0.0.1" if alone else socket.gethostname())
    port = os.environ.get("MASTER_PORT") or _free_port()
    address, port = comm.gather((address, port))[0]
    limit = timedelta(seconds=comm.timeout)
    dist.init_process_group(
        "gloo", init_method=f"tcp://{address}:{port}", rank=comm.rank, world_size=comm.size, timeout=limit
    )
    try:
        yield
    finally:
        dist.destroy_process_group()


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return str(probe.getsockname()[1])
