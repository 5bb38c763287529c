"""CUDA tensors, staged through pinned host memory: the same sums, the same trajectories as on the CPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
from test_algorithms import DROP, STEPS, Point
from worlds import Real, Simulated

from slowmo_mpi import OSGP, SGP, AllReduce, Checkpoints, Local, SlowMo
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


def resumed(comm: Endpoint, p: oracle.Problem, base: Base, folder: str, device: str, there: str) -> np.ndarray:
    """Eight steps on `device`, a checkpoint that is written while one more is done; the rest on `there`."""

    def worker_on(where: str) -> SlowMo:
        model = Point(p.x).to(where)
        return SlowMo(model, torch.optim.Adam(model.parameters(), lr=1e-3), comm, base, tau=6, buffers="maintain")

    def steps(worker: SlowMo, first: int, last: int) -> None:
        x = worker.model()
        a, b = (torch.tensor(v, device=x.device) for v in (p.a[comm.rank], p.b[comm.rank]))
        for k in range(first, last):
            e = worker.model() - b[k] + torch.randn(len(x), device=x.device) * 0.01
            worker.optimizer.zero_grad()
            (e @ a @ e / 2).backward()
            worker.step()

    worker = worker_on(device)
    checkpoints = Checkpoints(worker, folder)
    steps(worker, 0, 8)
    checkpoints.save()
    steps(worker, 8, 9)
    checkpoints.wait()
    other = worker_on(there)
    Checkpoints(other, folder).load()
    steps(other, 8, STEPS)
    if there == device:  # the same to the bit as going on without a checkpoint
        whole = worker_on(device)
        whole.load(folder)
        steps(whole, 8, STEPS)
        assert torch.equal(whole.model(), other.model())
    other.drain()
    return other.model().detach().cpu().numpy()


@pytest.mark.parametrize("base", [SGP(), OSGP(delay=2)], ids=str)
def test_a_checkpoint_of_the_gpu(world: Simulated | Real, base: Base, tmp_path: Path) -> None:
    """Random streams of the device included; and what a GPU wrote, a CPU goes on from."""
    p = oracle.problem(world.ranks, STEPS)
    for there in ("cuda", "cpu"):
        found = world.run(resumed, p, base, str(tmp_path / there), "cuda", there)
        assert all(np.isfinite(x).all() for x in found)
