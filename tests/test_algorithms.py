"""The algorithms against the dense oracle and against the special cases that specify them."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
import torch
from oracle import Problem, Settings
from torch import nn
from worlds import Real, Simulated

from slowmo_mpi import DPSGD, OSGP, SGP, AllReduce, Local, SlowMo
from slowmo_mpi.bases import Base
from slowmo_mpi.comm import Endpoint
from slowmo_mpi.topology import load

STEPS = 27
RATE = 0.05
DROP = tuple(RATE if k < 13 else RATE / 10 for k in range(STEPS))
CONSTANT = (RATE,) * STEPS


class Point(nn.Module):
    """x (d,) as two parameters, so that the flat vector has a gap."""

    def __init__(self, x: np.ndarray, dtype: torch.dtype = torch.float64):
        super().__init__()
        x = torch.tensor(x, dtype=dtype)
        self.head, self.tail = nn.Parameter(x[:3].clone()), nn.Parameter(x[3:].clone())

    def forward(self) -> torch.Tensor:
        return torch.cat([self.head, self.tail])


def train(comm: Endpoint, p: Problem, base: Base, rates, optimizer: dict, kind=torch.optim.SGD, **slow):
    """z after every step, w after every step, and w plus what is in flight."""
    model = Point(p.x)
    opt = kind(model.parameters(), lr=1.0, **optimizer)
    worker = SlowMo(model, opt, comm, base, **slow)
    a, b = torch.tensor(p.a[comm.rank]), torch.tensor(p.b[comm.rank])
    zs, ws, masses = [], [], []
    for k in range(p.b.shape[1]):
        opt.param_groups[0]["lr"] = rates[k]
        e = model() - b[k]
        opt.zero_grad()
        (e @ a @ e / 2).backward()
        worker.step()
        s = worker.state
        # The next exchange may be posted already; on paper it is posted when the next step begins.
        flight = s.in_flight
        fresh = flight is not None and flight.age == 0
        zs.append(model().detach().numpy().copy())
        ws.append(s.w + (flight.sent if fresh else 0.0))
        masses.append(s.w + (flight.sent if flight else 0.0))
    worker.drain()
    return np.stack(zs), np.stack(ws), np.stack(masses), worker.state.w, model().detach().numpy().copy()


def base_of(s: Settings) -> Base:
    return {
        "allreduce": lambda: AllReduce(),
        "local": lambda: Local(),
        "dpsgd": lambda: DPSGD(s.graph),
        "sgp": lambda: SGP(s.graph),
        "osgp": lambda: OSGP(s.graph, s.delay),
    }[s.algorithm]()


def run(world, p: Problem, s: Settings, **more):
    slow = {k: getattr(s, k) for k in ("tau", "alpha", "beta", "buffers", "average", "gamma")} | more
    optimizer = {"momentum": s.momentum, "nesterov": s.nesterov, "weight_decay": s.weight_decay}
    return world.run(program, p, base_of(s), s.rates, optimizer, slow)


def program(comm, p, base, rates, optimizer, slow):
    return train(comm, p, base, rates, optimizer, **slow)


NESTEROV = {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01}
CASES = [
    {"algorithm": "allreduce", **NESTEROV},
    {"algorithm": "allreduce", "tau": 0},
    {"algorithm": "local", **NESTEROV, "buffers": "average"},
    {"algorithm": "local", "momentum": 0.9, "buffers": "maintain", "alpha": 0.7, "gamma": "last"},
    {"algorithm": "local", "tau": 1, "beta": 0.8},
    {"algorithm": "dpsgd", "graph": "ring-bidirectional", **NESTEROV},
    {"algorithm": "dpsgd", "graph": "base:k=2", "tau": 0},
    {"algorithm": "dpsgd", "graph": "star", "average": "none", "buffers": "maintain"},
    {"algorithm": "sgp", "graph": "exponential", **NESTEROV},
    {"algorithm": "sgp", "graph": "exponential", "tau": 0, **NESTEROV},
    {"algorithm": "sgp", "graph": "exponential", "average": "none", "buffers": "average", **NESTEROV},
    {"algorithm": "sgp", "graph": "exponential-static", "gamma": "last", "momentum": 0.5},
    {"algorithm": "sgp", "graph": "uneven", "tau": 5, "buffers": "maintain", **NESTEROV},
    {"algorithm": "sgp", "graph": "uneven", "tau": 0},
    *(
        {"algorithm": "osgp", "graph": graph, "delay": delay, "tau": tau, **NESTEROV}
        for graph in ("exponential", "uneven")
        for delay in (0, 1, 2, 3)
        for tau in (0, 7)
    ),
    {"algorithm": "osgp", "graph": "exponential", "delay": 2, "average": "none", "buffers": "maintain"},
    {"algorithm": "osgp", "graph": "exponential-two-peer", "delay": 1, "beta": 0.0},
]


def uneven(ranks: int):
    """A directed graph whose weights are no round numbers: column-stochastic, far from doubly stochastic."""
    from slowmo_mpi.topology import Edge, Topology

    steps = []
    for shift in (1, 2):
        edges = []
        for i in range(ranks):
            j = (i + shift) % ranks
            p = 0.0 if j == i else (0.2 + 0.5 * (i % 3) / 2) * (1 if i or shift == 1 else 0.5)
            edges.append(Edge(i, i, 1 - p))
            if p:
                edges.append(Edge(i, j, p))
        steps.append(tuple(edges))
    return Topology("uneven", ranks, tuple(steps))


def settings(case: dict, ranks: int) -> Settings:
    graph = case.get("graph")
    made = uneven(ranks) if graph == "uneven" else load(graph, ranks) if graph else None
    return Settings(**{**case, "graph": made, "rates": DROP})


@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(str(v) for v in c.values()))
def test_equals_the_dense_oracle(world: Simulated | Real, case: dict) -> None:
    p, s = oracle.problem(world.ranks, STEPS), settings(case, world.ranks)
    got = run(world, p, s)
    z, w = oracle.trajectory(p, s)
    for rank in range(world.ranks):
        np.testing.assert_allclose(got[rank][0], z[:, rank], rtol=0, atol=2e-12, err_msg=f"rank {rank}")
        np.testing.assert_allclose(got[rank][1], w[:, rank], rtol=0, atol=1e-12)
    masses = np.sum([g[2] for g in got], axis=0)
    np.testing.assert_allclose(masses, world.ranks, rtol=0, atol=1e-12)  # in flight included, at every step
    assert sum(g[3] for g in got) == pytest.approx(world.ranks, abs=1e-12)


@pytest.mark.parametrize(
    "case", [c for c in CASES if c.get("average") != "none"], ids=lambda c: "-".join(str(v) for v in c.values())
)
@pytest.mark.parametrize("world", ["simulated-3", "mpi-3", "mpi-4"], indirect=True)
def test_sharded_equals_whole_to_rounding(world: Simulated | Real, case: dict) -> None:
    p, s = oracle.problem(world.ranks, STEPS), settings(case, world.ranks)
    z, _ = oracle.trajectory(p, s)
    for rank, got in enumerate(run(world, p, s, sharded=True)):
        np.testing.assert_allclose(got[0], z[:, rank], rtol=0, atol=2e-12)
