"""A noisy quadratic with a known optimum: every claim about convergence can be checked on it in seconds."""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from slowmo_mpi.errors import UsageError
from slowmo_mpi.tasks import Context

SAMPLES = 2**20


def quadratic(
    context: Context,
    *,
    dim: int = 64,
    condition: float = 10.0,
    noise: float = 1.0,
    heterogeneity: float = 1.0,
    start: float = 10.0,
    dtype: Literal["float32", "float64"] = "float32",
) -> Quadratic:
    """Minimise the mean over ranks of f_i(x) = 1/2 (x - b_i)^T A (x - b_i), from noisy gradients.

    A is diagonal, its `dim` eigenvalues log-spaced in [1, `condition`]. The b_i are drawn for all ranks
    from the seed as x* + `heterogeneity` times unit Gaussians and centred, so that x* minimises the mean
    whatever the number of ranks. x starts at Euclidean distance `start` from x*, equally far along every
    axis. A sample's gradient has Gaussian noise of standard deviation `noise` in each coordinate.
    Raises UsageError for values without a meaning.
    """
    for key, value, least in [
        ("dim", dim, 1),
        ("condition", condition, 1),
        ("noise", noise, 0),
        ("heterogeneity", heterogeneity, 0),
        ("start", start, 0),
    ]:
        if not least <= value < math.inf:
            raise UsageError(
                f"task.{key} = {value} is not a finite number from {least} up.",
                f"Set task.{key} to {least} or more.",
            )
    return Quadratic(context, dim, condition, noise, heterogeneity, start, getattr(torch, dtype))


class Point(nn.Module):
    """A model that is one vector x, (dim,), and nothing else."""

    def __init__(self, x: Tensor):
        super().__init__()
        self.x = nn.Parameter(x.clone())

    def forward(self) -> Tensor:
        return self.x


class Quadratic:
    """The task. Problem data is float64, (dim,): `eigenvalues`, `optimum` x*, `b` the rank's own b_i."""

    def __init__(
        self,
        context: Context,
        dim: int,
        condition: float,
        noise: float,
        heterogeneity: float,
        start: float,
        dtype: torch.dtype,
    ):
        # Two streams: x* does not depend on the number of ranks. The third key is the noise's, see Noise.
        of_optimum, of_offsets, of_noise = np.random.SeedSequence(context.seed).spawn(3)
        optimum = np.random.Generator(np.random.PCG64(of_optimum)).standard_normal(dim)
        offsets = np.random.Generator(np.random.PCG64(of_offsets)).standard_normal((context.ranks, dim))
        offsets = heterogeneity * (offsets - offsets.mean(axis=0))

        self.eigenvalues = torch.logspace(0, math.log10(condition), dim, dtype=torch.float64)
        self.optimum = torch.from_numpy(optimum)
        self.b = self.optimum + torch.from_numpy(offsets[context.rank])
        self.model = Point((self.optimum + start / math.sqrt(dim)).to(dtype))
        pull = -self.eigenvalues * torch.from_numpy(offsets[context.rank])
        key = int(of_noise.generate_state(1, np.uint64)[0])
        self.train = NoisySamples(pull, noise, key, dtype)
        self.test = ExactSample(dim, dtype)
        self._A, self._optimum = self.eigenvalues.to(dtype), self.optimum.to(dtype)

    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """f_i(x) - f_i(x*) + xi.(x - x*), xi the batch's mean noise: its gradient is A (x - b_i) + xi.

        With e = x - x* that is 1/2 e^T A e + g.e where the batch g = xi - A (b_i - x*), (dim,), is the
        gradient at x*. Its mean over ranks is f(x) - f(x*) plus noise. Shown: `distance`, the SQUARED
        distance |x - x*|^2, and `excess` = f(x) - f(x*) of the mean f over all ranks, >= 0 and noise-free.
        """
        x = model()
        error = x - self._optimum.to(x.device)
        excess = 0.5 * torch.dot(error, self._A.to(x.device) * error)
        shown = {"distance": error.detach().square().sum(), "excess": excess.detach()}
        return excess + torch.dot(batch, error), shown


class NoisySamples:
    """2^20 virtual samples; a batch is the mean gradient at x* of its samples, (dim,)."""

    def __init__(self, pull: Tensor, noise: float, key: int, dtype: torch.dtype):
        self._pull, self._noise, self._key, self._dtype = pull, noise, key, dtype

    def __len__(self) -> int:
        return SAMPLES

    def batch(self, indices: Tensor) -> Tensor:
        """-A (b_i - x*) + the mean noise of `indices`."""
        xi = gaussians(self._key, indices.numpy(), len(self._pull)).mean(axis=0)
        return (self._pull + self._noise * torch.from_numpy(xi)).to(self._dtype)


class ExactSample:
    """One sample without noise, of the mean f over all ranks: the loss on it is f(x) - f(x*)."""

    def __init__(self, dim: int, dtype: torch.dtype):
        self._zero = torch.zeros(dim, dtype=dtype)

    def __len__(self) -> int:
        return 1

    def batch(self, indices: Tensor) -> Tensor:
        return self._zero.clone()


def gaussians(key: int, indices: np.ndarray, dim: int) -> np.ndarray:
    """Independent unit Gaussians as a pure function of (key, index, coordinate): float64, (b, dim).

    Counter-based, so any sample can be had without the ones before it: the counter
    c = index * ceil(dim/2) + j goes through SplitMix64's output function (a bijection of 64 bits that passes
    BigCrush), and its two 32-bit halves through Box-Muller give coordinates 2j and 2j+1. |value| < 6.8.
    """
    pairs = (dim + 1) // 2
    with np.errstate(over="ignore"):  # arithmetic modulo 2^64 is meant
        counter = indices.astype(np.uint64)[:, None] * np.uint64(pairs) + np.arange(pairs, dtype=np.uint64)
        h: np.ndarray = np.uint64(key) + (counter + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        h = (h ^ (h >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        h = (h ^ (h >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        h = h ^ (h >> np.uint64(31))
    u = ((h >> np.uint64(32)).astype(np.float64) + 0.5) * 2.0**-32  # never 0: its logarithm is taken
    angle = (h & np.uint64(0xFFFFFFFF)).astype(np.float64) * (2.0**-32 * 2.0 * math.pi)
    radius = np.sqrt(-2.0 * np.log(u))
    both = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1)
    return both.reshape(len(indices), 2 * pairs)[:, :dim]
