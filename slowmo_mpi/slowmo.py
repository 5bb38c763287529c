"""The outer step of SlowMo: Algorithm 1, lines 7 and 8, of Wang et al., ICLR 2020 (arXiv 1910.00643) [1].

    line 6   xbar = exact average of the workers' iterates
    line 7   u    = beta * u + (x0 - xbar) / gamma
    line 8   x0   = x0 - alpha * gamma * u

u is in units of a gradient: what was gathered before the learning rate changed keeps its meaning after it.
Line 6 is communication (worker.py); what is here is elementwise, so it may be done on any part of the vectors.
"""

from __future__ import annotations

from dataclasses import dataclass

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


def outer_step(x0: Tensor, u: Tensor, xbar: Tensor, gamma: float, alpha: float, beta: float) -> None:
    """Lines 7 and 8, in place on `x0` and `u`.

    xbar: (d,) the round's average; gamma: the learning rate of the round, >= 0.
    Where gamma is 0, or so small that 1/gamma overflows, line 7 has no finite value; its limit for a
    vanished momentum is the average with step alpha, and u keeps its memory.
    """
    if gamma < torch.finfo(x0.dtype).tiny:
        x0.lerp_(xbar.to(x0.dtype), alpha)
        return
    u.mul_(beta).add_((x0 - xbar).div_(gamma))
    x0.add_(u, alpha=-alpha * gamma)
