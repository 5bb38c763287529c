"""The communicator and its twin: exact sums, order, pieces, agreement, bounded waits."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from worlds import RankError, Real, Simulated

from slowmo_mpi import SlowmoError, simulate
from slowmo_mpi.comm import Communicator, Endpoint, core
from slowmo_mpi.comm.launcher import launched
from slowmo_mpi.launch import mpirun_command

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def collectives(comm: Endpoint, chunk_bytes: int, staged: bool = False):
    """Sums of small whole numbers, so that every order of addition gives the same bits."""
    if staged:
        comm = Communicator(comm.mpi, timeout=15.0, transport="staged")
    comm.chunk_bytes = chunk_bytes
    m = comm.size
    for dtype in DTYPES:
        for length in sorted({0, 1, 2, m - 1, m, m + 1, 2 * m + 1, 63, 64, 65, 1000}):

            def of(rank: int, length: int = length, dtype: torch.dtype = dtype) -> torch.Tensor:
                return (torch.arange(length) % 7 + rank).to(dtype)

            total = sum((of(r).double() for r in range(m)), torch.zeros(length, dtype=torch.float64)).to(dtype)
            x = comm.all_reduce_(of(comm.rank))
            assert torch.equal(x, total), (dtype, length)
            x = of(comm.rank)
            mine = comm.reduce_scatter_(x)
            assert torch.equal(mine, total[comm.shard(length)]), (dtype, length)
            assert mine.data_ptr() == x[comm.shard(length)].data_ptr() or not length
            y = torch.full((length,), -1.0).to(dtype)
            y[comm.shard(length)] = total[comm.shard(length)]
            assert torch.equal(comm.all_gather_(y), total), (dtype, length)
            b = comm.broadcast_(of(comm.rank) if comm.rank else total.clone())
            assert torch.equal(b, total), (dtype, length)
    parts = [comm.shard(1000, r) for r in range(m)]
    assert parts[0].start == 0 and parts[-1].stop == 1000
    assert all(a.stop == b.start for a, b in itertools.pairwise(parts))
    strided = torch.full((3, 4), float(comm.rank)).t()
    comm.broadcast_(strided)
    assert (strided == 0).all()
    return True


@pytest.mark.parametrize("chunk_bytes", [16, 1 << 20])
def test_collectives_are_exact_for_every_length_and_dtype(world: Simulated | Real, chunk_bytes: int) -> None:
    assert all(world.run(collectives, chunk_bytes))


@pytest.mark.parametrize("world", ["mpi-3"], indirect=True)
def test_collectives_through_host_memory(world: Real) -> None:
    """The staged transport, with the CPU standing in for the GPU: the same copies, the same order."""
    assert all(world.run(collectives, 64, True))


def same_bits(comm: Endpoint) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(comm.rank)
    x = torch.randn(100_003, generator=generator)
    comm.chunk_bytes = 4096
    return [comm.all_reduce_(x.clone()) for _ in range(3)]


def test_all_reduce_gives_the_same_bits_every_time_and_everywhere(world: Simulated | Real) -> None:
    got = [x for runs in world.run(same_bits) for x in runs]
    assert all(torch.equal(x, got[0]) for x in got)
    simulated = simulate(world.ranks, same_bits)
    assert torch.equal(got[0], simulated[0][0])


def exchanges(comm: Endpoint, limit: int) -> bool:
    """Many exchanges outstanding at once, tested late and out of order, in pieces of `limit` bytes."""
    core.MESSAGE_LIMIT_BYTES, whole = limit, core.MESSAGE_LIMIT_BYTES
    try:
        m, posted = comm.size, []
        for k in range(5):
            payload = torch.arange(50.0) + 1000 * comm.rank + 100_000 * k
            to = sorted({(comm.rank + d) % m for d in (1, 2)} - {comm.rank})
            sources = sorted({(comm.rank - d) % m for d in (1, 2)} - {comm.rank})
            posted.append((k, payload, sources, comm.exchange(payload, to, sources)))
        for k, _, sources, exchange in reversed(posted):
            exchange.test()
            for source, got in zip(sources, exchange.wait(), strict=True):
                assert torch.equal(got, torch.arange(50.0) + 1000 * source + 100_000 * k)
            assert exchange.test()
    finally:
        core.MESSAGE_LIMIT_BYTES = whole
    return True


@pytest.mark.parametrize("limit", [12, 1 << 30])
def test_exchanges_overlap_and_keep_apart(world: Simulated | Real, limit: int) -> None:
    assert all(world.run(exchanges, limit))


def agreement(comm: Endpoint):
    values = comm.gather({"rank": comm.rank, "text": "x" * comm.rank})
    later = [comm.gather_later(bytes([comm.rank, k])) for k in range(3)]
    last = any(comm.gather(comm.rank == comm.size - 1))
    assert [g.wait() for g in later] == [[bytes([r, k]) for r in range(comm.size)] for k in range(3)]
    never = any(comm.gather(False))
    comm.barrier()
    return values, last, never


def test_agreement(world: Simulated | Real) -> None:
    for values, last, never in world.run(agreement):
        assert values == [{"rank": r, "text": "x" * r} for r in range(world.ranks)]
        assert last and not never


def tag_wraps(comm: Endpoint) -> bool:
    comm._operations = core.TAGS - 3
    for k in range(8):
        x = comm.all_reduce_(torch.ones(5) * k)
        assert (x == comm.size * k).all()
    return True


@pytest.mark.parametrize("world", ["simulated-4", "mpi-3"], indirect=True)
def test_tags_wrap(world: Simulated | Real) -> None:
    assert all(world.run(tag_wraps))


def counted(comm: Endpoint) -> int:
    before = comm.sent_bytes
    comm.all_reduce_(torch.ones(1_200_000))
    return comm.sent_bytes - before


def test_bytes_are_counted(world: Simulated | Real) -> None:
    """2 (m-1)/m of a long vector per rank."""
    m = world.ranks
    assert world.run(counted) == [2 * (m - 1) * 4_800_000 // m] * m


def absent(comm: Endpoint) -> str:
    """Rank 0 waits for a message that rank 1 never sends."""
    if comm.rank:
        return ""
    comm.step, comm.timeout = 17, 0.5
    start = time.perf_counter()
    try:
        comm.exchange(torch.zeros(4), [], [1]).wait()
    except SlowmoError as error:
        assert time.perf_counter() - start < 5
        return str(error)
    return "no error"


@pytest.mark.parametrize("world", ["simulated-2"], indirect=True)
def test_a_wait_is_bounded_and_names_everything(world: Simulated) -> None:
    message = world.run(absent)[0]
    assert re.search(r"Rank 0 on .* waited .* s for rank 1 at step 17: gossip exchange", message)


def test_a_real_wait_is_bounded_and_names_everything() -> None:
    """In a world of its own: a receive that never completes would trouble the next program."""
    world = Real(2)
    try:
        message = world.run(absent)[0]
    finally:
        world.stop()
    assert re.search(r"Rank 0 on \S+ waited \d+\.\d s for rank 1 at step 17: gossip exchange", message)


def fails(comm: Endpoint) -> None:
    if comm.rank == 1:
        raise ValueError("rank 1's own error")
    comm.barrier()


def test_one_rank_that_fails_ends_all() -> None:
    with pytest.raises(ValueError, match="rank 1's own error"):
        simulate(3, fails)
    world = Real(2)
    try:
        with pytest.raises(RankError):
            world.run(fails)
    finally:
        world.stop()


def test_an_exception_in_a_script_of_yours_ends_the_job(tmp_path: Path) -> None:
    """Without the command around it: rank 1 raises, rank 0 waits, and all end at once with rank 1's traceback."""
    script = tmp_path / "script.py"
    script.write_text(
        "from slowmo_mpi import Communicator\n"
        "comm = Communicator()\n"
        "if comm.rank == 1:\n"
        "    raise ValueError('my own mistake')\n"
        "comm.barrier()\n"
    )
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    done = subprocess.run(
        mpirun_command(2, [sys.executable, str(script)]),
        env={**os.environ, **root},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode != 0
    assert done.stderr.count("ValueError: my own mistake") == 1


def test_a_message_must_not_change_in_flight() -> None:
    """The twin delivers late on purpose, so that a live tensor given as payload is noticed."""

    def program(comm: Endpoint) -> float:
        payload = torch.zeros(1)
        exchange = comm.exchange(payload, [1 - comm.rank], [1 - comm.rank])
        payload.fill_(7.0)
        return float(exchange.wait()[0])

    assert 7.0 in simulate(2, program)


def test_simulated_ranks_have_their_own_random_streams_and_leave_the_callers() -> None:
    torch.manual_seed(5)
    wanted = torch.rand(1)
    torch.manual_seed(5)

    def program(comm: Endpoint) -> list[float]:
        torch.manual_seed(comm.rank)
        drawn = []
        for _ in range(3):
            drawn.append(float(torch.rand(1)))
            comm.barrier()  # others draw in between
        return drawn

    for rank, drawn in enumerate(simulate(3, program)):
        generator = torch.Generator().manual_seed(rank)
        assert drawn == [float(torch.rand(1, generator=generator)) for _ in range(3)]
    assert torch.equal(torch.rand(1), wanted)


MPIRUN_IN_SLURM = {
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "1",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_PROCID": "0",
}


@pytest.mark.parametrize(
    "environment, wanted",
    [
        ({}, None),
        ({"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "2"}, ("Open MPI", 4, 2)),
        ({"PMI_SIZE": "3", "PMI_RANK": "0"}, ("Hydra", 3, 0)),
        ({"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "7"}, ("srun", 8, 7)),
        (MPIRUN_IN_SLURM, ("Open MPI", 4, 1)),
        ({"PMI_SIZE": "three", "PMI_RANK": "0"}, None),
    ],
)  # fmt: skip
def test_the_launchers_claim(environment: dict[str, str], wanted) -> None:
    claim = launched(environment)
    if wanted is None:
        assert claim is None
    else:
        assert wanted[0] in claim.launcher and (claim.size, claim.rank) == wanted[1:]
