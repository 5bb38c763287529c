"""CUDA tensors, staged through pinned host memory: the same sums, the same trajectories as on the CPU."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
import torch
from test_algorithms import DROP, STEPS, Point
from worlds import Real, Simulated

from slowmo_mpi import OSGP, SGP, AllReduce, Local, SlowMo
from slowmo_mpi.bases import Base
from slowmo_mpi.comm import Endpoint

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.parametrize("world", ["simulated-4", "mpi-2", "mpi-4"], indirect=True),
]


def sums(comm: Endpoint) -> list[torch.Tensor]:
    x = torch.arange(10_001, dtype=torch.float32) % 7 + comm.rank
    there = comm.all_reduce_(x.cuda()).cpu()
    neighbour = comm.exchange(x.cuda(), [(comm.rank + 1) % comm.size], [(comm.rank - 1) % comm.size]).wait()[0].cpu()
    return [there, comm.all_reduce_(x.clone()), neighbour]


def test_collectives_on_the_gpu(world: Simulated | Real) -> None:
    for rank, (there, here, neighbour) in enumerate(world.run(sums)):
        assert torch.equal(there, here)
        assert torch.equal(neighbour, torch.arange(10_001) % 7 + float((rank - 1) % world.ranks))


def train(comm: Endpoint, p: oracle.Problem, base: Base, device: str, slow: dict) -> np.ndarray:
    model = Point(p.x).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9)
    worker = SlowMo(model, optimizer, comm, base, tau=6, beta=0.5, **slow)
    a, b = torch.tensor(p.a[comm.rank], device=device), torch.tensor(p.b[comm.rank], device=device)
    for k, rate in enumerate(DROP):
        optimizer.param_groups[0]["lr"] = rate
        e = model() - b[k]
        optimizer.zero_grad()
        (e @ a @ e / 2).backward()
        worker.step()
    worker.drain()
    return model().detach().cpu().numpy()


@pytest.mark.parametrize("slow", [{}, {"sharded": True, "buffers": "average"}], ids=["whole", "sharded"])
@pytest.mark.parametrize("base", [AllReduce(), Local(), SGP(), OSGP(), OSGP(delay=2)], ids=str)
def test_the_trajectory_on_the_gpu_is_the_cpus(world: Simulated | Real, base: Base, slow: dict) -> None:
    p = oracle.problem(world.ranks, STEPS)
    there, here = (world.run(train, p, base, device, slow) for device in ("cuda", "cpu"))
    np.testing.assert_allclose(there, here, rtol=0, atol=1e-11)
