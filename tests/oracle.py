"""The dense oracle: m workers as one matrix, the papers' formulas in their own variables, float64 numpy.

Push-sum is here in its textbook form, numerators X (m, d) and weights w (m,) mixed by the dense P; the program keeps
de-biased z and never sees a matrix. `problem` is what both train: worker i's loss is 1/2 (x - b)^T A (x - b) with its
own A_i and a b_i that changes every step.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from slowmo_mpi.topology import Topology

D = 7


@dataclass(frozen=True)
class Problem:
    """A (m, d, d) symmetric positive definite, b (m, steps, d), x (d,) the start."""

    a: np.ndarray
    b: np.ndarray
    x: np.ndarray

    def gradient(self, worker: int, step: int, x: np.ndarray) -> np.ndarray:
        return self.a[worker] @ (x - self.b[worker, step])


def problem(ranks: int, steps: int, same_curvature: bool = False, seed: int = 0) -> Problem:
    draw = np.random.default_rng([seed, ranks])
    m = draw.normal(size=(ranks, D, D)) * 0.4
    a = np.eye(D) + m @ m.transpose(0, 2, 1)
    if same_curvature:
        a[:] = a[0]
    return Problem(a, draw.normal(size=(ranks, steps, D)), draw.normal(size=D))


@dataclass(frozen=True)
class Settings:
    """What the oracle understands: SGD with momentum, Nesterov and weight decay under any of the algorithms."""

    algorithm: str
    graph: Topology | None = None
    delay: int = 0
    tau: int = 6
    alpha: float = 1.0
    beta: float = 0.5
    buffers: str = "reset"
    average: str = "exact"
    gamma: str = "mean"
    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0
    rates: tuple[float, ...] = field(default=())
    half: bool = False  # what travels is rounded to float16


def owner(ranks: int) -> np.ndarray:
    """Which rank adds up each coordinate: shards of the flat vector, whose parameters (3 and 4) are padded to 8."""
    place = np.array([0, 1, 2, 8, 9, 10, 11])
    return place // -(-16 // ranks)


def trajectory(p: Problem, s: Settings) -> tuple[np.ndarray, np.ndarray]:
    """z (steps, m, d) and w (steps, m) after every step, messages in flight not counted."""
    m, steps = p.b.shape[:2]
    x, w = np.tile(p.x, (m, 1)), np.ones(m)
    flight: tuple[np.ndarray, np.ndarray] | None = None
    age = phase = 0
    momentum: list[np.ndarray | None] = [None] * m
    x0, u, e = x.copy(), np.zeros((m, D)), np.zeros((m, D))

    def travels(values: np.ndarray) -> np.ndarray:
        return values.astype(np.float16).astype(np.float64) if s.half else values

    exact = s.tau and s.average != "none"
    late: tuple[np.ndarray, float] | None = None  # of a delayed average: the mean way of the last round, its gamma
    zs, ws = [], []
    for k in range(steps):
        remaining = s.tau - k % s.tau if exact else np.inf
        delay = {"osgp": s.delay}.get(s.algorithm, 0)
        if s.algorithm == "osgp" and delay and flight is None and remaining > delay:
            big = s.graph.matrix(phase)
            kept = np.diag(np.diag(big))
            flight, age, phase = ((big - kept) @ (w[:, None] * travels(x / w[:, None])), (big - kept) @ w), 0, phase + 1
            # The gradient is taken at the z that was sent; the numerator keeps what was not.
            z, rest = x / w[:, None], x - w[:, None] * travels(x / w[:, None])
            x, w = kept @ (x - rest) + rest, kept @ w
        else:
            z = x / w[:, None]
        g = np.stack([p.gradient(i, k, z[i]) for i in range(m)])
        if s.algorithm == "allreduce":
            g = np.tile(g.mean(0), (m, 1))
        d = np.empty_like(g)
        for i in range(m):
            gi = g[i] + s.weight_decay * x[i] / w[i]  # z, and what rounding took from it
            old = momentum[i]
            v = gi if old is None else s.momentum * old + gi
            momentum[i] = v
            d[i] = gi + s.momentum * v if s.nesterov else v
            if not s.momentum:
                d[i] = gi
        rate = s.rates[k]
        if s.algorithm == "dpsgd" and remaining > 1:
            x = x + (s.graph.matrix(phase) - np.eye(m)) @ travels(x) - rate * d
            phase += 1
        else:
            x = x - rate * d
        if s.algorithm in ("sgp", "osgp") and delay == 0 and remaining > 1:
            big = s.graph.matrix(phase)
            x = x + (big - np.eye(m)) @ (w[:, None] * travels(x / w[:, None]))
            w, phase = big @ w, phase + 1
        if flight is not None:
            age += 1
            if age >= delay:
                x, w, flight = x + flight[0], w + flight[1], None
        if s.tau and (k + 1) % s.tau == 0:
            if flight is not None:
                x, w, flight = x + flight[0], w + flight[1], None
            used = s.rates[k + 1 - s.tau : k + 1]
            gamma = used[-1] if s.gamma == "last" else sum(used) / s.tau
            end = np.tile(x.mean(0), (m, 1)) if exact else x / w[:, None]
            if exact and s.half and m > 1:
                e = e + w[:, None] * x0 - x
                rounded = travels(e)
                e, mean = e - rounded, rounded.mean(0)
                e[owner(m), np.arange(D)] += m * (mean - travels(mean))
                end = x0 - travels(mean)
            if s.average == "delayed":
                late, (way, gamma) = (x0 - end, gamma), late or (None, 1.0)
                end = x0 if way is None else x0 - way
            if gamma == 0:
                x0 = x0 + s.alpha * (end - x0)
            else:
                u = s.beta * u + (x0 - end) / gamma
                x0 = x0 - s.alpha * gamma * u
            w = np.ones(m) if exact else w
            x = x0 * w[:, None]
            if s.buffers == "reset":
                momentum = [None] * m
            elif s.buffers == "average" and momentum[0] is not None:
                momentum = [np.mean(momentum, axis=0)] * m
        zs.append(x / w[:, None])
        ws.append(w.copy())
    return np.stack(zs), np.stack(ws)
