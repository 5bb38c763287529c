"""CUDA tensors, direct and staged: in the order of the streams, the same sums and trajectories as on the CPU."""

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
from slowmo_mpi.comm import Communicator, Endpoint

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


def on_the_gpu(comm: Endpoint, transport: str) -> Endpoint:
    """The real ranks again, with a GPU each, or a share of one. The simulated ones stay."""
    return Communicator(comm.mpi, timeout=60.0, transport=transport) if isinstance(comm, Communicator) else comm


def in_order(comm: Endpoint, transport: str, own_stream: bool) -> str:
    """Exchanges right behind long kernels that make the payload and still use the target; nothing is synchronised."""
    comm = on_the_gpu(comm, transport)
    device = torch.device("cuda", torch.cuda.current_device())
    own_stream = own_stream and isinstance(comm, Communicator)  # the simulated ranks share the default one
    stream = torch.cuda.Stream(device) if own_stream else torch.cuda.default_stream(device)
    left, right = (comm.rank - 1) % comm.size, (comm.rank + 1) % comm.size
    with torch.cuda.stream(stream):
        for length in (0, 1, 1000, 1 << 20, 3_000_001):  # of float32: none, less than a chunk, one chunk, three
            payload, target = torch.zeros(length, device=device), torch.zeros(length, device=device)
            for k in range(3):
                torch.cuda._sleep(50_000_000)
                payload.fill_(10 * k + comm.rank)
                target.fill_(-1.0)
                (got,) = comm.exchange(payload, [right], [left], [target]).wait()
                payload.fill_(-2.0)  # it was read
                copy = got * 2  # it is there
                assert copy.eq(2 * (10 * k + left)).all(), (length, k, copy[:3])
            x = torch.zeros(length, device=device)
            torch.cuda._sleep(50_000_000)
            x.add_(comm.rank + 1)
            assert comm.all_reduce_(x).eq(comm.size * (comm.size + 1) / 2).all(), length
    return getattr(comm, "transport", "")


@pytest.mark.parametrize("own_stream", [False, True], ids=["default-stream", "own-stream"])
@pytest.mark.parametrize("transport", ["auto", "staged"])
def test_messages_keep_the_order_of_the_stream(world: Simulated | Real, transport: str, own_stream: bool) -> None:
    chosen = set(world.run(in_order, transport, own_stream))
    assert len(chosen) == 1
    if transport == "staged" and isinstance(world, Real):
        assert chosen == {"staged"}


def pinned(comm: Endpoint) -> bool:
    comm = on_the_gpu(comm, "staged")
    if not isinstance(comm, Communicator):
        return True
    comm.stage_bytes = 1 << 16
    x = torch.arange(1 << 18, device=comm.device) + comm.rank
    pool = comm._flight.pool(x.device)
    idle = []
    for _ in range(8):
        comm.all_reduce_(x.clone())
        torch.cuda.synchronize()
        idle.append(pool.idle_bytes)
        assert all(memory.is_pinned() for kept in pool._idle.values() for memory, _ in kept)
    return 0 < idle[-1] <= 4 * idle[0]


def test_pinned_memory_is_used_again(world: Simulated | Real) -> None:
    assert all(world.run(pinned))


def warned(comm: Endpoint) -> tuple[int, int, list[str]]:
    comm = on_the_gpu(comm, "staged")
    return comm.local_rank, torch.cuda.device_count(), comm.warnings


def test_a_shared_gpu_is_told_once(world: Simulated | Real) -> None:
    for local_rank, gpus, warnings in world.run(warned):
        shared = isinstance(world, Real) and world.ranks > gpus and local_rank == 0
        assert len(warnings) == shared and all(f"{world.ranks} ranks share {gpus} GPU" in said for said in warnings)


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
