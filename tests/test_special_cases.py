"""What the settings must equal: BMUF, Lookahead, Local SGD, torch's own momentum, and each other."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
import torch
from oracle import Problem
from test_algorithms import CONSTANT, DROP, STEPS, program
from torch import nn
from worlds import Simulated

from slowmo_mpi import DPSGD, OSGP, SGP, AllReduce, Local, SlowMo
from slowmo_mpi.comm import Endpoint

WORLDS = pytest.mark.parametrize("world", ["simulated-1", "simulated-3", "mpi-2", "mpi-3", "mpi-4"], indirect=True)


def slow(**settings):
    return {"tau": 6, "alpha": 1.0, "beta": 0.0, "buffers": "maintain", **settings}


def ranks_of(world, p: Problem, base, rates, settings, optimizer=None) -> list[np.ndarray]:
    """z (steps, d) of each rank."""
    return [got[0] for got in world.run(program, p, base, rates, optimizer or {}, settings)]


def mean_gradient(p: Problem, k: int, x: np.ndarray) -> np.ndarray:
    return np.mean([p.gradient(i, k, x) for i in range(len(p.a))], axis=0)


def torch_outer(kind, x: np.ndarray, **arguments):
    """A torch optimizer on one float64 vector: step(gradient, lr) -> x."""
    parameter = nn.Parameter(torch.tensor(x))
    optimizer = kind([parameter], **arguments)

    def step(gradient: np.ndarray, lr: float) -> np.ndarray:
        parameter.grad = torch.tensor(gradient)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        return parameter.detach().numpy().copy()

    return step


@WORLDS
@pytest.mark.parametrize("base", [AllReduce(), Local()])
def test_tau_1_is_torch_momentum_on_the_mean_gradient(world, base) -> None:
    """algorithms.md: local or allreduce, tau = 1, alpha = 1; under a learning-rate schedule too."""
    p = oracle.problem(world.ranks, STEPS)
    step, x = torch_outer(torch.optim.SGD, p.x, lr=1.0, momentum=0.8), p.x
    got = ranks_of(world, p, base, DROP, slow(tau=1, beta=0.8))
    for k in range(STEPS):
        x = step(mean_gradient(p, k, x), DROP[k])
        for z in got:
            np.testing.assert_allclose(z[k], x, rtol=0, atol=1e-12)


@WORLDS
@pytest.mark.parametrize("gamma", ["mean", "last"])
def test_beta_0_is_local_sgd_whatever_gamma(world, gamma) -> None:
    p = oracle.problem(world.ranks, STEPS)
    x = np.tile(p.x, (world.ranks, 1))
    got = ranks_of(world, p, Local(), DROP, slow(gamma=gamma))
    for k in range(STEPS):
        x = np.stack([x[i] - DROP[k] * p.gradient(i, k, x[i]) for i in range(world.ranks)])
        if (k + 1) % 6 == 0:
            x[:] = x.mean(0)
        for i, z in enumerate(got):
            np.testing.assert_allclose(z[k], x[i], rtol=0, atol=1e-12)


@WORLDS
def test_constant_gamma_is_bmuf_and_after_a_drop_it_is_not(world) -> None:
    """BMUF keeps its momentum in units of displacement (Chen & Huo 2016); SlowMo in units of a gradient."""
    p = oracle.problem(world.ranks, STEPS)

    def bmuf(rates) -> np.ndarray:
        x, anchor, v = np.tile(p.x, (world.ranks, 1)), p.x.copy(), np.zeros_like(p.x)
        for k in range(24):
            x = np.stack([x[i] - rates[k] * p.gradient(i, k, x[i]) for i in range(world.ranks)])
            if (k + 1) % 6 == 0:
                v = 0.7 * v + (x.mean(0) - anchor)
                anchor = anchor + v
                x[:] = anchor
        return anchor

    drop = tuple(0.05 if k < 12 else 0.005 for k in range(STEPS))
    for rates, same in ((CONSTANT, True), (drop, False)):
        z = ranks_of(world, p, Local(), rates, slow(beta=0.7))[0][23]
        distance = np.abs(z - bmuf(rates)).max()
        assert distance < 1e-12 if same else distance > 1e-3


def test_one_worker_without_momentum_is_lookahead() -> None:
    """Zhang et al. 2019, Algorithm 1: phi += alpha (theta - phi), theta = phi; here around Adam."""
    p = oracle.problem(1, STEPS)
    parameter = nn.Parameter(torch.tensor(p.x))
    adam = torch.optim.Adam([parameter], lr=0.05)
    phi = p.x.copy()
    settings = slow(alpha=0.5)

    def run(comm: Endpoint) -> list[np.ndarray]:
        from test_algorithms import train

        return train(comm, p, Local(), CONSTANT, {}, torch.optim.Adam, **settings)[0]

    got = Simulated(1).run(run)[0]
    for k in range(STEPS):
        parameter.grad = torch.tensor(p.gradient(0, k, parameter.detach().numpy()))
        adam.step()
        if (k + 1) % 6 == 0:
            phi = phi + 0.5 * (parameter.detach().numpy() - phi)
            with torch.no_grad():
                parameter.copy_(torch.tensor(phi))
        np.testing.assert_allclose(got[k], parameter.detach().numpy(), rtol=0, atol=1e-12)


@WORLDS
def test_constant_gamma_is_torch_sgd_on_the_pseudo_gradient(world) -> None:
    """The outer step is SGD(lr = alpha, momentum = beta) on x0 - xbar while gamma is constant."""
    p = oracle.problem(world.ranks, STEPS)
    step, anchor = torch_outer(torch.optim.SGD, p.x, lr=1.0, momentum=0.6), p.x
    got = ranks_of(world, p, Local(), CONSTANT, slow(alpha=0.7, beta=0.6))
    x = np.tile(p.x, (world.ranks, 1))
    for k in range(STEPS):
        x = np.stack([x[i] - CONSTANT[k] * p.gradient(i, k, x[i]) for i in range(world.ranks)])
        if (k + 1) % 6 == 0:
            anchor = step(anchor - x.mean(0), 0.7)
            x[:] = anchor
        for i, z in enumerate(got):
            np.testing.assert_allclose(z[k], x[i], rtol=0, atol=1e-12)


@WORLDS
def test_sgp_on_the_complete_graph_averages_exactly_every_step(world) -> None:
    p = oracle.problem(world.ranks, STEPS)
    x = p.x
    got = ranks_of(world, p, SGP("complete"), DROP, slow(tau=0))
    for k in range(STEPS):
        x = x - DROP[k] * mean_gradient(p, k, x)
        for z in got:
            np.testing.assert_allclose(z[k], x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("graph", ["exponential", "star", "exponential-two-peer"])
def test_osgp_without_delay_is_sgp(world, graph) -> None:
    p = oracle.problem(world.ranks, STEPS)
    settings, optimizer = slow(beta=0.5, buffers="reset"), {"momentum": 0.9, "nesterov": True}
    one = ranks_of(world, p, SGP(graph), DROP, settings, optimizer)
    other = ranks_of(world, p, OSGP(graph, delay=0), DROP, settings, optimizer)
    for a, b in zip(one, other, strict=True):
        assert np.array_equal(a, b)


def mixes(comm: Endpoint, exponent: int) -> tuple[torch.Tensor, torch.Tensor]:
    """SGP with zero gradients from different points: z after `exponent` steps."""
    model = nn.Linear(5, 3, bias=False).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    worker = SlowMo(model, optimizer, comm, SGP("exponential"), tau=0)
    start = torch.arange(16.0, dtype=torch.float64) * (comm.rank + 1) ** 2
    worker.state.z[0].copy_(start)
    for _ in range(exponent):
        model.weight.grad = torch.zeros_like(model.weight)
        worker.step()
    return start, worker.state.z[0].clone()


@pytest.mark.parametrize(
    "world", ["simulated-1", "simulated-2", "simulated-8", "simulated-16", "mpi-2", "mpi-4"], indirect=True
)
def test_the_exponential_graph_averages_in_p_steps(world) -> None:
    got = world.run(mixes, world.ranks.bit_length() - 1)
    mean = torch.stack([start for start, _ in got]).mean(0)
    for _, z in got:
        torch.testing.assert_close(z, mean, rtol=1e-14, atol=0)


@pytest.mark.parametrize("base", [DPSGD("ring-bidirectional"), SGP("exponential")], ids=["dpsgd", "sgp"])
@pytest.mark.parametrize("world", ["simulated-2", "simulated-4", "simulated-8", "mpi-3", "mpi-4"], indirect=True)
def test_the_mean_of_noaverage_follows_the_averaging_variant(world, base) -> None:
    """With doubly stochastic P and gradients linear in x (the same A everywhere) gossip leaves the mean alone."""
    p = oracle.problem(world.ranks, STEPS, same_curvature=True)
    exact = ranks_of(world, p, base, DROP, slow(beta=0.6))
    none = ranks_of(world, p, base, DROP, slow(beta=0.6, average="none"))
    np.testing.assert_allclose(np.mean(none, axis=0), np.mean(exact, axis=0), rtol=0, atol=1e-12)
    if world.ranks > 2:
        assert np.abs(none[0] - none[-1]).max() > 1e-6  # the workers themselves differ


@WORLDS
def test_double_averaging(world) -> None:
    """Yu et al. 2019: every tau steps average parameters and optimizer buffers: a setting, no algorithm of its own."""
    p = oracle.problem(world.ranks, STEPS)
    x, v = np.tile(p.x, (world.ranks, 1)), np.zeros((world.ranks, len(p.x)))
    got = ranks_of(world, p, Local(), DROP, slow(buffers="average"), {"momentum": 0.9})
    for k in range(STEPS):
        v = np.stack([0.9 * v[i] + p.gradient(i, k, x[i]) for i in range(world.ranks)])
        x = x - DROP[k] * v
        if (k + 1) % 6 == 0:
            x[:], v[:] = x.mean(0), v.mean(0)
        for i, z in enumerate(got):
            np.testing.assert_allclose(z[k], x[i], rtol=0, atol=1e-12)


def noisy_error(ranks: int, steps: int) -> float:
    """Mean of f(x) - f* over the second half of training on the noisy quadratic, averaged over 4 seeds."""

    def program(comm: Endpoint, seed: int, rate: float) -> float:
        from slowmo_mpi import tasks
        from slowmo_mpi.tasks.sampler import Shards

        task = tasks.build(
            "quadratic",
            {"dim": 32, "noise": 3.0, "condition": 4.0, "heterogeneity": 0.0},
            tasks.Context(comm.rank, comm.size, seed),
        )
        optimizer = torch.optim.SGD(task.model.parameters(), lr=rate)
        worker = SlowMo(task.model, optimizer, comm, Local(), tau=4, alpha=1.0, beta=0.5)
        shards = Shards(len(task.train), comm.size, comm.rank, 1, seed)
        excess = []
        for k in range(steps):
            loss, metrics = task.loss(task.model, task.train.batch(shards.indices(k)))
            optimizer.zero_grad()
            loss.backward()
            worker.step()
            if k % 4 == 0 and k >= steps // 2:  # just after a round: the average of all workers
                excess.append(float(metrics["excess"]))
        return float(np.mean(excess))

    # alpha gamma / (1 - beta) = sqrt(m / (tau T)), the theory's rate, scaled to this problem
    rate = 0.5 * 0.5 * np.sqrt(ranks * 4 / (4 * steps)) * 4
    return float(np.mean([Simulated(ranks).run(program, seed, rate)[0] for seed in range(3)]))


def test_the_error_on_the_noisy_quadratic_falls_with_the_root_of_the_steps() -> None:
    """Rate O(1/sqrt(m tau T)): slope -1/2 in steps, and 4 workers need about a quarter of the steps of 1."""
    steps = [256, 512, 1024, 2048]
    one = [noisy_error(1, k) for k in steps]
    slope = np.polyfit(np.log(steps), np.log(one), 1)[0]
    print("m = 1:", one, "slope", slope, "m = 4, 256 and 512 steps:", noisy_error(4, 256), noisy_error(4, 512))
    assert -0.65 < slope < -0.35
    assert noisy_error(4, 256) == pytest.approx(one[2], rel=0.35)  # 256 steps of 4 workers as 1024 of 1
    assert noisy_error(4, 512) == pytest.approx(one[3], rel=0.35)
