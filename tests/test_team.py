"""Workers of several ranks: what they compute is what a worker of one rank would, with all their samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from worlds import Real, Simulated

from slowmo_mpi import DPSGD, OSGP, SGP, AllReduce, Local, SlowMo, simulate
from slowmo_mpi.comm import Endpoint
from slowmo_mpi.errors import UsageError
from slowmo_mpi.team import ranks_of_a_node

STEPS = 11
SETTINGS: list[tuple[str, Any, dict[str, Any]]] = [
    ("allreduce", AllReduce(), {"tau": 3}),
    ("local", Local(), {"tau": 4, "beta": 0.5}),
    ("local sharded", Local(), {"tau": 4, "beta": 0.5, "sharded": True}),
    ("dpsgd", DPSGD(), {"tau": 0}),
    ("sgp", SGP(), {"tau": 4, "beta": 0.5, "buffers": "maintain"}),
    ("sgp sharded", SGP(), {"tau": 5, "sharded": True}),
    ("osgp", OSGP(delay=2), {"tau": 0}),
    ("noaverage", SGP(), {"tau": 3, "average": "none"}),
]


def samples(step: int, rank: int) -> Tensor:
    return torch.randn(4, 7, generator=torch.Generator().manual_seed(1000 * step + rank))


def trains(
    comm: Endpoint, base: Any, settings: dict[str, Any], ranks: int, teams: bool, cut: int = 0, file: str = ""
) -> list[Tensor]:
    """`teams`: workers of so many ranks; else each rank has the samples of so many. cut: resume in between."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3))

    def make() -> SlowMo:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        return SlowMo(model, optimizer, comm, base, ranks_per_worker=ranks if teams else 1, **settings)

    worker = make()
    for step in range(STEPS):
        if step == cut > 0:
            if file:
                worker.save(file)
            copied = {k: clone(v) for k, v in worker.state_dict().items()}
            worker.drain()  # what was in flight belongs to the life that ends
            worker = make()
            if file:
                worker.load(file)
            else:
                worker.load_state_dict(copied)
        mine = [comm.rank] if teams else range(comm.rank * ranks, (comm.rank + 1) * ranks)
        worker.optimizer.zero_grad()
        model(torch.cat([samples(step, r) for r in mine])).square().mean().backward()
        worker.step()
    worker.drain()
    with worker.averaged():
        mean = torch.cat([p.detach().flatten() for p in model.parameters()])
    return [torch.cat([p.detach().flatten() for p in model.parameters()]), mean, torch.tensor(worker.state.w)]


def clone(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {k: clone(v) for k, v in value.items()}
    if hasattr(value, "part"):
        return type(value)(value.part.clone(), value.here, value.total)
    return [clone(v) for v in value] if isinstance(value, list) else value


@pytest.mark.parametrize("name, base, settings", SETTINGS, ids=[s[0] for s in SETTINGS])
@pytest.mark.parametrize("ranks, workers", [(2, 2), (3, 2)])
def test_workers_of_several_ranks(ranks: int, workers: int, name: str, base: Any, settings: dict[str, Any]) -> None:
    found = simulate(ranks * workers, trains, base, settings, ranks, True)
    expected = simulate(workers, trains, base, settings, ranks, False)
    for r, (z, mean, w) in enumerate(found):
        assert torch.equal(z, found[r - r % ranks][0]), "the ranks of a worker differ"
        assert torch.equal(mean, found[0][1])
        torch.testing.assert_close(z, expected[r // ranks][0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(mean, expected[0][1], rtol=1e-4, atol=1e-5)
        assert w == expected[r // ranks][2]


@pytest.mark.parametrize("world", ["mpi-4"], indirect=True)
def test_real_ranks_give_the_bits_of_simulated_ones(world: Real) -> None:
    for _, base, settings in SETTINGS:
        real, simulated = (run(trains, base, settings, 2, True) for run in (world.run, Simulated(4).run))
        for a, b in zip(real, simulated, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("name, base, settings", SETTINGS, ids=[s[0] for s in SETTINGS])
@pytest.mark.parametrize("cut", [6])
def test_a_resumed_run_goes_on_to_the_bit(cut: int, name: str, base: Any, settings: dict[str, Any]) -> None:
    whole = simulate(6, trains, base, settings, 3, True)
    resumed = simulate(6, trains, base, settings, 3, True, cut)
    for a, b in zip(whole, resumed, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("world", ["simulated-4", "mpi-4"], indirect=True)
def test_a_run_resumed_from_a_file_goes_on_to_the_bit(world: Simulated | Real, tmp_path: Path) -> None:
    for name, base, settings in SETTINGS:
        whole = world.run(trains, base, settings, 2, True)
        resumed = world.run(trains, base, settings, 2, True, 6, str(tmp_path / f"{name}.h5"))
        for a, b in zip(whole, resumed, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True)), name


def placed(comm: Endpoint) -> tuple[int, ...]:
    worker = SlowMo(m := nn.Linear(2, 2), torch.optim.SGD(m.parameters(), lr=0.1), comm, SGP(),
                    ranks_per_worker=ranks_of_a_node(comm))  # fmt: skip
    assert worker.team.inside is not None
    return worker.team.inside.rank, worker.team.across.rank, worker.team.ranks


def test_a_node_is_a_worker() -> None:
    assert simulate(6, placed, ranks_per_host=3) == [(i % 3, i // 3, 3) for i in range(6)]


def uneven(comm: Endpoint) -> None:
    SlowMo(m := nn.Linear(2, 2), torch.optim.SGD(m.parameters(), lr=0.1), comm, SGP(), ranks_per_worker=2)


def test_ranks_that_do_not_make_workers_are_refused() -> None:
    with pytest.raises(UsageError, match="3 ranks do not make workers of 2"):
        simulate(3, uneven)


def test_both_worlds_are_meant(world: Simulated | Real) -> None:
    """Every world: one worker of all ranks is AllReduce-SGD in any base's clothes."""
    for z, *_ in (got := world.run(trains, Local(), {"tau": 3, "beta": 0.0}, world.ranks, True)):
        assert torch.equal(z, got[0][0])
