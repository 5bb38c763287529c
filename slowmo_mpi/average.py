"""Line 6 of Algorithm 1: the average of the workers' iterates.

    exact      xbar = 1/m sum_i w_i z_i
    rounded    xbar = x0 - 1/m sum_i Q(w_i (x0 - z_i)), the same but for Q, since the weights sum to m

What is rounded is the way of one round, not z: it is small beside z, and so is what rounding takes; and that is not
lost either (comm/compressed.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .worker import SlowMo


def average_(worker: SlowMo, number: int, z: Tensor) -> None:
    """z = xbar, z being this rank's part of flat vector `number`; with sharded slow state only its shard of that."""
    across, w, x0 = worker.team.across, worker.state.w, worker.state.slow[number].x0
    if worker.feedback:
        mean = worker.feedback[number].all_reduce(across, (x0 - z).mul_(w), "exact average")()
        torch.sub(x0, mean, out=z)
        return
    z.mul_(w / across.size)
    if worker.sharded:
        across.reduce_scatter_(z, "exact average")
    else:
        across.all_reduce_(z, "exact average")
