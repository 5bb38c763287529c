"""The outer step of SlowMo: Algorithm 1, lines 7 and 8, of Wang et al., ICLR 2020 (arXiv 1910.00643) [1].

    line 6   xbar = exact average of the workers' iterates
    line 7   u    = beta * u + (x0 - xbar) / gamma
    line 8   x0   = x0 - alpha * gamma * u

u is in units of a gradient: what was gathered before the learning rate changed keeps its meaning after it.
Line 6 is communication (average.py); what is here is elementwise, so it may be done on any part of the vectors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class Slow:
    """The slow state: anchor `x0` and slow momentum `u`, both (d,), or this rank's share of them.

    float32 at least, also for half-precision parameters: alpha * gamma * u is often below half precision's step.
    """

    x0: Tensor
    u: Tensor

    @classmethod
    def start(cls, z: Tensor) -> Slow:
        """x0 = the point all workers start from, taken before the first step; u = 0."""
        x0 = z.detach().to(torch.promote_types(z.dtype, torch.float32), copy=True)
        return cls(x0, torch.zeros_like(x0))


def outer_step(x0: Tensor, u: Tensor, z: Tensor, gamma: float, alpha: float, beta: float) -> None:
    """Lines 7 and 8, in place: z, which is xbar at first, is at the end the new x0, where everybody restarts.

    x0, u, z: (d,); gamma: the learning rate of the round, >= 0.
    Where gamma is 0, or so small that 1/gamma overflows, line 7 has no finite value; its limit for a
    vanished momentum is the average with step alpha, and u keeps its memory.
    """
    if gamma < torch.finfo(x0.dtype).tiny:
        z.copy_(x0.lerp_(z, alpha))
        return
    if x0.is_cuda and fused(x0, u, z, gamma, alpha, beta):
        return
    # In pieces that stay in the cache: one pass over memory instead of five.
    for x0_, u_, z_ in zip(*(vector.split(PIECE) for vector in (x0, u, z)), strict=True):
        torch.sub(x0_, z_, out=z_)
        u_.mul_(beta).add_(z_, alpha=1 / gamma)
        x0_.add_(u_, alpha=-alpha * gamma)
        z_.copy_(x0_)


def fused(x0: Tensor, u: Tensor, z: Tensor, gamma: float, alpha: float, beta: float) -> bool:
    """The same as one kernel, by torch.compile; False, with nothing done, where that cannot be had."""
    try:
        if not _KERNEL:
            _KERNEL.append(torch.compile(_lines_7_and_8, dynamic=True))
        if _KERNEL[0] is None:
            return False
        # As tensors: of numbers it would make a kernel for each value.
        factors = [torch.tensor(s, dtype=x0.dtype, device=x0.device) for s in (beta, 1 / gamma, alpha * gamma)]
        _KERNEL[0](x0, u, z, *factors)
    except Exception:  # no compiler, no Triton: the plain form is right everywhere
        _KERNEL[:] = [None]
        return False
    return True


def _lines_7_and_8(x0: Tensor, u: Tensor, z: Tensor, beta: Tensor, per_gamma: Tensor, step: Tensor) -> None:
    u.copy_(beta * u + (x0 - z) * per_gamma)
    x0.copy_(x0 - step * u)
    z.copy_(x0)


PIECE = 1 << 18  # elements: 1 MiB of each vector in float32
_KERNEL: list[Any] = []  # the compiled form once it was asked for, None where it failed
