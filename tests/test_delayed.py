"""The delayed average (CO2): a round's mean displacement is taken in at the end of the next one."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from oracle import Problem
from test_algorithms import CASES, CONSTANT, DROP, STEPS, program, run, settings
from test_checkpoint import differ, snapshot
from test_worker import train_net
from torch import nn
from worlds import Real, Simulated

from slowmo_mpi import OSGP, SGP, AllReduce, Local, SlowMo, SlowmoError, simulate
from slowmo_mpi.bases import Base
from slowmo_mpi.comm import Endpoint
from slowmo_mpi.config import parse
from slowmo_mpi.errors import UsageError

DELAYED = [c | {"average": "delayed"} for c in CASES if c.get("tau", 6) and c.get("average") != "none"]


# ---- against the dense oracles ----
@pytest.mark.parametrize("case", DELAYED, ids=lambda c: "-".join(str(v) for v in c.values()))
@pytest.mark.parametrize("world", ["simulated-1", "simulated-3", "mpi-4"], indirect=True)
def test_equals_the_dense_oracle(world: Simulated | Real, case: dict) -> None:
    p, s = oracle.problem(world.ranks, STEPS), settings(case, world.ranks)
    z, w = oracle.trajectory(p, s)
    for rank, got in enumerate(run(world, p, s)):
        np.testing.assert_allclose(got[0], z[:, rank], rtol=0, atol=2e-12, err_msg=f"rank {rank}")
        np.testing.assert_allclose(got[1], w[:, rank], rtol=0, atol=1e-12)


@pytest.mark.parametrize("case", [c for c in DELAYED if c["algorithm"] in ("local", "sgp")],
                         ids=lambda c: "-".join(str(v) for v in c.values()))  # fmt: skip
@pytest.mark.parametrize("world", ["simulated-3"], indirect=True)
def test_rounded_equals_the_dense_oracle(world: Simulated, case: dict) -> None:
    p, s = oracle.problem(world.ranks, STEPS), settings(case | {"half": True}, world.ranks)
    z, _ = oracle.trajectory(p, s)
    for rank, got in enumerate(run(world, p, s, wire=torch.float16)):
        np.testing.assert_allclose(got[0], z[:, rank], rtol=0, atol=2e-12)


def by_rounds(p: Problem, rates, tau: int, alpha: float, beta: float) -> tuple[np.ndarray, np.ndarray]:
    """CO2 over Local SGD as it is told, a round at a time: where rounds start, and x0 after the last has arrived."""
    x0 = [p.x]  # of each round
    ways: list[np.ndarray] = []
    gammas: list[float] = []
    u = np.zeros_like(p.x)

    def take_in(t: int) -> np.ndarray:
        nonlocal u
        u = beta * u + ways[t] / gammas[t]
        return x0[-1] - alpha * gammas[t] * u

    for t in range(len(rates) // tau):
        ends = []
        for i in range(len(p.a)):
            x = x0[t]
            for k in range(t * tau, (t + 1) * tau):
                x = x - rates[k] * p.gradient(i, k, x)
            ends.append(x)
        ways.append(x0[t] - np.mean(ends, axis=0))
        gammas.append(sum(rates[t * tau : (t + 1) * tau]) / tau)
        x0.append(take_in(t - 1) if t else x0[t])
    return np.stack(x0), take_in(len(ways) - 1)


@pytest.mark.parametrize("tau, alpha, beta", [(1, 1.0, 0.0), (1, 0.8, 0.6), (3, 1.0, 0.5), (9, 0.7, 0.0)])
@pytest.mark.parametrize("rates", [CONSTANT, DROP], ids=["constant", "drop"])
@pytest.mark.parametrize("world", ["simulated-1", "simulated-3", "mpi-2"], indirect=True)
def test_the_rounds_of_local_sgd(world: Simulated | Real, rates, tau: int, alpha: float, beta: float) -> None:
    """And drain() takes in what is under way at the end: no round is lost."""
    p = oracle.problem(world.ranks, STEPS)
    starts, last = by_rounds(p, rates, tau, alpha, beta)
    slow = {"tau": tau, "alpha": alpha, "beta": beta, "buffers": "maintain", "average": "delayed"}
    for got in world.run(program, p, Local(), rates, {}, slow):
        np.testing.assert_allclose(got[0][tau - 1 :: tau], starts[1:], rtol=0, atol=1e-12)
        np.testing.assert_allclose(got[4], last, rtol=0, atol=1e-12)


# ---- a worker ----
def make(comm: Endpoint, base: Base, **slow: Any) -> SlowMo:
    torch.manual_seed(0)
    model = nn.Linear(9, 5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
    return SlowMo(model, optimizer, comm, base, **({"tau": 4, "average": "delayed", "beta": 0.3} | slow))


def train(worker: SlowMo, until: int) -> SlowMo:
    for k in range(worker.state.step, until):
        x = torch.randn(6, 9, generator=torch.Generator().manual_seed(100 * k + worker.comm.rank))
        worker.optimizer.zero_grad()
        worker.model(x).square().mean().backward()
        worker.step()
    return worker


@pytest.mark.parametrize("base", [AllReduce(), Local(), SGP(), OSGP(delay=3)], ids=lambda b: type(b).__name__)
@pytest.mark.parametrize("world", ["mpi-2", "mpi-4"], indirect=True)
def test_real_ranks_give_the_same_bits_as_simulated_ones(world: Real, base: Base) -> None:
    slow = {"tau": 4, "average": "delayed", "beta": 0.3}
    for mine, theirs in zip(
        world.run(train_net, base, slow), simulate(world.ranks, train_net, base, slow), strict=True
    ):
        for a, b in zip(mine[0] + mine[1], theirs[0] + theirs[1], strict=True):
            assert torch.equal(a, b)


def under_way(comm: Endpoint) -> list[bool]:
    """After each step, whether a displacement is waiting to be taken in; and that all start a round at one point."""
    worker, found = make(comm, Local(), tau=2), []
    for k in range(1, 7):
        train(worker, k)
        found.append(worker.state.late is not None)
        if k % 2 == 0:
            assert worker.consensus_distance() == 0
    worker.drain()
    return [*found, worker.state.late is not None]


def test_a_round_is_in_flight_while_the_next_computes() -> None:
    for found in simulate(3, under_way):
        assert found == [False, True, True, True, True, True, False]


def evaluates(comm: Endpoint, base: Base, until: int, look: bool, slow: dict) -> tuple:
    worker = make(comm, base, **slow)
    seen = None
    for k in range(1, until + 1):
        train(worker, k)
        if look:
            with worker.averaged():
                seen = worker.state.z[0].clone()
    kept = snapshot(worker)
    worker.drain()
    mean = comm.all_reduce_(worker.state.w * worker.state.z[0], divisor=comm.size)
    return kept, seen, mean


@pytest.mark.parametrize("slow", [{}, {"wire": torch.bfloat16}], ids=["plain", "bfloat16"])
@pytest.mark.parametrize("until", [4, 6, 8, 12])
@pytest.mark.parametrize("base", [Local(), OSGP(delay=2)], ids=lambda b: type(b).__name__)
def test_evaluation_sees_what_drain_leaves_and_changes_nothing(base: Base, until: int, slow: dict) -> None:
    looked, blind = (simulate(3, evaluates, base, until, look, slow) for look in (True, False))
    for a, b in zip(looked, blind, strict=True):
        assert not differ(a[0], b[0])
        torch.testing.assert_close(a[1], a[2], rtol=1e-6, atol=1e-6)


def test_training_goes_on_after_a_drain() -> None:
    """As at the start: the next round's end has nothing to take in. Nothing is taken in twice."""

    def both(comm: Endpoint) -> tuple[torch.Tensor, torch.Tensor]:
        worker = train(make(comm, Local()), 8)
        worker.drain()
        before = worker.state.slow[0].x0.clone()
        return before, train(worker, 12).state.slow[0].x0

    for before, after in simulate(2, both):
        assert torch.equal(before, after)


def sends(comm: Endpoint, base: Base, slow: dict) -> int:
    worker = make(comm, base, **slow)
    before = comm.sent_bytes
    train(worker, 12).drain()
    return comm.sent_bytes - before


@pytest.mark.parametrize("wire", [None, torch.bfloat16], ids=["plain", "bfloat16"])
def test_it_sends_what_the_exact_average_does(wire: torch.dtype | None) -> None:
    for base in (Local(), SGP()):
        delayed, exact = (simulate(3, sends, base, {"wire": wire, "average": a}) for a in ("delayed", "exact"))
        assert delayed == exact


# ---- checkpoints ----
def goes_on(comm: Endpoint, folder: str, base: Base, at: int, how: str, slow: dict) -> list[str]:
    worker = train(make(comm, base, **slow), at)
    worker.save(Path(folder) / "step-1.h5")
    tree = pickle.loads(pickle.dumps(worker.state_dict()))
    train(worker, 14)
    whole = snapshot(worker)
    other = worker if how == "back" else train(make(comm, base, **slow), 5)
    if how == "file":
        other.load(Path(folder) / "step-1.h5")
    else:
        other.load_state_dict(tree)
    return differ(whole, snapshot(train(other, 14)))


SLOW = [{}, {"wire": torch.bfloat16}, {"ranks_per_worker": 2, "wire": torch.float16}]


@pytest.mark.parametrize(
    "slow, how",
    [(slow, how) for slow in SLOW for how in ("file", "new", "back") if how != "file" or len(slow) < 2],
    ids=lambda x: "-".join(map(str, x.values())) if isinstance(x, dict) else x,
)
@pytest.mark.parametrize("at", [2, 4, 7, 8])
@pytest.mark.parametrize("base", [Local(), OSGP(delay=2)], ids=lambda b: type(b).__name__)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(
    base: Base, at: int, how: str, slow: dict, tmp_path: Path
) -> None:
    assert simulate(4, goes_on, str(tmp_path), base, at, how, slow) == [[]] * 4


@pytest.mark.parametrize("slow", SLOW[:2], ids=["plain", "bfloat16"])
@pytest.mark.parametrize("world", ["mpi-4"], indirect=True)
def test_real_ranks_go_on_too(world: Real, slow: dict, tmp_path: Path) -> None:
    assert world.run(goes_on, str(tmp_path), OSGP(delay=2), 7, "file", slow) == [[]] * 4


def leg(comm: Endpoint, folder: str, until: int) -> tuple:
    worker = make(comm, Local())
    if until > 8:
        worker.load(folder)
        assert worker.state.late is not None
        return worker.state.late.wait()[0], worker.state.late.rates, train(worker, until).state.slow[0].x0.clone()
    worker = train(worker, until)
    assert worker.state.late is not None
    worker.save(Path(folder) / f"step-{until}.h5")
    with worker.averaged():
        average = worker.model.weight.detach().clone()
    return worker.state.late.wait()[0], worker.state.late.rates, train(worker, 12).state.slow[0].x0, average


def test_another_number_of_ranks_takes_in_the_same_displacement(tmp_path: Path) -> None:
    old = simulate(4, leg, str(tmp_path), 8)
    for ranks in (1, 3):
        for got in simulate(ranks, leg, str(tmp_path), 12):
            assert torch.equal(got[0], old[0][0]) and got[1] == old[0][1]
            assert torch.equal(got[2], old[0][2])  # of the round until step 12 nothing is in x0 yet


@pytest.mark.parametrize("until", [6, 8])
def test_the_exported_model_is_the_evaluated_one(until: int, tmp_path: Path) -> None:
    from slowmo_mpi.checkpoint.export import state_dict
    from slowmo_mpi.checkpoint.read import Checkpoint

    (*_, average), *_ = simulate(2, leg, str(tmp_path), until)
    with Checkpoint(tmp_path / f"step-{until}.h5") as checkpoint:
        torch.testing.assert_close(state_dict(checkpoint)["weight"], average, rtol=0, atol=1e-6)


def test_a_round_on_its_way_is_not_dropped() -> None:
    def program(comm: Endpoint) -> None:
        tree = train(make(comm, SGP()), 5).state_dict()
        make(comm, SGP(), average="exact").load_state_dict(tree)

    with pytest.raises(SlowmoError, match="average on its way"):
        simulate(2, program)


# ---- what cannot work ----
def test_it_cannot_be_sharded() -> None:
    with pytest.raises(UsageError, match="all of x0"):
        simulate(2, lambda comm: make(comm, Local(), sharded=True))
    with pytest.raises(UsageError, match="all of x0"):
        parse("[run]\nsteps = 5", overrides=["slowmo.average=delayed", "slowmo.sharded=true"])
    assert parse("[run]\nsteps = 5", overrides=["slowmo.average=delayed"]).slowmo.average == "delayed"


def learns(comm: Endpoint, average: str) -> float:
    torch.manual_seed(0)
    solution = torch.randn(64, 8)
    model = nn.Linear(64, 8, bias=False)
    worker = SlowMo(
        model, torch.optim.SGD(model.parameters(), lr=0.02), comm, Local(), tau=8, beta=0.2, average=average
    )
    draw = torch.Generator().manual_seed(comm.rank)
    for _ in range(800):
        x = torch.randn(16, 64, generator=draw)
        worker.optimizer.zero_grad()
        (model(x) - x @ solution - 0.1 * torch.randn(16, 8, generator=draw)).square().mean().backward()
        worker.step()
    worker.drain()
    with worker.averaged():
        return float((model.weight.detach() - solution.T).norm())


def test_it_learns() -> None:
    exact, delayed = (simulate(4, learns, average)[0] for average in ("exact", "delayed"))
    assert delayed < 1.2 * exact + 0.1 < 2
