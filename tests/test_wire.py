"""Messages in half precision: nothing is lost, workers that are equal stay equal, and half the bytes travel."""

from __future__ import annotations

import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from test_algorithms import CASES, STEPS, run, settings
from test_checkpoint import differ, snapshot
from test_worker import train_net
from torch import nn
from worlds import Real, Simulated

from slowmo_mpi import DPSGD, OSGP, SGP, AllReduce, Local, SlowMo, SlowmoError, simulate
from slowmo_mpi.bases import Base
from slowmo_mpi.comm import Endpoint
from slowmo_mpi.comm.compressed import ErrorFeedback
from slowmo_mpi.config import parse
from slowmo_mpi.errors import UsageError
from slowmo_mpi.flat import FlatParameters
from slowmo_mpi.state import State

BFLOAT16, FLOAT16 = torch.bfloat16, torch.float16
WIRES = pytest.mark.parametrize("wire", [BFLOAT16, FLOAT16], ids=["bfloat16", "float16"])


def vector_model(d: int) -> nn.ParameterDict:
    return nn.ParameterDict({"x": nn.Parameter(torch.zeros(d))})


# ---- against the dense oracle, which rounds to float16 itself ----
ROUNDED = [c for c in CASES if c["algorithm"] != "allreduce"]


@pytest.mark.parametrize("case", ROUNDED, ids=lambda c: "-".join(str(v) for v in c.values()))
@pytest.mark.parametrize("world", ["simulated-3", "mpi-4"], indirect=True)
def test_equals_the_dense_oracle(world: Simulated | Real, case: dict) -> None:
    p, s = oracle.problem(world.ranks, STEPS), settings(case | {"half": True}, world.ranks)
    exact, _ = oracle.trajectory(p, settings(case, world.ranks))
    z, w = oracle.trajectory(p, s)
    assert np.abs(z - exact).max() > 1e-5
    for rank, got in enumerate(run(world, p, s, wire=FLOAT16)):
        np.testing.assert_allclose(got[0], z[:, rank], rtol=0, atol=2e-12, err_msg=f"rank {rank}")
        np.testing.assert_allclose(got[1], w[:, rank], rtol=0, atol=1e-12)


# ---- gossip: what is sent and what is kept make up what was there ----
def drifts(comm: Endpoint, base: Base, wire: torch.dtype | None, exchanges: int, d: int = 300) -> tuple:
    """After steps that move the numerators by known noise: what the mean is off by, and the largest distance."""
    model = vector_model(d)
    flat = FlatParameters(model, [list(model.parameters())])
    s = State(flat, flat.buffers, wire)
    base = base.bind(comm.size)
    draw = torch.Generator().manual_seed(comm.rank)
    (z,) = s.z
    z.copy_(torch.randn(z.numel(), generator=draw) + 1)
    true = z.double()
    noise = torch.empty_like(z)

    def update(scale: float) -> None:
        z.sub_(noise, alpha=scale)

    for _ in range(exchanges * max(1, getattr(base, "delay", 1))):
        base.before_gradient(s, comm, math.inf)
        noise.normal_(std=1e-3, generator=draw)
        true -= noise
        base.step(s, comm, update, math.inf)
    numerator = z.double() * s.w
    if s.in_flight is not None and s.in_flight.sent:
        numerator += s.in_flight.packet.vectors[0].double() * s.in_flight.sent
    assert s.phase == exchanges
    lost = comm.all_reduce_(true - numerator, divisor=comm.size)
    mean = comm.all_reduce_(true, divisor=comm.size)
    return float(lost.abs().max()), float((z - mean).abs().max())


GRAPHS = ("exponential", "star", "complete")
GOSSIP = [DPSGD(), DPSGD("star"), *(OSGP(graph, delay) for delay in range(4) for graph in GRAPHS)]


def names(value: Any) -> str | None:
    if not isinstance(value, Base):
        return None
    return "-".join(str(x) for x in (type(value).__name__, *vars(value).values()))


@WIRES
@pytest.mark.parametrize("ranks", [2, 3, 4, 5])
@pytest.mark.parametrize("base", GOSSIP, ids=names)
def test_gossip_loses_nothing(base: Base, ranks: int, wire: torch.dtype) -> None:
    lost, distance = simulate(ranks, drifts, base, wire, 200)[0]
    assert lost < 2e-5 and distance < 0.2


@pytest.mark.parametrize(
    "ranks, base",
    [(2, DPSGD()), (3, SGP()), (4, OSGP(delay=1)), (5, OSGP(delay=2)), (3, OSGP(delay=3)), (4, OSGP("star", 1))],
    ids=names,
)
def test_gossip_loses_nothing_in_10_000_exchanges(ranks: int, base: Base) -> None:
    """Rounding by itself would take 2^-9 of 1, 10,000 times; float32's own rounding is all that there is."""
    lost, distance = simulate(ranks, drifts, base, BFLOAT16, 10_000, 100)[0]
    assert lost < 1e-4 and distance < 0.2


def stays(comm: Endpoint, base: Base, wire: torch.dtype) -> bool:
    torch.manual_seed(0)
    model = nn.Linear(40, 40)
    worker = SlowMo(model, torch.optim.SGD(model.parameters(), lr=0.1), comm, base, tau=0, wire=wire)
    before = worker.state.z[0].clone()
    for _ in range(20):
        model.zero_grad(set_to_none=False)
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        worker.step()
    worker.drain()
    return torch.equal(worker.state.z[0], before)


@WIRES
@pytest.mark.parametrize("base", [DPSGD(), SGP(), OSGP(), OSGP(delay=3)], ids=names)
@pytest.mark.parametrize("world", ["simulated-2", "simulated-4", "simulated-5", "mpi-3"], indirect=True)
def test_equal_workers_stay_equal_to_the_bit(world: Simulated | Real, base: Base, wire: torch.dtype) -> None:
    assert all(world.run(stays, base, wire))


# ---- exact averages: the errors hold what is missing ----
def averages(comm: Endpoint, d: int, wire: torch.dtype, dtype: torch.dtype) -> tuple:
    draw = torch.Generator().manual_seed(comm.rank)
    feedback = ErrorFeedback.start(torch.empty(d, dtype=dtype), wire)
    given, means = torch.zeros(d, dtype=torch.float64), torch.zeros(d, dtype=torch.float64)
    sent, last = comm.sent_bytes, None
    for _ in range(300):
        x = (torch.randn(d, generator=draw) * 0.01 + 1).to(dtype)
        given += x
        last = feedback.all_reduce(comm, x, "a test")()
        means += last
    return given, means, feedback.error.double(), last, (comm.sent_bytes - sent) / 300


@WIRES
@pytest.mark.parametrize("d", [1, 7, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_means_and_errors_add_up(world: Simulated | Real, d: int, wire: torch.dtype, dtype: torch.dtype) -> None:
    got = world.run(averages, d, wire, dtype)
    m = world.ranks
    given, errors = sum(g[0] for g in got), sum(g[2] for g in got)
    within = 1e-10 if dtype == torch.float64 else 2e-5 * m  # 300 roundings of the errors, below 2^-8, in float32
    torch.testing.assert_close(m * got[0][1] + errors, given, rtol=0, atol=within)
    assert errors.abs().max() < 2**-6 * m
    for g in got:
        assert torch.equal(g[3], got[0][3]) and torch.equal(g[1], got[0][1])
    if m > 1:
        assert got[0][3].dtype == wire
        assert sum(g[4] for g in got) == pytest.approx(2 * (m - 1) * d * 2)


@pytest.mark.parametrize("d", [1, 1000])
@pytest.mark.parametrize("world", ["mpi-2", "mpi-3", "mpi-4"], indirect=True)
def test_real_and_simulated_means_have_the_same_bits(world: Real, d: int) -> None:
    real, simulated = (w.run(averages, d, BFLOAT16, torch.float32) for w in (world, Simulated(world.ranks)))
    for a, b in zip(real, simulated, strict=True):
        assert torch.equal(a[2], b[2]) and torch.equal(a[3], b[3])


# ---- whole workers ----
BASES = [AllReduce(), Local(), DPSGD(), SGP(), OSGP(), OSGP(delay=3)]


@pytest.mark.parametrize("base", BASES, ids=names)
@pytest.mark.parametrize("world", ["mpi-2", "mpi-4"], indirect=True)
def test_real_ranks_give_the_same_bits_as_simulated_ones(world: Real, base: Base) -> None:
    slow = {"tau": 5, "wire": BFLOAT16}
    real = world.run(train_net, base, slow)
    for mine, theirs in zip(real, simulate(world.ranks, train_net, base, slow), strict=True):
        for a, b in zip(mine[0] + mine[1], theirs[0] + theirs[1], strict=True):
            assert torch.equal(a, b)


@WIRES
@pytest.mark.parametrize("base", BASES, ids=names)
@pytest.mark.parametrize("world", ["simulated-1", "simulated-3", "mpi-4"], indirect=True)
def test_all_workers_are_bit_identical_after_line_8(world, base: Base, wire: torch.dtype) -> None:
    got = world.run(train_net, base, {"tau": 4, "wire": wire}, torch.optim.SGD, 8)
    for state, average, distance in got:
        assert distance == 0
        for a, b, c in zip(state, got[0][0], average, strict=True):
            assert torch.equal(a, b)
            torch.testing.assert_close(a, c)


def learns(comm: Endpoint, base: Base, slow: dict) -> tuple[float, float, torch.Tensor]:
    """Noisy least squares, other data on each rank: how far the averaged model is from the solution, the bytes sent."""
    torch.manual_seed(0)
    solution = torch.randn(64, 8)
    model = nn.Linear(64, 8, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.5)
    worker = SlowMo(model, optimizer, comm, base, buffers="maintain", beta=0.3, **slow)
    draw = torch.Generator().manual_seed(comm.rank)
    comm.allreduce = "ring"  # which sends the least
    sent = comm.sent_bytes
    for _ in range(400):
        x = torch.randn(16, 64, generator=draw)
        y = x @ solution + 0.1 * torch.randn(16, 8, generator=draw)
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        worker.step()
    sent = comm.sent_bytes - sent
    with worker.averaged():
        weight = model.weight.detach().clone()
        return float((weight - solution.T).norm()), sent, weight


@WIRES
@pytest.mark.parametrize("slow", [{"tau": 0}, {"tau": 8}], ids=["alone", "slowmo"])
@pytest.mark.parametrize("base", BASES, ids=names)
def test_training_ends_where_full_precision_does_with_half_the_bytes(base: Base, slow: dict, wire: torch.dtype) -> None:
    if base == Local() and not slow["tau"]:
        slow = {"tau": 1}
    exact, all_bytes, there = simulate(4, learns, base, slow)[0]
    error, sent, here = simulate(4, learns, base, slow | {"wire": wire})[0]
    assert error < 1.05 * exact < 0.5
    assert (here - there).abs().max() < 0.01
    assert sent == pytest.approx(all_bytes / 2, rel=0.01)  # a gossip message also has a weight


def test_gradients_lose_nothing() -> None:
    """AllReduce-SGD with a rate of 1: the way gone is the sum of the mean gradients, but for what the errors hold."""

    def program(comm: Endpoint) -> float:
        model = vector_model(50)
        worker = SlowMo(model, torch.optim.SGD(model.parameters(), lr=1.0), comm, AllReduce(), tau=0, wire=BFLOAT16)
        (x,) = model.parameters()
        draw, given = torch.Generator().manual_seed(comm.rank), torch.zeros(50, dtype=torch.float64)
        for _ in range(200):
            x.grad = torch.randn(50, generator=draw) / 16
            given += x.grad
            worker.step()
        error = worker.state.errors["gradient_error"]["0"]
        assert not error[:1].any()  # the flag
        lost = given + x.detach().double() - error[16:66].double()
        return float(comm.all_reduce_(lost, divisor=comm.size).abs().max())

    assert max(simulate(3, program)) < 2e-5


# ---- what cannot work ----
def overflows(comm: Endpoint, base: Base, wire: torch.dtype) -> str:
    model = vector_model(8)
    worker = SlowMo(model, torch.optim.SGD(model.parameters(), lr=1.0), comm, base, tau=2, wire=wire)
    (x,) = model.parameters()
    try:
        for _ in range(4):
            x.grad = torch.full_like(x, 7e4)
            worker.step()
    except SlowmoError as error:
        return str(error)
    assert x.isfinite().all()
    return ""


@pytest.mark.parametrize("base", BASES[:-1], ids=names)
def test_beyond_the_range_of_float16_is_an_error(base: Base) -> None:
    for message in simulate(2, overflows, base, FLOAT16):
        assert "whose largest is 65504" in message and "bfloat16" in message
    assert simulate(2, overflows, base, BFLOAT16) == ["", ""]


@pytest.mark.parametrize(
    "base, slow, words",
    [
        (SGP(), {"wire": BFLOAT16, "sharded": True}, "sharded"),
        (SGP(), {"wire": torch.int8}, "torch.bfloat16 or torch.float16"),
    ],
)
def test_what_cannot_work_is_refused(base: Base, slow: dict, words: str) -> None:
    def program(comm: Endpoint) -> None:
        model = vector_model(3)
        SlowMo(model, torch.optim.SGD(model.parameters(), lr=0.1), comm, base, **slow)

    with pytest.raises(UsageError, match=words):
        simulate(2, program)


def test_the_configuration() -> None:
    assert parse('[run]\nsteps = 5\n[comm]\ndtype = "bfloat16"').comm.dtype == "bfloat16"
    for overrides, words in (
        (["comm.dtype=int8"], "float16"),
        (["comm.dtype=bfloat16", "slowmo.sharded=true"], "all of x0"),
    ):
        with pytest.raises(UsageError) as error:
            parse("[run]\nsteps = 5", overrides=overrides)
        assert words in str(error.value)


# ---- checkpoints (to the bit: test_checkpoint.py) ----
def copies_of_errors(worker: SlowMo) -> dict[str, torch.Tensor]:
    """By kind and name."""
    return {f"{kind} {n}": e.clone() for kind, errors in worker.state.errors.items() for n, e in errors.items()}


def leg(comm: Endpoint, folder: str, base: Base, until: int, tau: int) -> dict[str, Any]:
    torch.manual_seed(until)
    model = nn.Linear(9, 5)
    worker = SlowMo(model, torch.optim.SGD(model.parameters(), lr=0.1), comm, base, tau=tau, wire=BFLOAT16)
    if until > 4:
        worker.load(folder)
    told = {"at start": copies_of_errors(worker)}
    for k in range(worker.state.step, until):
        x = torch.randn(6, 9, generator=torch.Generator().manual_seed(100 * k + comm.rank))
        worker.optimizer.zero_grad()
        model(x).square().mean().backward()
        worker.step()
    worker.save(f"{folder}/step-{until:08}.h5")
    with worker.averaged():
        average = worker.state.z[0].clone()
    return told | {"at end": copies_of_errors(worker), "average": average}


@pytest.mark.parametrize("base, tau", [(Local(), 4), (OSGP(delay=2), 4), (AllReduce(), 4), (AllReduce(), 0)], ids=names)
def test_another_number_of_ranks_goes_on_with_the_mean_error(base: Base, tau: int, tmp_path: Path) -> None:
    old = simulate(4, leg, str(tmp_path), base, 4, tau)
    for got in simulate(3, leg, str(tmp_path), base, 8, tau):
        assert got["at start"].keys() == old[0]["at end"].keys() and got["at start"]
        for name, error in got["at start"].items():
            mean = torch.stack([o["at end"][name] for o in old]).mean(0)
            torch.testing.assert_close(error, mean, rtol=1e-6, atol=1e-12)
            assert error.any()


@pytest.mark.parametrize("until", [1, 2, 3])
def test_the_average_of_a_checkpoint_holds_what_is_in_flight(until: int, tmp_path: Path) -> None:
    from slowmo_mpi.checkpoint.export import state_dict
    from slowmo_mpi.checkpoint.read import Checkpoint

    base = OSGP("star", delay=3)
    got = simulate(3, leg, str(tmp_path), base, until, 0)
    with Checkpoint(tmp_path / f"step-{until:08}.h5") as checkpoint:
        weight = state_dict(checkpoint)["weight"]
    torch.testing.assert_close(got[0]["average"][:45].view(5, 9), weight, rtol=0, atol=1e-6)


def evaluates(comm: Endpoint, look: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    model = nn.Linear(9, 5)
    worker = SlowMo(model, torch.optim.SGD(model.parameters(), lr=0.1), comm, OSGP(delay=2), tau=6, wire=FLOAT16)
    for k in range(9):
        x = torch.randn(6, 9, generator=torch.Generator().manual_seed(100 * k + comm.rank))
        worker.optimizer.zero_grad()
        model(x).square().mean().backward()
        worker.step()
        if look:
            with worker.averaged():
                seen = worker.state.z[0].clone()
            s, flight = worker.state, worker.state.in_flight
            mass = s.w * s.z[0]
            if flight:
                mass += flight.sent * (flight.packet.vectors[0] if flight.age else s.z[0])
            mean = comm.all_reduce_(mass, divisor=comm.size)
            torch.testing.assert_close(seen, mean)
    return snapshot(worker)


def test_evaluation_sees_the_mass_in_flight_and_changes_nothing() -> None:
    for a, b in zip(simulate(3, evaluates, True), simulate(3, evaluates, False), strict=True):
        assert not differ(a, b)


def team_goes_on(comm: Endpoint, base: Base, cut: int) -> list[torch.Tensor]:
    """Workers of two ranks; resumed after `cut` steps from a state_dict, if there are so many."""
    torch.manual_seed(0)
    model = nn.Linear(9, 5)

    def make() -> SlowMo:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        return SlowMo(model, optimizer, comm, base, tau=3, wire=BFLOAT16, ranks_per_worker=2)

    worker = make()
    for k in range(8):
        if k == cut:
            tree = pickle.loads(pickle.dumps(worker.state_dict()))
            worker.drain()
            worker = make()
            worker.load_state_dict(tree)
        x = torch.randn(6, 9, generator=torch.Generator().manual_seed(100 * k + comm.rank))
        worker.optimizer.zero_grad()
        model(x).square().mean().backward()
        worker.step()
    errors = [e for name, e in copies_of_errors(worker).items()]
    assert all(e.any() for e in errors)
    return [worker.state.flat.buffers[0].clone(), *errors]


@pytest.mark.parametrize("base", [AllReduce(), Local(), OSGP(delay=2)], ids=names)
@pytest.mark.parametrize("world", ["mpi-4"], indirect=True)
def test_workers_of_several_ranks(world: Real, base: Base) -> None:
    got = world.run(team_goes_on, base, 0)
    assert torch.equal(got[0][0], got[1][0]) and torch.equal(got[2][0], got[3][0])
    for others in (simulate(4, team_goes_on, base, 0), simulate(4, team_goes_on, base, 5)):
        for a, b in zip(got, others, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
